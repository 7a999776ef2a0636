"""Models and tokenizers in the forms of other tools that lie; nothing of another library is asked about them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.corpus import DEEP, Good, Payload, case, read_safetensors, write_safetensors
from transformerlm.interop.hf_export import write_hf


def import_case(name: str, blames: str) -> Callable[[Callable[[Path, Path], Any]], None]:
    """Put a change of a Hugging Face directory into the corpus; it gets the directory and the folder around it."""

    def register(change: Callable[[Path, Path], Any]) -> None:
        @case(f"import: {name}", "import_", blames)
        def _(home: Path, good: Good) -> list[str]:
            write_hf(good.checkpoint, home / "model", verify=False)
            change(home / "model", home)
            return [f"--source={home / 'model'}", f"--output={home / 'run'}", "--verify=false"]

    return register


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


for key, value in (
    ("vocab_size", 2**31),
    ("num_hidden_layers", 4096),
    ("num_hidden_layers", 2**60),
    ("hidden_size", 2**20),
    ("intermediate_size", 2**22),
    ("max_position_embeddings", 2**24),
    ("num_attention_heads", 0),
    ("rope_theta", "1"),
    ("rms_norm_eps", -1),
    ("tie_word_embeddings", "yes"),
    ("rope_scaling", {"factor": 2}),
):

    @import_case(f"{key} = {value}", "model")
    def _(model: Path, home: Path, key: str = key, value: Any = value) -> None:
        change_json(model / "config.json", **{key: value})


for text in ("", "[]", DEEP, '{"model_type": "llama", "model_type": "llama"}', "{" + " " * (2 << 20) + "}"):

    @import_case(f"config.json is {text[:20].strip()!r} of {len(text)}", "config.json")
    def _(model: Path, home: Path, text: str = text) -> None:
        (model / "config.json").write_text(text)


@import_case("weights are a pickle", "model.safetensors")
def _(model: Path, home: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(home / "code-has-run")))


@import_case("a pickle under the name of weights", "model.safetensors")
def _(model: Path, home: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(home / "code-has-run")))


@import_case("a header longer than the file", "model.safetensors")
def _(model: Path, home: Path) -> None:
    header, data = read_safetensors(model / "model.safetensors")
    write_safetensors(model / "model.safetensors", header, data, length=2**62)


@import_case("a shape larger than the file", "model.safetensors")
def _(model: Path, home: Path) -> None:
    header, data = read_safetensors(model / "model.safetensors")
    header["model.norm.weight"]["shape"] = [2**40]
    write_safetensors(model / "model.safetensors", header, data)


@import_case("weights that were cut", "model.safetensors")
def _(model: Path, home: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-7])


@import_case("a link out of the directory", "config.json")
def _(model: Path, home: Path) -> None:
    (model / "config.json").rename(home / "config.json")
    (model / "config.json").symlink_to(home / "config.json")


@import_case("a link to itself", "model.safetensors")
def _(model: Path, home: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")


for name in ("../../../../etc/passwd", "/etc/passwd", "x" * 100_000, "no-such-file.safetensors", ["x"]):

    @import_case(f"an index that names {str(name)[:30]}", "safetensors")
    def _(model: Path, home: Path, name: Any = name) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


for text in ("", DEEP, "{}", '{"model": {"vocab": 1, "merges": []}}', '{"model": {"type": "BPE", "vocab": {}}}'):

    @import_case(f"tokenizer.json is {text[:20]!r} of {len(text)}", "tokenizer.json")
    def _(model: Path, home: Path, text: str = text) -> None:
        (model / "tokenizer.json").write_text(text)


@case("import: a token of 100 kB in ranks", "import_", "ranks")
def _(home: Path, good: Good) -> list[str]:
    (home / "ranks").write_bytes(b"QUFB" * 33_000 + b" 0\n")
    return [
        f"--source={home / 'ranks'}",
        "--format=tiktoken",
        "--pattern=gpt2",
        f"--output={home / 'out'}",
        "--verify=false",
    ]


@case("import: ranks that are no text", "import_", "ranks")
def _(home: Path, good: Good) -> list[str]:
    (home / "ranks").write_bytes(bytes(range(256)) * 100)
    return [
        f"--source={home / 'ranks'}",
        "--format=tiktoken",
        "--pattern=gpt2",
        f"--output={home / 'out'}",
        "--verify=false",
    ]
