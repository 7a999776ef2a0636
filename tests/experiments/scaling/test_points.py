"""Points from a CSV file, and points by their budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.experiments.scaling.laws import drawn
from transformerlm.experiments.scaling.points import read_points


def write(tmp_path: Path, text: str) -> Path:
    """Write a CSV file, and return its path."""
    path = tmp_path / "points.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_by_their_names(tmp_path: Path) -> None:
    """In any order and case; others are ignored, empty lines and a byte order mark, too."""
    path = write(tmp_path, "\ufeffcolour,Loss,Tokens,PARAMETERS,name\nred,2.5,1e9,1e7,a\n\nblue,3,2e8,5e6,\n")
    points = read_points(path)
    assert points.names.tolist() == ["a", "run 2"]
    assert points.losses.tolist() == [2.5, 3.0]
    assert points.tokens.tolist() == [1e9, 2e8]
    np.testing.assert_allclose(points.flops, [6e16, 6e15])
    assert points.without_embeddings() is None


def test_tokens_follow_from_flops(tmp_path: Path) -> None:
    """The names of the extracted Chinchilla points are read, and D = C / 6 N."""
    points = read_points(write(tmp_path, "Model Size,Training FLOP,loss\n1e7,6e17,2.5\n"))
    assert points.tokens == pytest.approx([1e10])
    assert points.flops.tolist() == [6e17]


def test_parameters_without_embeddings(tmp_path: Path) -> None:
    """They are the sizes of another set of points; all else stays."""
    points = read_points(write(tmp_path, "n,d,loss,parameters_without_embeddings,seconds\n100,7,2,60,9\n"))
    body = points.without_embeddings()
    assert body is not None
    assert (body.parameters.tolist(), body.flops.tolist(), body.seconds.tolist()) == ([60.0], [4200.0], [9.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the columns parameters, loss, and tokens or flops; found none"),
        ("parameters,loss\n1,2\n", "found parameters, loss"),
        ("parameters,loss,tokens\n", "expected a line for each run"),
        ("parameters,loss,tokens\n1,2,3\n1,2,x\n", "run 2, column 3: expected a positive number, found 'x'"),
        ("parameters,loss,tokens\n1,-2,3\n", "expected a positive number, found '-2'"),
        ("parameters,loss,tokens\n1,nan,3\n", "found 'nan'"),
        ("parameters,loss,tokens\n1,inf,3\n", "found 'inf'"),
        ("parameters,loss,tokens\n1,2\n", "found ''"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    """The file, the run and the column."""
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{path}: ") as caught:
        read_points(path)
    assert words in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Bytes that no encoding reads end in one line."""
    path = tmp_path / "points.csv"
    path.write_bytes(b"parameters\xff\xfe,loss,tokens\n")
    with pytest.raises(ValueError, match="expected a CSV file in UTF-8"):
        read_points(path)


def test_the_highest_losses_can_be_dropped() -> None:
    """The order of the others stays."""
    points = drawn(noise=0.01)
    left = points.without_highest(5)
    assert len(left) == 20
    assert left.losses.max() < np.sort(points.losses)[-5]
    assert left.names.tolist() == [name for name in points.names if name in set(left.names)]


def test_budgets_are_points_of_about_equal_flops() -> None:
    """Isoflop runs whose steps were rounded share a number; a grid's budgets ascend."""
    points = drawn(3, 3)
    numbers = points.budgets()
    assert numbers[np.argsort(points.flops, kind="stable")].tolist() == sorted(numbers.tolist())
    flops = np.array([1.0, 1.04, 0.99, 3.0, 2.9, 9.0]) * 1e15
    assert points.where(np.arange(6)).__class__(
        **{
            **{name: np.ones(6) for name in ("names", "parameters", "tokens", "losses", "body", "seconds")},
            "flops": flops,
        }
    ).budgets().tolist() == [0, 0, 0, 1, 1, 2]
