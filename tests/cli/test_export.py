"""`transformerlm-export`: a trained run opens in other tools, or one line says why it does not."""

from __future__ import annotations

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
    """One file, with the type of weights that was asked for, also one that only this format has."""
    output = tmp_path / "out.gguf"
    done = call("export", "--checkpoint", pipeline.run, "--output", output, "--format", "gguf", "--dtype", dtype)
    assert (done.code, done.stdout) == (0, "")
    took, wrote = done.stderr.splitlines()
    assert took.startswith(f"{pipeline.run}: step 12, val loss ")
    assert wrote.startswith(f"{output}: written; verified with gguf: ")
    assert output.read_bytes()[:4] == b"GGUF"


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
        (["--format", "onnx"], '--format: expected one of "hf"'),
    ],
)
def test_bad_input_is_one_line(arguments, message, pipeline, tmp_path, monkeypatch):
    """Exit code 2, the reason, and nothing written."""
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
