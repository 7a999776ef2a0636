"""Runs from points: checked before anything begins, named by what they are, and equal in compute."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from config.errors import ConfigError
from config.io import dump_toml
from config.schemas import RunName
from tests.experiments.sweep.helpers import planned, planner_of, sweep_config
from transformerlm.experiments.sweep.plan import group_runs
from transformerlm.experiments.sweep.points import Point, axes_of, grid
from transformerlm.experiments.sweep.queue import SweepDirectory


def test_a_name_says_what_the_run_is(tmp_path):
    """It has the values and ends in the seed; the runs of a group differ in the seed alone."""
    runs = planned(tmp_path)
    assert len(runs) == 6
    assert re.fullmatch(r"learning_rate=0\.001-[0-9a-f]{10}-0", runs[0].name)
    assert [len(group) for group in group_runs(runs).values()] == [2, 2, 2]
    assert [run.config.training.seed for run in runs] == [0, 1] * 3
    assert [run.config.optimizer.learning_rate for run in runs] == [1e-3, 1e-3, 1e-2, 1e-2, 1e-1, 1e-1]
    assert {run.config.runs_dir for run in runs} == {tmp_path / "sweep"}
    assert [run.config.logging.run_name for run in runs] == [run.name for run in runs]


def test_any_label_makes_a_valid_name(tmp_path):
    """Long or odd values are shortened; the hash still tells them apart."""
    axes = [{"key": "data.train", "values": ["a/b c/ü.npy", "x/" * 200 + "y.npy", "x/" * 200 + "z.npy"]}]
    names = [run.name for run in planned(tmp_path, axes=axes)]
    assert len(set(names)) == 6
    for name in names:
        TypeAdapter(RunName).validate_python(name)


def test_equal_configurations_are_one_run(tmp_path):
    """However they are written; what says only where a run is or what is logged makes no other run."""
    variants = [
        {"name": "default"},
        {"name": "spelled-out", "set": ["model.norm_position=pre"]},
        {"name": "logged", "set": ["logging.dataset=x", "training.log_interval=5", "samples.interval=7"]},
        {"name": "other", "set": ["model.norm_position=post"]},
    ]
    runs = planned(tmp_path, variants=variants, axes=[], seeds=[0])
    assert [run.group[:-11] for run in runs] == ["default", "other"]
    moved = planned(tmp_path, dir=str(tmp_path / "elsewhere"), axes=[], seeds=[0])
    assert moved[0].group[-10:] == runs[0].group[-10:]


def test_a_run_that_is_there_keeps_its_name(tmp_path):
    """A variant that was renamed, or an axis more with the value that there was, makes no run anew."""
    settings: dict[str, Any] = {"axes": [], "seeds": [0, 1], "dir": str(tmp_path / "sweep")}
    before = planned(tmp_path, variants=[{"name": "first"}], **settings)
    (tmp_path / "sweep" / before[0].name).mkdir(parents=True)
    (tmp_path / "sweep" / "a-file").touch()
    after = planned(tmp_path, variants=[{"name": "renamed"}, {"name": "new", "set": ["model.ffn=silu"]}], **settings)
    assert [run.name for run in after[:2]] == [run.name for run in before]
    assert after[2].group.startswith("new-")


def test_a_run_of_an_earlier_version_keeps_its_name(tmp_path):
    """A key that came since gives its settings another hash; what it was trained with is in the queue."""
    settings: dict[str, Any] = {"axes": [], "seeds": [0, 1], "dir": str(tmp_path / "sweep")}
    before = planned(tmp_path, **settings)
    earlier = f"{before[0].group[:-10]}0123456789"
    (tmp_path / "sweep/queue").mkdir(parents=True)
    text = dump_toml(before[0].config)
    assert text.count("z_loss") == 1
    text = "\n".join(line for line in text.splitlines() if "z_loss" not in line)  # as if it had not been there
    (tmp_path / f"sweep/queue/{earlier}-0.toml").write_text(text)
    (tmp_path / f"sweep/queue/other-{'a' * 10}-0.toml").write_text("no configuration")
    assert [run.name for run in planned(tmp_path, **settings)] == [f"{earlier}-0", f"{earlier}-1"]


def test_runs_of_other_data_are_not_taken_for_runs_of_these(tmp_path, monkeypatch):
    """Data made anew at the same path give other runs; with the old data again, the old runs are there."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"axes": [], "seeds": [0, 1]}
    facts = tmp_path / "train.json"
    facts.write_text('{"sha256": "1"}')
    before = planned(tmp_path, **settings)
    SweepDirectory(tmp_path / "sweep").write_queue(before)
    facts.write_text('{"sha256": "2"}')
    after = planned(tmp_path, **settings)
    assert not {run.name for run in before} & {run.name for run in after}
    facts.write_text('{"sha256": "1"}')
    assert [run.name for run in planned(tmp_path, **settings)] == [run.name for run in before]


@pytest.mark.parametrize("keeps_content", [True, False])
@pytest.mark.parametrize(
    ("recorded", "is_kept"),
    [({"data.train.sha256": "1"}, True), ({"data.train.sha256": "2"}, False), ({"tokenizer_sha256": "3"}, False)],
)
def test_a_run_of_an_earlier_version_is_known_by_what_it_recorded(
    recorded, is_kept, keeps_content, tmp_path, monkeypatch
):
    """Where its queue does not say which data it was; the run of one seed that differs is enough."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").write_text('{"sha256": "1"}')
    settings: dict[str, Any] = {"axes": [], "seeds": [0, 1]}
    [first, second] = planned(tmp_path, **settings)
    earlier = f"{first.group[:-10]}0123456789"
    run_dir = tmp_path / f"sweep/{earlier}-1"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"event": "environment", "step": 0, **recorded}) + "\n")
    (tmp_path / "sweep/queue").mkdir()
    for run in (first, second):
        text = "\n".join(line for line in run.toml.splitlines() if "z_loss" not in line)
        text = text if keeps_content else text.partition("\n")[2]
        (tmp_path / f"sweep/queue/{earlier}-{run.seed}.toml").write_text(text)
    is_adopted = planned(tmp_path, **settings)[0].group == earlier
    assert is_adopted is (is_kept or keeps_content)


def test_data_counts_by_its_content(tmp_path, monkeypatch):
    """A token file that was moved makes no other run; one that was made anew does."""
    monkeypatch.chdir(tmp_path)

    def name_with(path: str) -> str:
        return planned(tmp_path, axes=[], set=[f"data.train={path}"])[0].name

    (tmp_path / "a.json").write_text('{"sha256": "1"}')
    (tmp_path / "b.json").write_text('{"sha256": "1", "sources": [{"path": "elsewhere"}]}')
    (tmp_path / "c.json").write_text('{"sha256": "2"}')
    assert name_with("a.npy") == name_with("b.npy") != name_with("c.npy")
    assert name_with("no.npy") != name_with("none.npy")


def test_an_error_in_one_point_is_found_before_any_run(tmp_path):
    """The line names the values, the file and the key."""
    config = sweep_config(tmp_path, axes=[{"key": "model.num_heads", "values": [2, 5, 3]}])
    with pytest.raises(ConfigError) as caught:
        planner_of(config).runs(grid(axes_of(config)))
    lines = [
        f"num_heads = {heads}: base.toml:4 with --model.num_heads: model: d_model (32) is not divisible by num_heads "
        f"({heads})"
        for heads in (5, 3)
    ]
    assert caught.value.lines == lines


@pytest.mark.parametrize("heads", [[2, 3], [3, 2]])
def test_an_option_must_be_valid_with_one_of_the_others(heads, tmp_path):
    """For a search whose points are not known yet: 3 heads need a width of 48, and 5 fit no width."""
    width = {"key": "model.d_model", "values": [32, 48]}
    rate = {"key": "optimizer.learning_rate", "low": 1e-4, "high": 1e-2}
    search: dict[str, Any] = {"method": "random", "trials": 1}
    config = sweep_config(tmp_path, axes=[width, {"key": "model.num_heads", "values": heads}, rate], **search)
    runs = planner_of(config).edge_runs(axes_of(config))
    assert {(run.config.model.d_model, run.config.model.num_heads) for run in runs} >= {(48, 3)}
    assert {run.config.optimizer.learning_rate for run in runs} >= {1e-4, 1e-2}
    wrong = sweep_config(tmp_path, axes=[width, {"key": "model.num_heads", "values": [*heads, 5]}, rate], **search)
    with pytest.raises(ConfigError) as caught:
        planner_of(wrong).edge_runs(axes_of(wrong))
    [line] = caught.value.lines
    assert line.endswith("model: d_model (32) is not divisible by num_heads (5)")


def test_what_is_wrong_with_every_point_is_said_once(tmp_path):
    """It is no option's fault."""
    config = sweep_config(tmp_path, set=["data.valid=none"])
    with pytest.raises(ConfigError, match=r"data.valid: expected a token file") as caught:
        planner_of(config).edge_runs(axes_of(config))
    assert len(caught.value.lines) == 1


def test_a_sweep_needs_validation_losses(tmp_path):
    """Without data.valid there is nothing to compare."""
    config = sweep_config(tmp_path, set=["data.valid=none"])
    with pytest.raises(ConfigError, match=r"data.valid: expected a token file, whose loss a sweep compares"):
        planner_of(config).runs([Point()])


@pytest.mark.parametrize(("match", "budget"), [("steps", 50), ("tokens", 50_000), ("flops", 3e9)])
def test_runs_spend_the_same(match, budget, tmp_path):
    """What all runs realise is within one step of the others', however large a step is."""
    axes = [
        {"key": "model.d_model", "values": [16, 32, 64, 128]},
        {"key": "training.batch_size", "values": [1, 4, 9]},
    ]
    for run in planned(tmp_path, axes=axes, match=match, budget=budget, set=["schedule.warmup_steps=10%"]):
        steps = run.config.training.max_steps
        each = {"steps": 1, "tokens": run.tokens_per_step, "flops": run.flops / steps}[match]
        assert abs(steps * each - budget) <= each / 2
        assert run.config.schedule.in_steps(steps)["warmup_steps"] == round(steps / 10)


@pytest.mark.parametrize(("match", "budget"), [("steps", 50), ("tokens", 50_000), ("flops", 3e9), ("seconds", 9)])
def test_what_ends_runs_before_their_budget_is_refused(match, budget, tmp_path):
    """Early stopping, and a time that is not the budget: runs would be compared at unequal compute."""
    early = ["training.early_stop_patience=3"]
    with pytest.raises(ConfigError, match=r"training.early_stop_patience: expected 0, .* found 3"):
        planned(tmp_path, match=match, budget=budget, set=early)
    if match != "seconds":
        with pytest.raises(ConfigError, match=r'training.max_time: expected none, .* found "30m"; set = '):
            planned(tmp_path, match=match, budget=budget, set=["training.max_time=30m"])
    assert planned(tmp_path, set=[*early, "training.max_time=30m"])  # at what base says, nothing is promised


def test_a_budget_of_time_ends_runs_by_the_clock(tmp_path):
    """The schedule follows the time, as the steps never end."""
    run = planned(tmp_path, axes=[], match="seconds", budget=90.5)[0]
    assert (run.config.training.max_time, run.config.training.max_steps) == ("90.5s", 10**9)


def test_a_budget_below_one_step_is_refused(tmp_path):
    """It would be no training."""
    with pytest.raises(
        ConfigError, match=r"learning_rate = 0.001: budget: expected at least one step, .* flops, found 10"
    ):
        planned(tmp_path, match="flops", budget=10)


def test_rungs_are_steps_with_a_validation(tmp_path):
    """Others have no loss to compare."""
    with pytest.raises(
        ConfigError, match=r"multiples of training.eval_interval \(2\) below training.max_steps \(12\), found 5"
    ):
        planned(tmp_path, halving={"rungs": [4, 5]})
    with pytest.raises(ConfigError, match="found 12"):
        planned(tmp_path, halving={"rungs": [12]})
