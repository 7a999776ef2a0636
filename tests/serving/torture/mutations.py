"""Requests that are almost right: a number makes each of them, so that one that breaks something can be made again."""

from __future__ import annotations

import json
import random
from typing import Any

PATHS = ("/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/health", "/metrics", "/tokenizer_info")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "run",
        "prompt": "Ada sees",
        "n": 2,
        "best_of": 2,
        "echo": True,
        "frequency_penalty": 0.5,
        "logit_bias": {"65": -3.5},
        "logprobs": 2,
        "max_tokens": 4,
        "presence_penalty": -0.5,
        "seed": 7,
        "stop": ["\n", "sea"],
        "stream": False,
        "stream_options": None,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 1,
        "return_token_ids": True,
        "allow_special": False,
        "add_special_tokens": True,
        "suffix": None,
        "user": "someone",
    },
    "/tokenize": {"model": "run", "prompt": "Zo\u00eb \ud83c\udf4e", "add_special_tokens": True, "allow_special": True},
    "/detokenize": {"model": "run", "tokens": [65, 66, 280]},
}
NUMBERS = (0, -1, 1, 2, 1.5, 1e-300, 1e308, -1e308, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.1, 20, 100, 289, 290)
TEXTS = (
    *("", " ", "a", "\x00", "\ud800", "\udfff\ud800", "\ufeff", "<|endoftext|>", "run@step-00000001", "run@latest"),
    *("run@../../../etc/passwd", "\u202e", "e\u0301" * 50, "\U0010ffff", "a" * 5000, "{}", "__proto__", "NaN", "null"),
    *("%s%n", "-1", "1e5", "\n" * 300, "data: [DONE]\n\n"),
)
WORDS = ("max_new_tokens", "tools", "messages", "Prompt", "", "prompt ", "\u00e9", "__class__", "a" * 3000, "stream.x")


def request(number: int | str) -> bytes:
    """Return the bytes of the request with this number."""
    rng = random.Random(f"request {number}")
    path = rng.choices(PATHS, [60, 10, 10, 2, 2, 2, 2])[0]
    body = dict(BODIES.get(path, {}))
    for name in list(body):
        if name not in ("prompt", "tokens", "max_tokens") and rng.random() < 0.6:
            del body[name]
    kind = rng.choices(["keys", "bytes", "headers", "path", "raw"], [60, 12, 16, 6, 6])[0]
    if kind == "keys":
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
            _change_a_key(body, rng)
    data = _encode(body, rng) if body or path in BODIES else b""
    if kind == "bytes":
        data = _damaged(data or b"{}", rng)
    method = "POST" if data or path in BODIES else "GET"
    headers = [("Host", "localhost"), ("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    if kind == "path":
        method, path = _odd_path(method, path, rng)
    if kind == "headers":
        headers, data = _odd_headers(headers, data, rng)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
    whole = "\r\n".join(lines).encode("latin-1", errors="replace") + data
    return _raw(whole, rng) if kind == "raw" else whole


def _change_a_key(body: dict[str, Any], rng: random.Random) -> None:
    what = rng.choice(["value", "value", "value", "add", "remove", "stream"])
    if what == "value" and body:
        body[rng.choice(list(body))] = _value(rng, depth=3)
    elif what == "add":
        body[rng.choice(WORDS)] = _value(rng, depth=2)
    elif what == "remove" and body:
        del body[rng.choice(list(body))]
    elif what == "stream":
        body["stream"] = True
        body["stream_options"] = rng.choice([None, {"include_usage": True}, {"include_usage": 1}, {"x": None}, []])


def _value(rng: random.Random, *, depth: int) -> Any:
    kind = rng.choice(["number", "number", "text", "text", "list", "dict", "ids", "odd"])
    if kind == "number":
        return rng.choice(NUMBERS)
    if kind == "text":
        return rng.choice(TEXTS)
    if kind == "ids":
        return [rng.choice([0, 65, 66, 289, 290, -1, 10**9, 2**63]) for _ in range(rng.choice([1, 3, 200]))]
    if kind == "odd" or depth == 0:
        return rng.choice([None, True, False, [], {}, [[]], [None], "", 0.0, -0.0, _Raw(rng.choice(_RAW))])
    if kind == "list":
        return [_value(rng, depth=depth - 1) for _ in range(rng.randrange(5))]
    return {
        rng.choice([*WORDS, "65", "-1", "1e3", "\u0664"]): _value(rng, depth=depth - 1) for _ in range(rng.randrange(4))
    }


_RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" + "0" * 5000,
    "0" * 50,
    "[" * 3000 + "]" * 3000,
    "01",
    "'a'",
)


class _Raw(str):
    """JSON, or almost, that no value becomes."""


def _encode(body: dict[str, Any], rng: random.Random) -> bytes:
    marks: dict[str, str] = {}

    def marked(value: Any) -> Any:
        if isinstance(value, _Raw):
            marks[f"raw-{len(marks)}-raw"] = str(value)
            return f"raw-{len(marks) - 1}-raw"
        if isinstance(value, dict):
            return {key: marked(one) for key, one in value.items()}
        return [marked(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(marked(body), ensure_ascii=rng.random() < 0.7)
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", errors="surrogatepass")


def _damaged(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    other = rng.randrange(len(data))
    return rng.choice(
        [
            data[:place],
            data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
            data[:place] + rng.randbytes(rng.choice([1, 4, 64])) + data[place:],
            data[:place] + data[other:],
            b"\xef\xbb\xbf" + data,
            data.decode("utf-8", errors="replace").encode("utf-16"),
            data[:-1] + b"," + data[1:],  # each key twice
            b"[" * 100_000,
            b'{"prompt":' * 20_000 + b"1" + b"}" * 20_000,
            data + data,
            rng.randbytes(500),
            b"[" + data + b"]",
            b" " * 1_100_000 + data,
            b"null",
        ]
    )


def _odd_path(method: str, path: str, rng: random.Random) -> tuple[str, str]:
    method = rng.choice([method, "GET", "PUT", "OPTIONS", "HEAD", "TRACE", "get", "CONNECT", "A" * 300])
    return method, rng.choice(
        [
            *(path, f"/{path}", path + "/", path.upper(), path + "?a=b&a", path + "?" + "a" * 5000, path + "%00", "*"),
            *(
                "/",
                "/..%2f..%2fetc/passwd",
                "/%ff%fe",
                "/v1/models/" + "a" * 3000,
                "/v1/models/run@%0d%0aX:1",
                "/v1/models/",
            ),
            *("http://evil.example/health", "/static/../../config/serve.py", "/api/runs/../..", "/\u00ff", ""),
        ]
    )


def _odd_headers(
    headers: list[tuple[str, str]], data: bytes, rng: random.Random
) -> tuple[list[tuple[str, str]], bytes]:
    host, kind, length = headers
    chunked = ("Transfer-Encoding", "chunked")
    size = f"{len(data):x}\r\n".encode()
    return rng.choice(
        [
            ([host, kind, ("Content-Length", str(len(data) + rng.choice([-1, 1, 1000])))], data),
            (
                [host, kind, ("Content-Length", rng.choice(["-1", "x", "1e3", "9" * 400, "", "0x10", "+5", "\u00b2"]))],
                data,
            ),
            ([host, kind, length, length], data),
            ([host, kind, length, ("Content-Length", "3")], data),
            ([host, kind], data),
            ([host, kind, length, chunked], data),
            ([host, kind, chunked], size + data + b"\r\n0\r\n\r\n"),
            ([host, kind, chunked], rng.choice([b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", size + data, b"\r\n" * 50])),
            ([kind, length], data),
            ([host, host, kind, length], data),
            (
                [
                    (
                        "Host",
                        rng.choice(
                            ["evil.example", "", "localhost:99999999", "[::1", "127.0.0.1.evil", "a b", "\u00e9"]
                        ),
                    )
                ],
                b"",
            ),
            (
                [host, kind, length, ("Origin", rng.choice(["null", "http://evil.example", "", "http://localhost"]))],
                data,
            ),
            (
                [
                    host,
                    kind,
                    length,
                    ("Authorization", rng.choice(["Bearer", "Basic \u00ff", "Basic YQ==", "x" * 9000])),
                ],
                data,
            ),
            ([host, kind, length, *((f"X-{one}", "v" * 50) for one in range(rng.choice([5, 90, 2000])))], data),
            ([host, kind, length, ("X-Long", "v" * rng.choice([1000, 20_000, 200_000]))], data),
            ([host, kind, length, ("Bad Name", "v"), ("X-Nul", "a\x00b"), ("X-Fold", "a\r\n b")], data),
            ([host, kind, length, ("Expect", rng.choice(["100-continue", "200-ok"]))], data),
            (
                [
                    host,
                    kind,
                    length,
                    ("Connection", rng.choice(["close", "upgrade", "keep-alive, x"])),
                    ("Upgrade", "h2c"),
                ],
                data,
            ),
            ([host, ("Content-Type", "text/\x01"), ("Content-Encoding", "gzip"), length], data),
            ([host, kind, length, ("Accept", "*/*;q=x"), ("Accept-Encoding", "\u00ff")], data),
        ]
    )


def _raw(whole: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [
            whole.replace(b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"", b"FTP/1.1"]), 1),
            whole.replace(b"\r\n", b"\n"),
            whole[: rng.randrange(1, len(whole))],
            whole * 3,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
            rng.randbytes(rng.choice([1, 100, 70_000])),
            b"\r\n" * 1000 + whole,
            b"A" * 100_000,
            _damaged(whole, rng),
        ]
    )
