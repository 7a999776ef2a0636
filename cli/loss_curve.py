"""The loss curve of a run as a picture: a PNG if matplotlib is installed, else an SVG written here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 800, 450, 60
TRAIN_COLOR, VALID_COLOR = "#7aa6d8", "#d1495b"

Points = list[tuple[float, float]]


def save_loss_curve(metrics_path: Path, picture: Path) -> Path:
    """Draw the losses in a `metrics.jsonl` over the steps; return the picture's path, with its final suffix.

    A path that ends in `.svg` needs no matplotlib and takes no time.

    Raises:
        ValueError: the file holds fewer than two losses.
    """
    train, valid = read_losses(metrics_path)
    if len(train) < 2:
        raise ValueError(f"{metrics_path}: expected at least two steps with a loss, found {len(train)}")
    if picture.suffix == ".svg" or importlib.util.find_spec("matplotlib") is None:
        picture = picture.with_suffix(".svg")
        picture.write_text(_svg(_thinned(train), _thinned(valid)), encoding="utf-8")
    else:
        picture = picture.with_suffix(".png")
        _save_png(train, valid, picture)
    return picture


def read_losses(metrics_path: Path) -> tuple[Points, Points]:
    """Return the (step, loss) points of training and of validation."""
    records = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]

    def points(key: str) -> Points:
        return [(record["step"], record[key]) for record in records if isinstance(record.get(key), float)]

    return points("metrics.loss"), points("metrics.val_loss")


def _thinned(points: Points) -> Points:
    """Return at most about `WIDTH` of the points, including the last: nobody can see more."""
    return points[:: -max(1, round(len(points) / WIDTH))][::-1]


def _save_png(train: Points, valid: Points, picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color=TRAIN_COLOR, label="training")
    if valid:
        axes.plot(*zip(*valid, strict=True), color=VALID_COLOR, marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)


def _svg(train: Points, valid: Points) -> str:
    """Return the same picture as SVG: two polylines, four grid lines with their numbers, and the axes' names."""
    steps, losses = zip(*train, *valid, strict=True)
    lowest, highest, last = min(losses), max(losses), max(steps)
    span = (highest - lowest) or 1.0

    def place(step: float, loss: float) -> str:
        x = MARGIN + step / last * (WIDTH - 2 * MARGIN)
        return f"{x:.1f},{HEIGHT - MARGIN - (loss - lowest) / span * (HEIGHT - 2 * MARGIN):.1f}"

    def line(points: Points, color: str) -> str:
        path = " ".join(place(*point) for point in points)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'

    def text(x: float, y: float, words: str, color: str = "#333", anchor: str = "middle") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}">{words}</text>'

    grid = []
    for part in range(5):
        y = HEIGHT - MARGIN - part / 4 * (HEIGHT - 2 * MARGIN)
        grid.append(f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{WIDTH - MARGIN}" y2="{y:.1f}" stroke="#ddd"/>')
        grid.append(text(MARGIN - 8, y + 4, f"{lowest + part / 4 * span:.2f}", anchor="end"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
            'font-size="13">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *grid,
            line(train, TRAIN_COLOR),
            line(valid, VALID_COLOR) if valid else "",
            text(MARGIN, HEIGHT - MARGIN + 20, "0"),
            text(WIDTH - MARGIN, HEIGHT - MARGIN + 20, f"{last:,}"),
            text(WIDTH / 2, HEIGHT - 15, "step"),
            text(MARGIN, MARGIN - 20, "loss (nats per token)", anchor="start"),
            text(WIDTH - MARGIN, MARGIN - 36, "training", TRAIN_COLOR, "end"),
            text(WIDTH - MARGIN, MARGIN - 18, "validation", VALID_COLOR, "end"),
            "</svg>\n",
        ]
    )
