"""The benchmark of serving: its configuration, its texts, its clients against a small server, and a small run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarking import bench_serve as bench
from benchmarking.harness import Report
from benchmarking.machine import is_installed
from benchmarking.serving.load import send_all
from benchmarking.serving.servers import Server, our_command, started
from config.bench_serve import BenchServeConfig
from config.errors import ConfigError
from config.io import SHIPPED, dump_json_schema, dump_toml, load_config
from tests.benchmarking.commands import run_command
from tests.serving.command import wait_until

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def test_shipped_toml_loads_and_names_its_schema(tmp_path: Path) -> None:
    """The shipped TOML is valid, its printed form parses back to an equal object, and its schema is the current one."""
    config = load_config(BenchServeConfig, SHIPPED / "bench_serve.toml")
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load_config(BenchServeConfig, tmp_path / "again.toml") == config
    assert (SHIPPED / "bench_serve.toml").read_text().startswith("#:schema bench_serve.schema.json\n")
    assert (SHIPPED / "bench_serve.schema.json").read_text() == dump_json_schema(BenchServeConfig) + "\n"


def test_the_clock_of_this_process_is_refused() -> None:
    """Its CPU seconds say nothing of servers, which are other processes."""
    with pytest.raises(ConfigError, match=r'expected "wall", found "cpu"; .* cpu_ms_per_token'):
        load_config(BenchServeConfig, SHIPPED / "bench_serve.toml", {"measure.clock": "cpu"})


@pytest.mark.parametrize("context_length", [None, 96])
def test_texts_fit_the_context_and_are_the_same_for_every_candidate(context_length: int | None) -> None:
    """The same seed gives the same bodies, another round others; mixed lengths differ, and fill the context at most."""
    texts = bench._Texts(BenchServeConfig(checkpoint=Path("run")), range(40, 80), context_length)
    bodies = texts.bodies(20, "a")
    assert bodies == texts.bodies(20, "a") != texts.bodies(20, "b")
    lengths = {len(body["prompt"]) for body in bodies}
    assert lengths == {16} if context_length is None else len(lengths) > 3
    assert all(len(body["prompt"]) + body["max_tokens"] <= (context_length or 80) for body in bodies)


def test_a_burst_has_prompts_of_eight_to_120_tokens_whose_texts_fit() -> None:
    """Whatever the context is: in a short one prompts and texts are cut."""
    config = BenchServeConfig(checkpoint=Path("run"))
    for context_length, longest in ((512, 120), (96, 88), (16, 8)):
        bodies = bench._Texts(config, range(40, 80), context_length, longest=120).bodies(200, "a")
        lengths = [len(body["prompt"]) for body in bodies]
        assert (min(lengths), max(lengths)) == (8, longest)
        assert all(len(body["prompt"]) + body["max_tokens"] <= context_length for body in bodies)


EVENTS = [
    b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}]}\n\n',
    b'data: {"choices": [{"te',
    b'xt": "c"}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n',
]


@asynccontextmanager
async def answering(handle: Handler) -> AsyncIterator[str]:
    """Give the URL of a server that answers as `handle` does."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _take_request(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each request of a connection with EVENTS, in chunks."""
    while True:
        try:
            await _take_request(reader)
        except asyncio.IncompleteReadError:
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in EVENTS:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        writer.write(b"0\r\n\r\n")


def test_clients_count_the_tokens_and_the_times_between_events() -> None:
    """Events may come together or in parts; each text has one first event and a time between each two."""

    async def run() -> None:
        async with answering(_answer) as url:
            answers = await send_all(url, [{"prompt": [1]}] * 5, streams=2)
        assert (answers.tokens, len(answers.first), len(answers.between), answers.retries) == (15, 5, 10, 0)
        assert all(seconds > 0 for seconds in answers.first)

    asyncio.run(run())


def test_clients_try_once_more_where_a_connection_is_closed() -> None:
    """llama.cpp's server closes some that it has promised to keep; one that closes twice is an error."""

    async def run(closing: int) -> int:
        closed = 0

        async def close_some(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal closed
            if closed < closing:
                closed += 1
                await _take_request(reader)
                writer.close()
            else:
                await _answer(reader, writer)

        async with answering(close_some) as url:
            return (await send_all(url, [{"prompt": [1]}], streams=1)).retries

    assert asyncio.run(run(1)) == 1
    with pytest.raises(ConnectionError, match="closed before the answer was complete"):
        asyncio.run(run(2))


def test_an_answer_that_is_an_error_ends_the_benchmark() -> None:
    """A rate of refusals would look fast."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _take_request(reader)
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy")

    async def run() -> None:
        async with answering(refuse) as url:
            await send_all(url, [{"prompt": [1]}], streams=1)

    with pytest.raises(ValueError, match=r"expected a text, found http/1\.1 429 too many requests busy"):
        asyncio.run(run())


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The end of its stderr is in the message."""
    command = our_command(tmp_path / "no-run", {"threads": 1, "engine.reproducible": True, "device": None})
    assert command[-2:] == ["--threads=1", "--engine.reproducible=true"]
    with (
        pytest.raises(ValueError, match=r"(?s)ours: the server did not start .exit code 2.: .*no-run"),
        _start(command, tmp_path),
    ):
        pass


def _start(command: Sequence[str], folder: Path) -> Any:
    return started(command, folder, name="ours")


def test_the_share_of_the_choice_is_that_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a server's whole life are subtracted."""
    looks = iter([{"choice": 2.0, "step": 10.0}, {"choice": 3.0, "step": 20.0}])
    monkeypatch.setattr(
        Server,
        "metrics",
        lambda self: {f"transformerlm_{name}_seconds_sum": value for name, value in next(looks).items()},
    )
    order: dict[str, Any] = {}

    def clients(asked: dict[str, Any]) -> dict[str, Any]:
        order.update(asked)
        return {"tokens": 10, "seconds": 2.0, "first": [0.5], "between": [0.25], "cpu_seconds": 0.01, "retries": 0}

    answers, _ = bench._of_server(Server("http://here", 1), clients, tells_steps=True)([{"prompt": [1]}], 4, 0.5)
    sample = bench._sample(answers, 0.5)
    assert order == {"url": "http://here", "streams": 4, "requests": [{"prompt": [1]}], "apart": 0.5}
    assert sample["choice_share_of_step"] == pytest.approx(0.1)
    assert (sample["tokens_per_second"], sample["cpu_ms_per_token"]) == (5.0, 50.0)
    assert sample["time_to_first_token_ms.p99"] == 500.0
    assert sample["client_cpu_ms_per_token"] == pytest.approx(1.0)


def test_gaps_are_between_tokens_where_clients_begin_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """There ours is asked for ids, so that a token that ends within a character has an event; nobody else is."""
    config = BenchServeConfig.model_validate({"checkpoint": "run", "measure": {"warmup": 0, "repeats": 1}})
    asked: dict[tuple[str, float], bool] = {}

    def candidate(name: str) -> bench._SendAll:
        def send_all(bodies: list[dict[str, Any]], streams: int, apart: float) -> tuple[dict[str, Any], None]:
            asked[name, apart] = all(body.get("return_token_ids") for body in bodies)
            return {"tokens": 1, "seconds": 1.0, "first": [0.5], "between": [0.25], "retries": 0}, None

        return send_all

    for apart in (0.0, 0.025):
        candidates = {name: candidate(name) for name in (bench.OURS, "llama_cpp")}
        bench._bench_case(config, candidates, Report("serve", {}), 2, bench._Texts(config, [1], 99), apart=apart)
    assert asked == {(name, at): name == bench.OURS and at > 0 for name, at in asked}
    assert len(asked) == 4
    assert "25 ms apart" in capsys.readouterr().err


def test_no_case_asks_again_for_a_prompt_of_another() -> None:
    """Its keys and values would be in the prefix cache; all candidates are asked for the same."""
    config = BenchServeConfig.model_validate({"checkpoint": "run", "measure": {"warmup": 1, "repeats": 2}})
    asked: dict[str, list[tuple[int, ...]]] = {bench.OURS: [], "llama_cpp": []}

    def candidate(name: str) -> bench._SendAll:
        def send_all(bodies: list[dict[str, Any]], streams: int, apart: float) -> tuple[dict[str, Any], None]:
            asked[name] += [tuple(body["prompt"]) for body in bodies]
            return {"tokens": 1, "seconds": 1.0, "first": [0.5], "between": [0.25], "retries": 0}, None

        return send_all

    texts = bench._Texts(config, range(1000), 200, longest=120)
    for count, apart in ((4, 0.0), (8, 0.0), (8, 0.025)):
        candidates = {name: candidate(name) for name in asked}
        bench._bench_case(config, candidates, Report("serve", {}), 4, texts, count=count, apart=apart)
    assert len(set(asked[bench.OURS])) == len(asked[bench.OURS]) == 3 * (4 + 8 + 8)
    assert asked["llama_cpp"] == asked[bench.OURS]


@pytest.mark.slow
def test_lines_of_a_small_run(serve_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, one after the other, and llama.cpp where it is installed, each measure every quantity."""
    sizes = ["--streams=[1, 3]", "--prompt_length=2", "--max_new_tokens=8", "--texts_per_stream=1", "--threads=1"]
    rounds = ["--measure.warmup=0", "--measure.repeats=2"]
    lines, stderr = run_command(bench.main, [f"--checkpoint={serve_run}", *sizes, *rounds, "--mixed=false"], capsys)
    names = {"transformerlm", "sequential"} | ({"llama_cpp"} if is_installed("xllamacpp") else set())
    for streams in (1, 3):
        found = {(line["quantity"], line["candidate"]) for line in lines if line["params.streams"] == streams}
        for quantity in ("tokens_per_second", "time_to_first_token_ms.p99", "time_between_tokens_ms.p50"):
            assert {name for one, name in found if one == quantity} == names
        assert ("choice_share_of_step", "transformerlm") in found
    assert "3 clients, lengths equal" in stderr
    bursts = {
        (line["params.streams"], line["params.texts"], line.get("params.apart_ms", 0), line["candidate"])
        for line in lines
        if line["params.lengths"] == "mixed to 120"
    }
    cases = ((1, 16, 0), (3, 3, 0), (3, 6, 0), (3, 6, 25))
    assert bursts == {(*case, name) for case in cases for name in names - {"sequential"}}
    assert json.dumps(lines)


@pytest.mark.slow
def test_its_servers_end_with_it(serve_run: Path, tmp_path: Path) -> None:
    """SIGTERM while it measures: the server that it has started ends too."""
    sizes = ["--streams=1", "--prompt_length=2", "--max_new_tokens=8", "--threads=1", "--peers=sequential"]
    command = [sys.executable, "-m", "benchmarking.bench_serve", f"--checkpoint={serve_run}", *sizes]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def urls() -> list[str]:
        lines = [line for path in tmp_path.rglob("*.out") for line in path.read_text().splitlines()]
        return [json.loads(line)["url"] for line in lines if '"url"' in line]

    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as bench:
        wait_until(lambda: urls() or bench.poll() is not None)
        (url,) = urls()
        bench.terminate()
        assert bench.wait(60) == 143
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


@pytest.fixture(scope="module")
def serve_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a tiny model."""
    from tests.serving.helpers import tiny_checkpoint
    from tests.training.tiny_run import write_tiny_files

    folder = tmp_path_factory.mktemp("bench-serve")
    tiny_checkpoint(folder / "run", write_tiny_files(folder))
    return folder / "run"
