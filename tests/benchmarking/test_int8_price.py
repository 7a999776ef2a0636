"""What 8 bits cost: the numbers agree with the plain model, and with a model that 8 bits hold exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarking import int8_price
from tests.inference.helpers import make_model, make_tokenizer
from transformerlm.inference.predictor import Predictor
from transformerlm.training.loss import cross_entropy

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 8


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A model that `from_checkpoint` returns, whatever it is asked for."""
    predictor = Predictor(make_model(), make_tokenizer())
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda *_, **__: predictor)
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


def test_a_text_of_one_token_is_refused(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be predicted of it: exit code 2, and a line that says what was expected."""
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(SystemExit, match="2"):
        int8_price.main(["run", str(tmp_path / "text.txt")])
    assert "expected a text of two tokens or more, found 1" in capsys.readouterr().err
