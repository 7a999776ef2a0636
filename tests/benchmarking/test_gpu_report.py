"""The section of the docs that the suite's results fill, one for each kind of GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarking import gpu_report

PAGE = f"# Page\n\n### GPU\n\n{gpu_report.BEGIN}\n{gpu_report.NOT_MEASURED}\n{gpu_report.END}\n\nafter\n"


def write_results(folder: Path, *, device: str = "H100", tiny: bool = False, speed: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"kind": "suite", "date": "2026-01-02", "arguments": {"device": "cuda", "tiny": tiny}},
        {"kind": "environment", "device_name": device, "torch": "2.11", "part": "environment"},
        {"kind": "row", "part": "gpt2", "table": "Speed", "cells": {"candidate": "ours", "tokens_per_second": speed}},
        {"kind": "check", "part": "gpt2", "what": "it is right", "held": False, "found": "it was wrong"},
        {"kind": "part", "part": "gpt2", "status": "done", "seconds": 12.0, "why": ""},
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def fill(page: Path, folder: Path) -> str:
    gpu_report.main([str(folder), "--docs", str(page)])
    return page.read_text()


def test_results_take_the_place_of_not_yet_measured(tmp_path: Path) -> None:
    """The rest of the page stays; the section says what did not hold."""
    (tmp_path / "page.md").write_text(PAGE)
    text = fill(tmp_path / "page.md", write_results(tmp_path / "out"))
    assert gpu_report.NOT_MEASURED not in text
    assert text.startswith("# Page\n\n### GPU\n")
    assert text.endswith("\n\nafter\n")
    assert "#### H100\n" in text
    assert "- gpt2: it is right (it was wrong)" in text
    assert "##### Speed\n\n| candidate | tokens per second |\n| --- | --- |\n| ours | 1 |" in text


def test_each_kind_of_gpu_has_one_section(tmp_path: Path) -> None:
    """A second run on the same kind replaces the first; another kind's section stays; writing twice changes nothing."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    fill(page, write_results(tmp_path / "a", speed=11.0))
    fill(page, write_results(tmp_path / "b", device="A100", speed=22.0))
    text = fill(page, write_results(tmp_path / "c", speed=33.0))
    assert (text.count("#### H100\n"), text.count("#### A100\n")) == (1, 1)
    assert "| ours | 11 |" not in text
    assert "| ours | 22 |" in text
    assert "| ours | 33 |" in text
    assert fill(page, tmp_path / "c") == text


@pytest.mark.parametrize(("tiny", "device"), [(True, "H100"), (False, "unknown")])
def test_toys_do_not_get_into_the_docs(
    tiny: bool, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their numbers mean nothing: exit code 2, and the page stays."""
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(SystemExit, match="2"):
        fill(tmp_path / "page.md", write_results(tmp_path / "out", tiny=tiny, device=device))
    assert "expected results of a GPU at full size" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == PAGE


@pytest.mark.parametrize(
    ("results", "page", "message"),
    [
        (None, PAGE, "no such file; expected a folder that benchmarking.gpu_suite wrote"),
        ("", PAGE, "expected lines of JSON, found none"),
        ("[1]\nnot json\n", PAGE, "expected lines of JSON, found none"),
    ],
)
def test_what_cannot_be_read_is_refused(
    results: str | None, page: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2."""
    (tmp_path / "page.md").write_text(page)
    if results is not None:
        (tmp_path / "results.jsonl").write_text(results)
    with pytest.raises(SystemExit, match="2"):
        fill(tmp_path / "page.md", tmp_path)
    assert message in capsys.readouterr().err


def test_a_page_without_a_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the two comments that the results belong between."""
    (tmp_path / "page.md").write_text("# Page\n")
    with pytest.raises(SystemExit, match="2"):
        fill(tmp_path / "page.md", write_results(tmp_path / "out"))
    assert gpu_report.BEGIN in capsys.readouterr().err


def test_the_docs_have_the_place() -> None:
    """docs/benchmarks.md has the place for results of any GPU."""
    page = gpu_report.DOCS.read_text()
    assert page.index(gpu_report.BEGIN) < page.index(gpu_report.END)
