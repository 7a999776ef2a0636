"""Groups, places and pairs of runs."""

from __future__ import annotations

import pytest

from tests.experiments.runs import STARTED, step, validation, write_run
from transformerlm.experiments.compare import NATS, compare_runs, group_runs, value_at
from transformerlm.experiments.compare_tables import title
from transformerlm.experiments.history import read_history
from transformerlm.experiments.statistics import paired_difference

FACTS = {"tokenizer_sha256": "a", "valid_sha256": "b", "valid_tokens": 100}


def run(folder, name, *losses, seconds: float | None = None, seed: int = 0, **settings):
    """Return a run with a validation at each tenth step, and with the seconds that a step took if given."""
    records = [STARTED | FACTS]
    for number, loss in enumerate(losses):
        at = 10 * (number + 1)
        records.append(validation(at, loss) | ({} if seconds is None else {"time.elapsed_s": seconds * at}))
    config = {"training.seed": seed, "training.batch_size": 4} | {
        key.replace("__", "."): one for key, one in settings.items()
    }
    return read_history(write_run(folder, name, *records, config=config))


def test_losses_are_interpolated_between_validations_only(tmp_path):
    """On a straight line over the axis; before the first validation and after the last one there is no loss."""
    one = run(tmp_path, "a", 5.0, 4.0, 3.0)
    assert [value_at(one, NATS, at="steps", place=place) for place in (10, 15, 20, 27.5, 30)] == [5, 4.5, 4, 3.25, 3]
    assert [value_at(one, NATS, at="steps", place=place) for place in (9, 31)] == [None, None]
    assert value_at(one, NATS, at="tokens", place=64 * 15) == 4.5
    assert value_at(one, NATS, at="flops", place=6000 * 64 * 15) == 4.5
    assert value_at(one, NATS, at="end", place=None) == 3
    assert value_at(one, "metrics.none", at="steps", place=10) is None


def test_a_slow_run_is_behind_at_equal_seconds(tmp_path):
    """At equal steps it is better, at equal time it is not: each axis has its place and its means."""
    fast = run(tmp_path, "fast", 5.0, 4.0, 3.5, 3.0, seconds=1.0)
    slow = run(tmp_path, "slow", 4.8, 3.8, seconds=2.0, model__qk_norm=True)
    found = compare_runs([fast, slow], at="seconds")
    assert found.place == 40
    assert [result.mean for result in found.results] == [3.0, 3.8]
    assert [result.tokens for result in found.results] == [40 * 64, 20 * 64]
    assert found.elsewhere["steps"] == (20, [4.0, 3.8])
    assert found.elsewhere["seconds"] == (40, [3.0, 3.8])
    assert found.settings == {"model.qk_norm": [False, True]}
    assert found.notes == []


def test_groups_are_by_settings_and_have_names_of_their_own(tmp_path):
    """Whatever runs are called; two groups whose short names are the same have those of their first runs."""
    runs = [run(tmp_path, "x-1", 4.0, seed=1), run(tmp_path, "x-2", 4.0, model__qk_norm=True)]
    runs += [
        run(tmp_path, "other", 4.0, seed=2, logging__run_name="other"),
        run(tmp_path, "y-7", 3.0, training__z_loss=0.1),
    ]
    groups = group_runs(runs, [])
    assert [(group.name, [one.name for one in group.runs]) for group in groups] == [
        ("x-1", ["x-1", "other"]), ("x-2", ["x-2"]), ("y", ["y-7"]),
    ]  # fmt: skip


def test_groups_whose_runs_are_called_alike_have_their_directories(tmp_path):
    """fit and quickstart call every run `run`."""
    runs = [run(tmp_path / "a", "run", 4.0), run(tmp_path / "b", "run", 4.0, model__qk_norm=True)]
    assert [group.name for group in group_runs(runs, [])] == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_other_data_under_the_same_name_are_another_group(tmp_path):
    """What a run was trained on is known by its sum, wherever it was; where it says none, by its path."""

    def trained(name: str, path: str, known: str | None, seed: int = 0):
        said = [] if known is None else [{"event": "environment", "step": 0, "data.train.sha256": known * 64}]
        config = {"training.seed": seed, "data.train": path}
        return read_history(write_run(tmp_path, name, *said, STARTED | FACTS, validation(10, 4.0), config=config))

    runs = [trained("a-0", "x.npy", "a"), trained("a-1", "elsewhere/x.npy", "a", seed=1), trained("b-0", "x.npy", "b")]
    runs += [trained("c-0", "x.npy", None), trained("c-1", "x.npy", None, seed=1)]
    found = compare_runs(runs)
    assert [[one.name for one in result.group.runs] for result in found.results] == [
        ["a-0", "a-1"], ["b-0"], ["c-0", "c-1"],
    ]  # fmt: skip
    assert found.settings["data.train.sha256"] == ["a" * 12, "b" * 12, None]


def test_seeds_on_two_machines_are_one_group(tmp_path):
    """Where token files and tokenizer are does not matter, if their sums are equal."""
    runs = []
    for seed, place in enumerate(("data", "/scratch/data")):
        sums = {"data.train.sha256": "a" * 64, "data.valid.sha256": "b" * 64, "tokenizer_sha256": "c" * 64}
        paths = {"data.train": f"{place}/t.npy", "data.valid": f"{place}/v.npy", "data.tokenizer": f"{place}/tok"}
        records = [{"event": "environment", "step": 0, **sums}, STARTED | FACTS, validation(10, 4.0)]
        config = {"training.seed": seed, **paths}
        runs.append(read_history(write_run(tmp_path, f"x-{seed}", *records, config=config)))
    assert [[one.name for one in group.runs] for group in group_runs(runs, [])] == [["x-0", "x-1"]]


def test_validations_of_other_parts_of_a_text_are_named(tmp_path):
    """With documents packed into rows a validation reads rows from all over the file, not its beginning."""
    plain = run(tmp_path, "plain", 4.0)
    records = [STARTED | FACTS | {"valid_packing": "documents"}, validation(10, 3.9)]
    packed = read_history(write_run(tmp_path, "packed", *records, config={"data.packing": "documents"}))
    (note,) = compare_runs([plain, packed]).notes
    assert note.startswith("the runs differ in packing of the validation text: comparing bits per byte")


def test_a_seed_counts_once_it_has_a_loss(tmp_path):
    """A run that ended before its first validation takes no other's place, nor does a cut batch make another group."""
    failed = read_history(write_run(tmp_path, "a-0", STARTED | FACTS, step(1, 5.0), config={"training.seed": 0}))
    again = read_history(
        write_run(
            tmp_path,
            "a-0b",
            STARTED | FACTS,
            validation(10, 4.0),
            config={"training.seed": 0, "training.micro_batch_size": 2},
        )
    )
    (found,) = compare_runs([failed, again]).results
    assert (found.losses, found.words) == ([None, 4.0], ["no validation", ""])


def test_pairs_are_of_equal_batches(tmp_path):
    """Seeds that only one group has are left out of a paired test, if three pairs are left."""
    first = [run(tmp_path, f"a-{seed}", 4.0 + seed / 10, seed=seed) for seed in range(4)]
    second = [run(tmp_path, f"b-{seed}", 3.9 + seed * 0.101, seed=seed, model__qk_norm=True) for seed in (3, 1, 2, 9)]
    (_, result) = compare_runs(first + second).results
    losses = {seed: (4.0 + seed / 10, 3.9 + seed * 0.101) for seed in (1, 2, 3)}
    expected = paired_difference(*zip(*(losses[seed] for seed in (3, 1, 2)), strict=True))
    assert result.versus.method == "paired"
    assert (result.versus.mean, result.versus.low) == (pytest.approx(expected.mean), pytest.approx(expected.low))


def test_a_run_that_diverged_sets_no_place(tmp_path):
    """It ends early, and the others are compared as if it were not there."""
    runs = [run(tmp_path, "a", 5.0, 4.0, 3.0), run(tmp_path, "b", 90.0, model__qk_norm=True)]
    found = compare_runs(runs)
    assert found.place == 30 * 64
    assert found.results[1].words == ["diverged"]
    config = {"training.seed": 2, "model.qk_norm": True}
    dead = read_history(write_run(tmp_path, "d", STARTED | FACTS, validation(10, 4.0), step(15, "nan"), config=config))
    failed = {"event": "failed", "step": 15, "error": "FloatingPointError: step 15: loss nan"}
    told = read_history(write_run(tmp_path, "e", STARTED | FACTS, validation(10, 4.0), failed, config=config))
    for one in (dead, told):
        found = compare_runs([runs[0], one])
        assert (found.place, found.results[1].words) == (30 * 64, ["diverged"])
    none = read_history(write_run(tmp_path, "c", STARTED, step(3, 4.0), config={"training.seed": 1}))
    with pytest.raises(ValueError, match=r"expected validations with metrics\.val_loss, found none"):
        compare_runs([none])


def test_a_slower_run_has_not_diverged(tmp_path):
    """Where losses get small, twice as much is behind, not broken; one that forgot what it knew is."""
    runs = [run(tmp_path, "a", 5.0, 2.0, 0.6), run(tmp_path, "b", 5.0, 2.5, 1.4, model__qk_norm=True)]
    assert [result.losses for result in compare_runs(runs).results] == [[0.6], [1.4]]
    forgot = run(tmp_path, "c", 5.0, 1.0, 3.0, model__qk_norm=True)
    assert compare_runs([runs[0], forgot]).results[1].words == ["diverged"]


def test_a_run_that_trained_for_less_time_has_not_diverged(tmp_path):
    """Its last loss is held against the first run's at the same place, not against where that one ended."""
    runs = [run(tmp_path, "a", 8.0, 3.0, 1.0), run(tmp_path, "b", 7.5, model__qk_norm=True)]
    found = compare_runs(runs)
    assert (found.place, [result.losses for result in found.results]) == (10 * 64, [[8.0], [7.5]])


def test_each_run_may_be_taken_at_its_lowest_validation(tmp_path):
    """One that has read its text too often was better before."""
    runs = [run(tmp_path, "a", 4.0, 2.0, 3.0), run(tmp_path, "b", 4.0, 3.0, 2.5, model__qk_norm=True)]
    found = compare_runs(runs, at="lowest")
    assert [(result.losses, result.tokens) for result in found.results] == [([2.0], 20 * 64), ([2.5], 30 * 64)]
    assert title(found) == "validation loss (nats per token) at each run's lowest validation"


def test_a_test_of_some_seeds_says_so(tmp_path):
    """The means are of all seeds, and may say something else."""
    first = [run(tmp_path, f"a-{seed}", 4.0 + seed / 10, seed=seed) for seed in range(5)]
    second = [run(tmp_path, f"b-{seed}", 3.9 + seed * 0.101, seed=seed, model__qk_norm=True) for seed in (0, 1, 2, 9)]
    words = "b: the difference is that of the 3 seeds that both have, the means are of all"
    assert compare_runs(first + second).notes == [words]
    assert compare_runs(first[:3] + second[:3]).notes == []
