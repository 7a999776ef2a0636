"""The picture of the tokenizer benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarking.plot_tokenizer import main, read_panels


def line(candidate: str, median: float, **params: float) -> str:
    """Return a result line; ours has no speedup."""
    record = {"benchmark": "tokenizer", "quantity": "train_mb_per_second", "candidate": candidate, "median": median}
    record |= {"params.size_mb": 10, "params.vocab_size": 300, "params.threads": 1}
    record |= {f"params.{name}": value for name, value in params.items()}
    return json.dumps(record if candidate == "transformerlm" else record | {"speedup.median": 2.0})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    lines = [line("transformerlm", 70), line("tokenizers", 5), line("transformerlm", 60, size_mb=100)]
    lines += [line("rustbpe", 14, size_mb=100), line("rustbpe", 15, size_mb=100), line("gigabpe", 47, threads=2)]
    path.write_text("\n".join([*lines, json.dumps({"benchmark": "train", "quantity": "tokens_per_second"})]))
    return path


def test_the_largest_case_is_shown(results: Path) -> None:
    """Each candidate has its line with the most text, the last of equal ones; other benchmarks do not count."""
    panels = read_panels(results)
    medians = {key: {name: found["median"] for name, found in panel.items()} for key, panel in panels.items()}
    assert medians == {
        ("train_mb_per_second", 1): {"transformerlm": 60, "tokenizers": 5, "rustbpe": 15},
        ("train_mb_per_second", 2): {"gigabpe": 47},
    }


def test_a_picture_is_written(results: Path, tmp_path: Path) -> None:
    """The command writes a PNG of some size."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bars.png"
    main([str(results), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5_000


@pytest.mark.parametrize("text", ["", "no JSON", "{}"])
def test_a_file_without_results_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the file."""
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([str(path), str(tmp_path / "bars.png")])
    assert ended.value.code == 2
    assert "empty.jsonl" in capsys.readouterr().err.splitlines()[-1]
