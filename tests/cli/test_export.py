"""`transformerlm-export`: a trained run opens in other tools, or one line says why not."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import call
from transformerlm.interop.tokenizer_json import from_file
from transformerlm.tokenizer import Tokenizer


def test_a_run_is_exported_and_verified(pipeline, tmp_path):
    """The newest checkpoint of a run becomes a directory; one line on stderr says what was compared."""
    done = call("export", "--checkpoint", pipeline.run, "--output", tmp_path / "out")
    assert (done.code, done.stdout) == (0, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"{tmp_path / 'out'}: written; verified with transformers: the ids of ")
    assert "logits differ by" in line


@pytest.mark.parametrize("dtype", ["fp32", "q8_0"])
def test_a_run_is_exported_for_llama_cpp(dtype, pipeline, tmp_path):
    """There is one file, with the requested type of weights, even one that only this format has."""
    output = tmp_path / "out.gguf"
    done = call("export", "--checkpoint", pipeline.run, "--output", output, "--format", "gguf", "--dtype", dtype)
    assert (done.code, done.stdout) == (0, "")
    took, wrote, *hint = done.stderr.splitlines()
    assert took.startswith(f"{pipeline.run}: step 12, val loss ")
    assert wrote.startswith(f"{output}: written; verified with gguf: ")
    assert hint == [
        "# open it with Ollama",
        f"ollama create out -f {tmp_path / 'out.Modelfile'}",
        "# then write or chat with it",
        "ollama run out",
    ]
    assert output.read_bytes()[:4] == b"GGUF"


def test_a_run_is_exported_as_a_page(pipeline, tmp_path):
    """There is one file; its size and what was compared are said on stderr."""
    output = tmp_path / "out.html"
    done = call("export", "--checkpoint", pipeline.run, "--output", output, "--format", "html", "--license", "mit")
    assert (done.code, done.stdout) == (0, "")
    took, wrote = done.stderr.splitlines()
    assert took.startswith(f"{pipeline.run}: step 12, val loss ")
    assert re.fullmatch(rf"{output}: written; [\d.]+ MB; verified: \d+ arrays read back equal", wrote)
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("source", ["run", "tokenizer"])
@pytest.mark.parametrize(("form", "tool"), [("tokenizer_json", "tokenizers"), ("tiktoken", "tiktoken")])
def test_a_tokenizer_is_exported_alone(form, tool, source, pipeline, tmp_path):
    """From a run or from the tokenizer's own directory, with the tool's own check."""
    path = {"run": pipeline.run, "tokenizer": pipeline.files.tokenizer}[source]
    done = call("export", "--checkpoint", path, "--output", tmp_path / "out", "--format", form)
    assert done.code == 0
    assert f"written; verified with {tool}" in done.stderr
    if form == "tokenizer_json":
        ours = Tokenizer.from_directory(pipeline.files.tokenizer)
        assert from_file(tmp_path / "out").fingerprint() == ours.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint or run directory"),
        (["--format", "tokenizer_json", "--checkpoint", "nowhere"], "nowhere: no such checkpoint or run directory"),
        (["--output", "there"], "there: is there already; choose another output, or set overwrite = true"),
        (["--format", "tiktoken", "--output", "there", "--overwrite"], "there: expected a file to overwrite"),
        (["--dtype", "q8_0"], 'dtype: expected fp32, bf16 or fp16 for format "hf", found q8_0'),
        (["--format", "tiktoken", "--dtype", "bf16"], 'expected none for format "tiktoken", which has no weights'),
        (["--format", "gguf", "--license", "mit"], 'license: expected none for format "gguf", which has no card'),
        (["--format", "tiktoken", "--language", "en"], 'language: expected none for format "tiktoken"'),
        (["--format", "html", "--dtype", "bf16"], 'expected none for format "html", whose weights have 8 bits'),
        (["--format", "html", "--output", "there", "--overwrite"], "there: expected a file to overwrite"),
        (["--format", "gguf", "--max_shard_mb", "10"], 'max_shard_mb does nothing with format = "gguf"'),
        (["--license", "My own"], "--license: expected an identifier of the Hub, such as"),
        (["--language", "English"], "expected a code of ISO 639"),
        (["--format", "onnx"], '--format: expected one of "hf"'),
    ],
)
def test_bad_input_is_one_line(arguments, message, pipeline, tmp_path, monkeypatch):
    """The command exits with 2, says why, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    done = call("export", "--checkpoint", pipeline.run, "--output", "out", *arguments)
    assert (done.code, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_check_can_be_left_out(pipeline, tmp_path):
    """`verify = false` opens nothing and says so."""
    done = call("export", "--checkpoint", pipeline.run, "--output", tmp_path / "out", "--verify=false")
    assert done.stderr.endswith("written; not verified, as verify = false\n")


def test_the_card_shows_what_the_run_wrote_and_how_it_learned(pipeline, tmp_path):
    """The card has a sample with the run's settings, the same each time, the loss curve, and what the user set."""
    cards = []
    for name in ("a", "b"):
        arguments = ["--license", "cc-by-4.0", "--language", "en", "de", "--verify=false"]
        assert call("export", "--checkpoint", pipeline.run, "--output", tmp_path / name / "kids", *arguments).code == 0
        cards.append((tmp_path / name / "kids" / "README.md").read_text(encoding="utf-8"))
    assert cards[0] == cards[1]
    assert 'license: "cc-by-4.0"\nlanguage:\n- "en"\n- "de"\n' in cards[0]
    assert "with temperature = 0.8, top_p = 0.95, seed = 0:\n\n```text\n" in cards[0]
    picture = cards[0].split("](")[1].split(")")[0]
    assert (tmp_path / "a" / "kids" / picture).stat().st_size > 1000


def test_a_checkpoint_without_its_run_has_no_curve(pipeline, tmp_path):
    """The card shows only what exists: a checkpoint that was copied elsewhere has a sample but no picture."""
    checkpoint = next(path for path in (pipeline.run / "checkpoints").iterdir() if path.name.startswith("step-"))
    shutil.copytree(checkpoint, tmp_path / "copies" / checkpoint.name)
    done = call("export", "--checkpoint", tmp_path / "copies" / checkpoint.name, "--output", tmp_path / "out")
    assert done.code == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## A sample" in card
    assert "## Loss" not in card
    assert not list((tmp_path / "out").glob("loss.*"))


def test_a_checkpoint_beside_which_nothing_is_can_be_exported(pipeline, tmp_path, monkeypatch):
    """Its name alone is its path; a run one folder up is another one's."""
    checkpoint = next(path for path in (pipeline.run / "checkpoints").iterdir() if path.name.startswith("step-"))
    shutil.copytree(checkpoint, tmp_path / "models/mine")
    shutil.copy(pipeline.run / "metrics.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path / "models")
    done = call("export", "--checkpoint=mine", "--output=out", "--verify=false")
    assert done.code == 0, done.stderr
    assert not list(Path("out").glob("loss.*"))


def test_the_next_commands_for_ollama_can_be_pasted(pipeline, tmp_path):
    """After a GGUF export one line names the Modelfile, quoted for the shell, and the last one runs the model."""
    output = tmp_path / "my models" / "First.gguf"
    done = call("export", "--checkpoint", pipeline.run, "--output", output, "--format", "gguf")
    *_, create, _, run = done.stderr.splitlines()
    command = shlex.split(create)
    assert run == "ollama run first"
    assert command == ["ollama", "create", "first", "-f", str(tmp_path / "my models" / "First.Modelfile")]
    assert Path(command[-1]).read_text().startswith("FROM ./First.gguf\n")
