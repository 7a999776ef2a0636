"""What 8 bits cost: the numbers agree with the plain model, and with a model that 8 bits hold exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarking import int8_price
from tests.inference.helpers import make_model, make_tokenizer
from transformerlm.checkpoints import directory, load
from transformerlm.inference.predictor import Predictor
from transformerlm.training.loss import cross_entropy

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 8


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Predictor:
    """A model and its tokenizer, which are in the checkpoint, whatever is asked for."""
    predictor = Predictor(make_model(), make_tokenizer())
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    monkeypatch.setattr(directory, "resolve", lambda _: tmp_path / "run")
    monkeypatch.setattr(load, "load_model", lambda _: predictor.model)
    monkeypatch.setattr(load, "load_tokenizer", lambda _: predictor.tokenizer)
    return predictor


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """Run the command on a text; return its line."""
    (folder / "text.txt").write_text(TEXT)
    int8_price.main(["run", str(folder / "text.txt"), "--windows=3", "--new_tokens=4"])
    return json.loads(capsys.readouterr().out)


def test_the_loss_is_the_model_s_own(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp32 it is that of the plain model on the same windows; in int8 it is near, and not the same."""
    line = run(tmp_path, capsys)
    size, ids = predictor.model.context_length, predictor.tokenizer.encode(TEXT)
    starts = [0, (len(ids) - size) // 2, len(ids) - size]
    windows = torch.tensor([ids[start : start + size] for start in starts])
    expected = cross_entropy(predictor.model(windows[:, :-1]), windows[:, 1:]).item()
    assert line["loss_fp32"] == pytest.approx(expected, rel=1e-5)
    assert line["predicted_tokens"] == 3 * (size - 1)
    assert line["loss_int8"] != line["loss_fp32"]
    assert line["loss_int8"] == pytest.approx(expected, rel=0.02)
    assert line["loss_int8_prompt"] == pytest.approx(expected, rel=0.02)
    assert line["loss_rises_percent"] == pytest.approx(100 * (line["loss_int8"] / line["loss_fp32"] - 1))
    assert len(line["greedy_parted_after"]) == line["greedy_texts"] == 3


def test_a_model_without_its_tokenizer_takes_ids(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that was imported without it; windows may be shorter than the context."""
    with_tokenizer = run(tmp_path, capsys)
    np.save(tmp_path / "ids.npy", np.array(predictor.tokenizer.encode(TEXT), np.uint16))
    (tmp_path / "run" / "tokenizer").rmdir()
    int8_price.main(["run", str(tmp_path / "ids.npy"), "--windows=3", "--new_tokens=4"])
    assert json.loads(capsys.readouterr().out)["loss_int8"] == with_tokenizer["loss_int8"]
    int8_price.main(["run", str(tmp_path / "ids.npy"), "--windows=5", "--length=6", "--new_tokens=1"])
    assert json.loads(capsys.readouterr().out)["predicted_tokens"] == 5 * 5
    with pytest.raises(SystemExit, match="2"):
        int8_price.main(["run", str(tmp_path / "text.txt")])
    assert "has no tokenizer: give a .npy file of ids instead of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.zeros((2, 2), np.int64), "expected integers of shape (ids), found int64 of shape (2, 2)"),
        (np.zeros(4), "found float64 of shape (4,)"),
        (np.array([0, 10**6]), "found 0 to 1000000"),
        (np.array([-1, 0]), "found -1 to 0"),
    ],
)
def test_what_are_no_ids_of_the_model_is_refused(
    ids: np.ndarray, expected: str, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what was found."""
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(SystemExit, match="2"):
        int8_price.main(["run", str(tmp_path / "ids.npy")])
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_text_of_one_token_is_refused(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be predicted of it: exit code 2, and a line that says what was expected."""
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(SystemExit, match="2"):
        int8_price.main(["run", str(tmp_path / "text.txt")])
    assert "expected a text of two tokens or more, and windows of as many, found 1" in capsys.readouterr().err
