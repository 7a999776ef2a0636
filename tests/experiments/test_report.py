"""A report as a file: its policy, its data, its size, what it may replace, and runs that were cut off anywhere."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import random
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run
from transformerlm.experiments.history import read_history
from transformerlm.experiments.report import report_html, write_report

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


class Parts(html.parser.HTMLParser):
    """What is in a page: the text of each script and style, the policy, and each tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a tag."""
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.texts.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        """Keep the text of a script or a style."""
        if self.cdata_elem is not None:
            tag, attributes, text = self.texts[-1]
            self.texts[-1] = (tag, attributes, text + data)


def html_of(*runs: Path) -> str:
    """Return the report on runs."""
    return report_html([read_history(run) for run in runs], title=None, now=NOW)


def data_of(text: str) -> dict[str, Any]:
    """Return what a report holds."""
    (block,) = (data for _, attributes, data in Parts(text).texts if attributes.get("type") == "application/json")
    return dict(json.loads(block))


def a_run(folder: Path, name: str = "one", steps: int = 5) -> Path:
    """Write a run."""
    records = [STARTED, *(step(number, 3 - number / 100, lr=0.001) for number in range(1, steps + 1))]
    return write_run(folder, name, *records, validation(steps, 2.5), FINISHED | {"step": steps})


def test_only_what_is_in_it_may_run(tmp_path):
    """The policy allows nothing but the scripts and the style of the file, by their sha256, and names no host."""
    text = html_of(a_run(tmp_path))
    parts = Parts(text)
    (policy,) = (attributes["content"] for _, attributes in parts.tags if "http-equiv" in attributes)
    assert policy is not None
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert "unsafe" not in policy
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        own = [data for name, attributes, data in parts.texts if name == tag and "type" not in attributes]
        sums = [f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in own]
        assert allowed[kind].split() == sums, kind
    assert [tag for tag, attributes in parts.tags if attributes.keys() & {"src", "onload", "onclick", "style"}] == []
    assert {attributes["href"] for tag, attributes in parts.tags if "href" in attributes} == {"data:,"}
    assert re.findall(r"https?://(?!www\.w3\.org/)", text.replace("https://github.com/leeoniya/uPlot", "")) == []


def test_its_data_cannot_end_its_block(tmp_path):
    """No character of the data has a meaning in HTML, and what comes back is what was in the lines."""
    evil = "</script><!--<script>\u2028\x00\ud800&amp;"
    sample = {"event": "sample", "step": 1, "text.prompt": evil, "text.output": evil}
    text = html_of(write_run(tmp_path, "a", STARTED, step(1, 3.0), sample))
    block = text.partition('id="data">')[2].partition("</script>")[0]
    assert not set(block) & set("<>&\u2028\x00")
    assert block.isascii()
    assert data_of(text)["runs"][0]["samples"] == [[1, evil, evil]]


def test_an_older_report_is_replaced_and_nothing_else(tmp_path):
    """A second report takes the place of the first; a file that is no report, and a directory, stay as they are."""
    run, output = a_run(tmp_path), tmp_path / "report.html"
    assert write_report([read_history(run)], output, now=NOW) == output.stat().st_size
    write_report([read_history(run)], output, title="Another", now=NOW)
    assert data_of(output.read_text())["title"] == "Another"
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    with pytest.raises(ValueError, match=r"mine\.html: expected a new name or an older report"):
        write_report([read_history(run)], mine)
    with pytest.raises(ValueError, match="found a directory"):
        write_report([read_history(run)], tmp_path)
    with pytest.raises(ValueError, match="expected a file in a directory that is there"):
        write_report([read_history(run)], tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], output)
    assert mine.read_text() == "<p>mine"


def test_a_run_cut_off_anywhere_still_reports(tmp_path):
    """After a kill at any byte the whole lines before it are in the report, and the torn one is not."""
    run = a_run(tmp_path, steps=30)
    path, generator = run / "metrics.jsonl", random.Random(0)
    data = path.read_bytes()
    for _ in range(20):
        size = generator.randrange(len(data))
        path.write_bytes(data[:size])
        whole = [json.loads(line) for line in data[:size].split(b"\n")[:-1]]
        (found,) = data_of(html_of(run))["runs"]
        losses = {record["step"]: record["metrics.loss"] for record in whole if "metrics.loss" in record}
        assert found["curves"].get("loss", {"values": []})["values"] == list(losses.values())
        assert found["bad_lines"] == 0


def test_making_a_report_leaves_a_run_as_it_is(tmp_path):
    """No file of the run appears, goes or changes."""
    run = a_run(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    html_of(run)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_ten_long_runs_are_small(tmp_path):
    """Ten runs of 10,000 steps with noise in each number, checkpoints, samples and validations are below 2 MB."""
    generator = np.random.default_rng(0)
    for number in range(10):
        losses, norms, rates = generator.random((3, 10_000)).tolist()
        records: list[dict[str, Any]] = [STARTED]
        for at in range(1, 10_001):
            one = step(at, losses[at - 1] + 3, lr=0.001 * (1 - at / 10_001), grad_l2_norm=norms[at - 1])
            one |= {"metrics.tokens_per_second": 1000 * rates[at - 1], "time.elapsed_s": at * 0.1234567}
            if at % 100 == 0:
                one |= {"metrics.val_loss": losses[at - 1], "metrics.val_bits_per_byte": norms[at - 1]}
                records.append({"event": "checkpoint_saved", "step": at})
                records.append({"event": "sample", "step": at, "text.prompt": "Once", "text.output": "日本 " * 200})
            records.append(one)
        write_run(tmp_path, f"run-{number}", *records, FINISHED)
    text = html_of(*sorted(tmp_path.iterdir()))
    assert len(text.encode()) < 2_000_000
    for run in data_of(text)["runs"]:
        assert len(run["curves"]["val_loss"]["values"]) == 100
        assert sum(event["event"] == "checkpoint_saved" for event in run["events"]) == 100
        for curve in run["curves"].values():
            assert len(curve["steps"]) + len((curve["means"] or {"steps": []})["steps"]) <= 2000
