"""The loss curve as a PNG with matplotlib and as an SVG without."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from cli.loss_curve import HEIGHT, MARGIN, TRAIN_COLOR, VALID_COLOR, WIDTH, read_losses, save_loss_curve

SVG = "{http://www.w3.org/2000/svg}"


def write_metrics(folder: Path, losses: list, valid: dict[int, float]) -> Path:
    """Write step lines with these losses, events among them, as a run does."""
    records: list[dict] = [{"event": "started", "step": 0}]
    for step, loss in enumerate(losses, start=1):
        record = {"step": step, "metrics.loss": loss}
        records.append(record | ({"metrics.val_loss": valid[step]} if step in valid else {}))
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def without_matplotlib(monkeypatch):
    """Make matplotlib look as if it were not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_events_and_numbers_that_are_not_finite_are_left_out(tmp_path):
    """Only step lines give points; a loss that was written as "nan" gives none."""
    path = write_metrics(tmp_path, [5.0, "nan", 4.0], {3: 4.5})
    assert read_losses(path) == ([(1, 5.0), (3, 4.0)], [(3, 4.5)])


def test_png_with_matplotlib(tmp_path):
    """If matplotlib is installed, the picture is a PNG of the documented size."""
    picture = save_loss_curve(write_metrics(tmp_path, [5.0, 4.0, 3.5], {2: 4.2, 3: 3.9}), tmp_path / "loss.png")
    data = picture.read_bytes()
    assert picture.name == "loss.png"
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (WIDTH, HEIGHT)


def test_svg_without_matplotlib(tmp_path, without_matplotlib):
    """Otherwise it is a well-formed SVG with its words and both lines inside its frame, falling as the losses do."""
    picture = save_loss_curve(write_metrics(tmp_path, [5.0, 4.0, 3.5], {2: 4.2, 3: 3.9}), tmp_path / "loss.png")
    assert picture.name == "loss.svg"
    root = ElementTree.parse(picture).getroot()
    assert root.tag == f"{SVG}svg"
    lines = {line.get("stroke"): line.get("points") for line in root.iter(f"{SVG}polyline")}
    assert set(lines) == {TRAIN_COLOR, VALID_COLOR}
    for points in lines.values():
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        assert all(MARGIN <= x <= WIDTH - MARGIN and MARGIN <= y <= HEIGHT - MARGIN for x, y in places)
        assert places == sorted(places)  # to the right and, as the loss falls, down the page
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"step", "training", "validation", "3.50", "5.00", "3"} <= words


def test_a_flat_curve_without_validation_can_be_drawn(tmp_path, without_matplotlib):
    """Equal losses do not divide by zero, and a run without validation has one line."""
    picture = save_loss_curve(write_metrics(tmp_path, [2.0, 2.0], {}), tmp_path / "loss.png")
    assert len(list(ElementTree.parse(picture).getroot().iter(f"{SVG}polyline"))) == 1


def test_a_run_that_is_too_short_is_refused(tmp_path):
    """One point is not a curve."""
    with pytest.raises(ValueError, match="at least two steps with a loss, found 1"):
        save_loss_curve(write_metrics(tmp_path, [2.0], {}), tmp_path / "loss.png")


def test_a_real_run_can_be_drawn(pipeline, tmp_path, without_matplotlib):
    """The file that training writes is the file that is read here."""
    train, valid = read_losses(pipeline.run / "metrics.jsonl")
    assert [step for step, _ in train] == list(range(1, 13))
    assert [step for step, _ in valid] == [4, 5, 8, 10, 12]
    assert save_loss_curve(pipeline.run / "metrics.jsonl", tmp_path / "loss.png").is_file()


def test_an_svg_that_is_asked_for_needs_no_matplotlib(tmp_path):
    """The suffix decides, even if matplotlib is installed: a run's end does not wait for its import."""
    picture = save_loss_curve(write_metrics(tmp_path, [5.0, 4.0], {}), tmp_path / "loss.svg")
    assert picture == tmp_path / "loss.svg"
    assert ElementTree.parse(picture).getroot().tag == f"{SVG}svg"


def test_a_long_run_has_a_small_picture(tmp_path):
    """For many steps, about one point a column is drawn, from the left end to the last step."""
    losses = [5.0 - step / 10_000 for step in range(10_000)]
    picture = save_loss_curve(write_metrics(tmp_path, losses, {}), tmp_path / "loss.svg")
    (line,) = ElementTree.parse(picture).getroot().iter(f"{SVG}polyline")
    places = [float(point.partition(",")[0]) for point in line.get("points").split()]
    assert WIDTH / 2 < len(places) < 2 * WIDTH
    assert places[-1] == WIDTH - MARGIN
    assert places[0] < MARGIN + 2
