"""`transformerlm-scaling`: what is planned, refused, fitted, foretold and said; the trainings are a stand-in's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cli import scaling_report, scaling_runs
from cli.sweep import price
from config.io import SHIPPED, load_config
from config.scaling import ScalingConfig
from config.shipped import find_config
from tests.cli.commands import ROOT, call
from tests.experiments.scaling import fake_train
from tests.experiments.scaling.laws import KNOWN, drawn
from tests.experiments.sweep.helpers import BASE as SWEPT
from tests.training.tiny_run import write_tiny_files
from transformerlm.experiments.scaling import pictures
from transformerlm.experiments.scaling.grid import plan_grid, planned_points
from transformerlm.experiments.scaling.support import why_not_both
from transformerlm.experiments.sweep import scheduler

BASE = SWEPT.replace("[data]", "d_ff = 64\n[data]")
SCALING = """\
base = "base.toml"
dir = "law"
tokens = [6400, 25600, 102400]
parallel = 4
[[sizes]]
d_model = 8
num_layers = 1
num_heads = 2
[[sizes]]
d_model = 16
num_layers = 2
num_heads = 2
[[sizes]]
d_model = 32
num_layers = 4
num_heads = 4
[[sizes]]
d_model = 64
num_layers = 6
num_heads = 4
[fit]
resamples = 50
[optimum]
flops = [1e11]
time = ["1m"]
tokens = [50000]
"""
HOLDOUT = """\
[[holdout]]
d_model = 64
num_layers = 8
num_heads = 4
tokens = 204800
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a directory with token files and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_files(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, data):
    """Return a working directory with a grid of twelve runs, which the stand-in makes."""
    fake = ROOT / "tests/experiments/scaling/fake_train.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scheduler, "train_command", lambda path: [sys.executable, str(fake), str(path)])
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(pictures, "draw_pictures", lambda study, directory: [])  # they take longer than all else here
    for one in data.iterdir():
        Path(one.name).symlink_to(one)
    Path("base.toml").write_text(BASE)
    Path("scaling.toml").write_text(SCALING)
    return tmp_path


def by_event(records: list[dict], event: str) -> list[dict]:
    """Return the records of one event."""
    return [record for record in records if record["event"] == event]


def test_runs_a_law_and_a_run_foretold(here):
    """Twelve runs are made and fitted, a larger one is predicted, then made, then judged; again, nothing is made."""
    Path("scaling.toml").write_text(SCALING + HOLDOUT)
    done = call("scaling", "--config", "scaling.toml")
    assert done.code == 0, done.stderr
    assert len(by_event(done.records, "ended")) == 13
    [law] = by_event(done.records, "law")
    assert law["runs"] == 12
    assert law["E"] == pytest.approx(fake_train.E, abs=0.3)
    assert law["other"]["parameters_are"] == "without_embeddings"
    points = by_event(done.records, "point")
    assert all(point["parameters"] > point["parameters_without_embeddings"] > 0 for point in points)
    [foretold], [judged] = by_event(done.records, "foretold"), by_event(done.records, "judged")
    order = [record["event"] for record in done.records if record.get("run") == foretold["run"]]
    assert order == ["foretold", "began", "ended", "judged"]
    assert foretold["before_the_run"]
    assert judged["predicted"] == foretold["loss"]
    assert abs(judged["error"]) < 0.05
    assert judged["inside"].keys() == {"80", "95"}
    assert {"scaling.json", "predictions.json"} <= {path.name for path in Path("law").iterdir()}
    stated = Path("law/predictions.json").read_bytes()
    again = call("scaling", "--config", "scaling.toml", "--fit.resamples=20")
    assert again.code == 0, again.stderr
    assert not by_event(again.records, "began")
    assert by_event(again.records, "judged") == [judged | {"event": "judged"}]
    assert Path("law/predictions.json").read_bytes() == stated
    said = [[line for line in one.stderr.splitlines() if line.startswith("predicted")] for one in (done, again)]
    assert said[0] == said[1]  # though the intervals of the law are others now


def test_a_signal_is_the_end_also_where_nothing_has_failed(here, monkeypatch):
    """SIGUSR1 says that time is nearly over: exit code 0, and neither a law of half a grid nor more runs."""
    Path("scaling.toml").write_text(SCALING + HOLDOUT)
    monkeypatch.setattr(scaling_runs, "train", lambda *args: "SIGUSR1")
    done = call("scaling", "--config", "scaling.toml")
    assert (done.code, by_event(done.records, "law")) == (0, [])
    assert "SIGUSR1: " in done.stderr
    assert not Path("law/predictions.json").exists()


def test_budgets_are_answered(here):
    """The best sizes for FLOPs, for time on this machine and for tokens, with what is at the edge said."""
    done = call("scaling", "--config", "scaling.toml")
    assert done.code == 0, done.stderr
    flops, time, tokens = by_event(done.records, "optimum")
    assert flops["asked"] == {"flops": 1e11}
    assert flops["parameters"] * flops["tokens"] * 6 == pytest.approx(1e11, rel=0.01)
    assert (time["unit"], time["budget"]) == ("seconds", 60)
    assert time["parameters"] * time["tokens"] / 64 * 1e-6 == pytest.approx(60, rel=0.01)
    assert tokens["tokens"] == pytest.approx(50_000)
    found = json.loads(Path("law/scaling.json").read_text())
    assert found["optima"] == [
        {key: value for key, value in one.items() if key != "event"} for one in (flops, time, tokens)
    ]
    assert "best for  1:00 on this machine, shared by 4 runs: " in done.stderr
    alone = call("scaling", "--config", "scaling.toml", "--parallel=1")
    assert "best for  1:00 on this machine: " in alone.stderr
    far = call("scaling", "--runs", "law/size*", "--optimum.flops", "1e20")
    assert far.code == 0, far.stderr
    assert by_event(far.records, "optimum")[0]["edges"] == ["parameters above", "tokens above"]
    assert "at the edge of what was run, above all parameters and above all tokens" in far.stderr


def test_a_dry_run_says_what_would_run(here, monkeypatch):
    """Each run with parameters, tokens, FLOPs and hours, and nothing is written; repeated data are named."""
    monkeypatch.setattr("cli.scaling_runs.flops_per_second", lambda run: 3600.0 * run.flops_per_token)
    Path("scaling.toml").write_text(SCALING + HOLDOUT)
    done = call("scaling", "--config", "scaling.toml", "--dry-run")
    assert done.code == 0, done.stderr
    planned = by_event(done.records, "planned")
    assert [one["holdout"] for one in planned] == [False] * 12 + [True]
    model = {"vocab_size": 300, "d_model": 8, "num_layers": 1, "d_ff": 64}
    assert planned[0]["parameters"] == fake_train.num_parameters(model)
    assert planned[0]["tokens"] == 6400
    assert planned[0]["hours"] == pytest.approx(6400 / 3600 / 3600)
    assert "tokens, which the longest run reads" in done.stderr
    assert not Path("law").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("102400]", "51200]"), "its token counts must span a factor of 10, found 8"),
        (
            ("tokens = [6400, 25600, 102400]", "tokens = [6400, 102400]"),
            "it needs 12 finished runs that differ in size or tokens, found 8",
        ),
        (("d_model = 64\nnum_layers = 6", "d_model = 16\nnum_layers = 6"), "its sizes must span a factor of 10"),
        (("[fit]\n", "[fit]\ndrop_highest = 1\n"), "it needs 12 finished runs that differ in size or tokens, found 11"),
    ],
    ids=["tokens", "runs", "sizes", "dropped"],
)
def test_runs_that_could_not_bear_the_law_are_refused_beforehand(here, change, words):
    """A law of both that is asked for, or a run to foretell, ends before the first run."""
    for text, options in ((SCALING, ["--fit.law=both"]), (SCALING + HOLDOUT, [])):
        Path("scaling.toml").write_text(text.replace(*change))
        done = call("scaling", "--config", "scaling.toml", *options)
        assert done.code == 2
        assert words in done.stderr
        assert not Path("law").exists()


def test_mistakes_of_the_base_are_named(here):
    """A time limit and early stopping, which end a schedule early, and a shape that cannot be."""
    for line, words in (
        ('max_time = "1m"', "training.max_time: expected none"),
        ("early_stop_patience = 3", "training.early_stop_patience: expected 0, so that "),
    ):
        Path("base.toml").write_text(BASE.replace("[training]", f"[training]\n{line}"))
        done = call("scaling", "--config", "scaling.toml")
        assert (done.code, words in done.stderr) == (2, True), done.stderr
    Path("base.toml").write_text(BASE)
    Path("scaling.toml").write_text(SCALING.replace("d_model = 8\n", "d_model = 9\n"))
    done = call("scaling", "--config", "scaling.toml")
    assert done.code == 2
    assert "d_model (9) is not divisible by num_heads (2)" in done.stderr


def test_a_run_that_fails_is_named_and_the_others_are_fitted(here, monkeypatch):
    """The law is of the runs that finished; the exit code says that one did not."""
    monkeypatch.setenv("FAKE_FAIL", "d8-l1-h2-tokens=6400-")
    Path("scaling.toml").write_text(SCALING.replace("tokens = [6400,", "tokens = [3200, 6400,"))
    done = call("scaling", "--config", "scaling.toml", "--retries=0")
    assert done.code == 1
    assert "error: no luck" in done.stderr
    assert by_event(done.records, "law")[0]["runs"] == 15


def test_points_of_a_file_are_fitted_and_nothing_is_written(here):
    """The constants of a known law come back; with --dir there are files."""
    points = drawn(noise=0)
    rows = zip(points.parameters, points.tokens, points.losses, strict=True)
    lines = [f"{n},{d},{loss},{n / 1e6:.0f}M" for n, d, loss in rows]  # five of each name
    Path("points.csv").write_text("\n".join(["parameters,tokens,loss,name", *lines]))
    before = set(Path().iterdir())
    options = ("--points", "points.csv", "--fit.resamples=20", "--predict.parameters=1e9", "--predict.tokens=1e11")
    done = call("scaling", *options)
    assert done.code == 0, done.stderr
    [law] = by_event(done.records, "law")
    for name in ("E", "A", "B", "alpha", "beta"):
        assert law[name] == pytest.approx(getattr(KNOWN, name), rel=1e-4)
    [prediction] = by_event(done.records, "prediction")
    assert prediction["loss"] == pytest.approx(float(KNOWN.loss(1e9, 1e11)), rel=1e-6)
    assert "the intervals suppose that the law still holds there" in done.stderr
    shown = [line.split() for line in done.stderr.splitlines() if line.endswith("M") and line[:1] == " "]
    assert len(shown) == 25
    assert all(loss == law for *_, loss, law, _ in shown)
    assert call("scaling", *options, "--output.format=text").stdout == ""
    assert set(Path().iterdir()) == before


def test_without_resamples_no_interval_is_spoken_of(here):
    """The error of the rollout and of a run foretold are said alone."""
    points = drawn(noise=0.003)
    rows = zip(points.parameters, points.tokens, points.losses, strict=True)
    Path("points.csv").write_text("\n".join(["parameters,tokens,loss", *(f"{n},{d},{loss}" for n, d, loss in rows)]))
    done = call("scaling", "--points", "points.csv", "--fit.resamples=0")
    assert done.code == 0, done.stderr
    [rollout] = by_event(done.records, "rollout")
    assert rollout["in_80_percent_interval"] is None
    assert "cheaper runs predicts the" in done.stderr
    assert "interval" not in done.stderr
    outcome = {"run": "a", "measured": 2.0, "predicted": 2.1, "error": 0.05, "inside": {}, "before_the_run": True}
    assert scaling_report.judged_line(outcome).endswith("(+5.00%)")


@pytest.mark.parametrize("count", ["all", "without_embeddings"])
def test_the_shipped_file_bears_the_law_of_both(tmp_path, count):
    """The runs that `--config scaling` plans bear the law of sizes and tokens, however N is counted."""
    config = load_config(ScalingConfig, SHIPPED / "scaling.toml")
    runs = plan_grid(config, find_config(config.base), tmp_path / "law", price).runs
    points = planned_points(runs, [scaling_runs.parameters_of(one, count) for one in runs])
    assert len(points) == 12
    assert why_not_both(points) == ""


def test_the_one_decade_set_is_refused(here):
    """Six models within a decade: exit code 2, and the reason in one line."""
    sizes = np.geomspace(26e6, 200e6, 6)
    lines = [f"{size},{20 * size},{float(KNOWN.loss(size, 20 * size))}\n" for size in sizes]
    Path("points.csv").write_text("parameters,tokens,loss\n" + "".join(lines))
    done = call("scaling", "--points", "points.csv")
    assert done.code == 2
    assert "no scaling law: it needs 12 finished runs that differ in size or tokens, found 6" in done.stderr
    assert not done.records


def test_runs_that_do_not_count_are_named(here):
    """A run that a signal ended, one without its end, and a name that means no run."""
    assert call("scaling", "--config", "scaling.toml").code == 0
    runs = sorted(Path("law").glob("size*"))
    for path, reason in ((runs[0], "signal"), (runs[1], None)):
        lines = (path / "metrics.jsonl").read_text().splitlines()
        end = [json.dumps({"event": "finished", "step": 1, "reason": reason})] if reason else []
        (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines[:-1], *end]))
    done = call("scaling", "--runs", "law/size*", "--fit.law=tokens")
    assert f"left out: {runs[0]}: it ended by signal, before its schedule did" in done.stderr
    assert f"left out: {runs[1]}: it has not finished" in done.stderr
    missing = call("scaling", "--runs", "nothing*")
    assert missing.code == 2
    assert "runs: nothing*: expected directories of runs, with a metrics.jsonl, found none" in missing.stderr
