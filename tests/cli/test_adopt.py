"""`transformerlm-adopt`: what another program tokenized is trained on here."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cli.commands import call
from transformerlm.token_files.dataset import TokenDataset


def test_a_raw_file_is_adopted_and_trained_on(pipeline, tmp_path):
    """Ids as nanoGPT writes them become a token file, with the counts on both streams, and a run takes it."""
    data = TokenDataset(pipeline.files.train)
    np.array(data.tokens).tofile(tmp_path / "train.bin")
    shared = ["--tokenizer", pipeline.files.tokenizer]
    done = call("adopt", "--input", tmp_path / "train.bin", "--output", tmp_path / "train.npy", *shared)
    assert done.code == 0, done.stderr
    counts = {"tokens": data.num_tokens, "bytes": data.num_bytes, "documents": data.num_documents}
    (record,) = done.records
    assert {key: record[key] for key in counts} == counts
    assert f"{data.num_tokens:,} tokens, {data.num_documents:,} documents" in done.stderr
    assert "it begins: '" in done.stderr
    settings = ["--runs_dir", tmp_path / "runs", "--data.train", tmp_path / "train.npy", "--training.max_steps=4"]
    done = call("train", "--config", pipeline.train_toml, *settings)
    assert done.code == 0, done.stderr


def test_a_file_without_separators_gets_a_warning(pipeline, tmp_path):
    """It may be one document, but most likely the separator or the tokenizer is another."""
    np.save(tmp_path / "ids.npy", np.full(100, 65, dtype=np.uint16))
    done = call("adopt", "--input", tmp_path / "ids.npy", "--tokenizer", pipeline.files.tokenizer)
    assert done.code == 0, done.stderr
    assert "warning: <|endoftext|> is nowhere in it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=ids.bin"], "output is required for a .bin"),
        (["--input=ids.txt"], 'input must end in .npy or .bin, found "ids.txt"'),
        (["--input=ids.npy", "--output=out.bin"], 'output must end in .npy, found "out.bin"'),
        (["--input=ids.npy", "--dtype=uint32"], "dtype = uint32 does nothing for a .npy"),
        (["--input=ids.npy"], "ids.npy: no such file"),
        (["--input=high.npy"], "high.npy: expected ids below"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, pipeline, tmp_path, monkeypatch):
    """Exit code 2, what was expected and what was found; the input is as it was, and nothing is beside it."""
    monkeypatch.chdir(tmp_path)
    np.save("high.npy", np.full(100, 65_000, dtype=np.uint16))
    done = call("adopt", *arguments, "--tokenizer", pipeline.files.tokenizer)
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["high.npy"]
