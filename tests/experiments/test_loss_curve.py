"""The loss curve as a PNG with matplotlib and as an SVG without: the same points, all inside the frame."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformerlm.experiments import loss_curve
from transformerlm.experiments.loss_curve import (
    HEIGHT,
    MARGIN,
    MEAN_COLOR,
    STEP_COLOR,
    VALID_COLOR,
    WIDTH,
    read_loss_curve,
    round_numbers,
    running_mean,
    save_loss_curve,
    save_png,
    save_svg,
)

SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder: Path, losses: list[Any], valid: dict[int, float] | None = None, *, first: int = 1) -> Path:
    """Write a run with these losses, events among its lines, and return its directory."""
    records: list[dict[str, Any]] = [{"event": "started", "step": 0}]
    for step, loss in enumerate(losses, start=first):
        record = {"step": step, "metrics.loss": loss}
        records.append(record | ({"metrics.val_loss": valid[step]} if valid and step in valid else {}))
    run = folder / "first & last"
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    return run


def lines_of(picture: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the points of an SVG's lines by their colors."""
    lines = ElementTree.parse(picture).getroot().iter(f"{SVG}polyline")
    return {
        str(line.get("stroke")): [
            (float(x), float(y)) for x, y in (p.split(",") for p in str(line.get("points")).split())
        ]
        for line in lines
    }


def words_of(picture: Path) -> set[str]:
    """Return the words of an SVG."""
    return {str(text.text) for text in ElementTree.parse(picture).getroot().iter(f"{SVG}text")}


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make matplotlib look as if it were not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_png_has_the_documented_size(tmp_path: Path) -> None:
    """If matplotlib is installed, the picture is a PNG; a title may hold what matplotlib would read as a formula."""
    run = write_run(tmp_path, [5.0, 4.0, 3.5], {2: 4.2, 3: 3.9})
    run = run.rename(tmp_path / "$x_1$ 実験")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a sign that no font has is not worth a line to a user
        picture = save_loss_curve(run, tmp_path / "loss.png")
    data = picture.read_bytes()
    assert picture == tmp_path / "loss.png"
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (WIDTH, HEIGHT)


def test_an_svg_without_matplotlib(tmp_path: Path, without_matplotlib: None) -> None:
    """Otherwise it is a well-formed SVG with its words and both lines inside its frame, falling as the losses do."""
    picture = save_loss_curve(write_run(tmp_path, [5.0, 4.0, 3.5], {2: 4.2, 3: 3.9}), tmp_path / "loss.png")
    assert picture == tmp_path / "loss.svg"
    lines = lines_of(picture)
    assert set(lines) == {MEAN_COLOR, VALID_COLOR}
    for places in lines.values():
        assert all(MARGIN <= x <= WIDTH - MARGIN and MARGIN <= y <= HEIGHT - MARGIN for x, y in places)
        assert places == sorted(places)  # to the right and, as the loss falls, down the page
    title = {"first & last", "loss (nats per token)", "step", "training 3.500", "validation 3.900"}
    assert title | {"3.5", "4", "4.5", "5", "1", "2", "3"} <= words_of(picture)


def test_the_suffix_decides(tmp_path: Path) -> None:
    """An SVG that is asked for needs no matplotlib, even if it is installed."""
    picture = save_loss_curve(write_run(tmp_path, [5.0, 4.0]), tmp_path / "loss.svg")
    assert picture == tmp_path / "loss.svg"
    assert lines_of(picture)


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize(
    "losses",
    [[2.0, 2.0], [0.0, 0.0], [1.0, 0.0, -1.0], [1e-9, 1e9], [5e-324, 1.0]],
    ids=["flat", "0", "-1", "wide", "tiny"],
)
def test_any_losses_can_be_drawn(losses: list[float], suffix: str, tmp_path: Path) -> None:
    """Equal losses, zero, negative ones and a range of many powers of ten divide by nothing and have ticks."""
    curve = read_loss_curve(write_run(tmp_path, losses))
    save = save_png if suffix == "png" else save_svg
    picture = save(curve, tmp_path / f"loss.{suffix}")
    assert picture.stat().st_size > 500
    if suffix == "svg":
        (places,) = lines_of(picture).values()
        assert all(MARGIN - 1 <= x <= WIDTH - MARGIN + 1 for x, _ in places)
        assert all(MARGIN - 1 <= y <= HEIGHT - MARGIN + 1 for _, y in places)
    assert 2 <= len(loss_curve.Axes.of(curve).y_ticks()) <= 14


def test_a_broken_record_is_drawn_as_far_as_it_says_something(tmp_path: Path) -> None:
    """Words for numbers, torn lines and steps that were made again spoil nothing: each step counts once, the last."""
    run = write_run(tmp_path, [5.0, "nan", 4.0, 9.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "metr\n')
    write_run(tmp_path, [3.0, "inf"], {4: 4.5}, first=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "metrics.loss": 1.')
    curve = read_loss_curve(run)
    assert list(zip(curve.steps.steps, curve.steps.values, strict=True)) == [(1, 5.0), (3, 4.0), (4, 3.0)]
    assert list(zip(curve.valid.steps, curve.valid.values, strict=True)) == [(4, 4.5)]


@pytest.mark.parametrize("losses", [[2.0], [2.0, "nan"], []])
def test_a_run_that_is_too_short_is_refused(losses: list[Any], tmp_path: Path) -> None:
    """One point is not a curve."""
    with pytest.raises(ValueError, match=r"at least two steps with a loss, found [01]"):
        save_loss_curve(write_run(tmp_path, losses), tmp_path / "loss.svg")


def test_a_long_run_has_a_small_picture_with_every_spike(tmp_path: Path) -> None:
    """About one point a column is drawn, the first, the last and the one that is far above all others included."""
    losses = [5.0 - step / 10_000 for step in range(10_000)]
    losses[6_789] = 50.0
    picture = save_loss_curve(write_run(tmp_path, losses), tmp_path / "loss.svg")
    lines = lines_of(picture)
    assert set(lines) == {STEP_COLOR, MEAN_COLOR}
    for places in lines.values():
        assert WIDTH / 2 < len(places) < 2 * WIDTH
        assert (places[0][0], places[-1][0]) == (MARGIN + 0.1, WIDTH - MARGIN)
    x, y = min(lines[STEP_COLOR], key=lambda place: place[1])
    assert x == pytest.approx(MARGIN + 0.679 * (WIDTH - 2 * MARGIN), abs=0.1)
    assert y < MARGIN + 10
    assert picture.stat().st_size < 50_000


def test_the_best_validation_is_named_if_it_is_not_the_last(tmp_path: Path) -> None:
    """A rise shows in words, too."""
    picture = save_loss_curve(write_run(tmp_path, [5.0, 4.0, 3.5], {1: 4.0, 2: 3.0, 3: 4.25}), tmp_path / "loss.svg")
    assert "validation 4.250, lowest 3.000 at step 2" in words_of(picture)


def test_a_picture_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the earlier picture as it was."""
    run = write_run(tmp_path, [5.0, 4.0])
    before = save_loss_curve(run, tmp_path / "loss.svg").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left.*loss\.svg"):
        save_loss_curve(write_run(tmp_path, [1.0, 1.0]), tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first & last", "loss.svg"]


def test_the_running_mean_is_the_mean_of_the_neighbours() -> None:
    """Inside it has its whole width; at the beginning it is the first value, at the end the mean of the last half."""
    values = np.random.default_rng(0).normal(size=50)
    mean = running_mean(values, 10)
    assert mean.shape == values.shape
    assert mean[0] == pytest.approx(values[0])
    assert mean[2] == pytest.approx(values[:5].mean())
    assert mean[20] == pytest.approx(values[15:26].mean())
    assert mean[-1] == pytest.approx(values[-6:].mean())
    assert running_mean(values, 0) == pytest.approx(values)


@pytest.mark.parametrize(("low", "high"), [(0, 12), (0, 1), (1.93, 2.07), (0, 100_000), (-3, 1e-3), (2.0, 2.0001)])
def test_round_numbers_are_few_and_between_the_ends(low: float, high: float) -> None:
    """Three to seven multiples of 1, 2 or 5 times a power of ten."""
    ticks = round_numbers(low, high, 6)
    assert 3 <= len(ticks) <= 7
    step = ticks[1] - ticks[0]
    assert np.diff(ticks) == pytest.approx(step)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-6)) in (1, 2, 5)
    assert low - 1e-9 * step <= ticks[0] <= ticks[-1] <= high + 1e-9 * step
