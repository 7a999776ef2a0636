"""Which law runs can bear: what they cannot is refused, and the reason says what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experiments.scaling.laws import KNOWN, drawn, points_of
from transformerlm.experiments.scaling.points import Points
from transformerlm.experiments.scaling.support import choose_law, why_not_both


def repeated(points: Points, times: int) -> Points:
    """Return points with several seeds of each run."""
    return points_of(*(np.tile(each, times) for each in (points.parameters, points.tokens, points.losses)))


def test_a_grid_over_a_decade_bears_both() -> None:
    """Twelve runs, a factor of ten in sizes and in tokens: the least that will do."""
    points = drawn(4, 3, span=10)
    assert why_not_both(points) == ""
    assert choose_law(points).kind == "both"
    assert len(choose_law(points).points) == 12


def test_the_one_decade_set_is_refused() -> None:
    """Six models within a decade, each with tokens in proportion: no law at all, and the reason is said."""
    sizes = np.geomspace(26e6, 200e6, 6)
    points = points_of(sizes, 20 * sizes, KNOWN.loss(sizes, 20 * sizes))
    with pytest.raises(
        ValueError,
        match=r"needs 12 finished runs that differ in size or tokens, found 6; one of token counts alone needs 5",
    ):
        choose_law(points)
    with pytest.raises(ValueError, match="no law of both"):
        choose_law(points, "both")


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (drawn(3, 3), "needs 12 finished runs that differ in size or tokens, found 9"),
        (drawn(5, 5, span=9), "its sizes must span a factor of 10, found 9"),
        (drawn(2, 6), "its sizes must be 3 at least, found 2"),
        (drawn(6, 2), "its token counts must be 3 at least, found 2"),
        (repeated(drawn(3, 3), 2), "needs 12 finished runs that differ in size or tokens, found 9"),
    ],
    ids=["few", "narrow", "two sizes", "two token counts", "seeds"],
)
def test_what_is_missing_is_said(points, words) -> None:
    """Too few runs, and too narrow a range."""
    assert words in why_not_both(points)


def test_sizes_and_tokens_that_grow_together_are_refused() -> None:
    """A ladder of 20 tokens a parameter cannot say what lowers the loss, however many runs it has."""
    sizes = np.geomspace(1e6, 1e9, 15)
    points = points_of(sizes, 20 * sizes, KNOWN.loss(sizes, 20 * sizes))
    assert "grow together" in why_not_both(points)
    beside = points_of(sizes, sizes * np.tile([10.0, 20, 40], 5), np.ones(15))
    assert why_not_both(beside) == ""


def test_a_law_of_one_variable_takes_runs_that_share_the_other() -> None:
    """Two sizes, six token counts over a decade and a half: L(D) for one size alone."""
    points = drawn(2, 6, span=30)
    parameters = np.where(points.parameters > 5e6, 2e6, points.parameters)  # sizes within a decade
    choice = choose_law(points_of(parameters, points.tokens, points.losses))
    assert choice.kind == "tokens"
    assert len(choice.points) == 6
    assert len(set(choice.points.parameters)) == 1
    assert "sizes must span" in choice.reason
    swapped = choose_law(points_of(points.tokens, parameters, points.losses))
    assert (swapped.kind, len(set(swapped.points.tokens))) == ("parameters", 1)


def test_a_law_that_is_asked_for_is_taken_or_refused() -> None:
    """With runs for both, one of tokens alone can be had; with three sizes, one of sizes cannot."""
    assert choose_law(drawn(), "tokens").kind == "tokens"
    with pytest.raises(ValueError, match="one of sizes alone needs 5"):
        choose_law(drawn(4, 6), "parameters")
