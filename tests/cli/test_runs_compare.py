"""`transformerlm-runs compare` shows runs in rows by their settings, with the first row as the baseline."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, call, call_in_terminal
from tests.experiments.runs import STARTED, lines, step, validation, write_run
from transformerlm.experiments.statistics import welch_difference

FACTS = {"tokenizer_sha256": "a", "valid_sha256": "b", "valid_tokens": 100}


def make_run(folder: Path, name: str, *losses: float | str, seed: int = 0, rate: float = 0.01, **facts: object) -> Path:
    """Write a run whose validations, 640 tokens apart, have these losses; return its directory."""
    records = [
        validation(10 * (n + 1), loss, bits=None if isinstance(loss, float) else "nan") for n, loss in enumerate(losses)
    ]
    config = {
        "training.seed": seed,
        "training.batch_size": 4,
        "optimizer.learning_rate": rate,
        "logging.run_name": name,
    }
    return write_run(folder, name, STARTED | FACTS | facts, *records, config=config)


def markdown(*arguments: object) -> list[str]:
    """Return the tables of a comparison as lines."""
    done = call("runs_compare", *arguments, "--output.format=markdown")
    assert (done.code, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_runs_that_differ_in_the_seed_share_a_row(tmp_path):
    """Losses at one place, their mean, and the mean against the first row; settings that differ, and no others."""
    runs = [make_run(tmp_path, "adamw-0", 5.0, 4.0), make_run(tmp_path, "other", 5.0, 4.5, seed=12)]
    assert markdown(*runs, make_run(tmp_path, "muon-lr0.1", 4.8, 4.2, 3.0, rate=0.1)) == [
        "Validation loss (nats per token) at 1,280 tokens:",
        "",
        "|  | tokens | run 1 | run 2 | mean | against the first |",
        "|---|---|---|---|---|---|",
        "| adamw | 1,280 | 4.000 | 4.500 | 4.250 | +0.000 |",
        "| muon-lr0.1 | 1,280 | 4.200 |  | 4.200 | -0.050 |",
        "",
        "| against adamw | bits/byte | difference | 95 % interval | test |  |",
        "|---|---|---|---|---|---|",
        "| muon-lr0.1 | 2.100 |  |  |  | cannot tell: that needs 1 more seed of adamw and 2 more seeds of muon-lr0.1 |",
        "",
        "Mean loss at other equal places:",
        "",
        "| at equal | adamw | muon-lr0.1 |",
        "|---|---|---|",
        "| 20 steps | 4.250 | 4.200 |",
        "| 1,280 tokens | 4.250 | 4.200 |",
        "| 7.68e+06 FLOPs | 4.250 | 4.200 |",
        "",
        "Settings that differ:",
        "",
        "| setting | adamw | muon-lr0.1 |",
        "|---|---|---|",
        "| optimizer.learning_rate | 0.01 | 0.1 |",
    ]


def test_the_table_of_the_ablations_is_what_it_was(tmp_path):
    """docs/ablations.md has a table of runs where each ended; runs with those losses give it character by character."""
    page = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    table = page[page.index("|  | tokens | run 1 | run 2 | run 3 | mean |") :].partition("\n\n")[0].splitlines()
    runs = []
    for number, line in enumerate(table[2:]):
        name, tokens, *losses = [cell.strip() for cell in line.strip("|").split("|")][:5]
        for seed, loss in enumerate(losses):
            if loss:
                run = make_run(tmp_path, f"{name}-{seed}", seed=seed, rate=number + 1.0)
                last = validation(10, 100.0 if loss == "diverged" else float(loss))
                last["metrics.tokens"] = int(tokens.replace(",", ""))
                write_run(tmp_path / "again", f"{name}-{seed}", STARTED | FACTS, last)
                (tmp_path / "again" / f"{name}-{seed}/config.toml").write_bytes((run / "config.toml").read_bytes())
                runs.append(tmp_path / "again" / f"{name}-{seed}")
    shown = markdown(*runs, "--at=end")
    assert shown[0] == "Validation loss (nats per token) at each run's end:"
    assert shown[2 : 2 + len(table)] == table


def test_a_run_that_diverged_has_no_number(tmp_path):
    """Its loss, more than twice the first run's there or no number, means nothing, nor does a mean with it."""
    runs = [make_run(tmp_path, "a-0", 5.0, 4.0), make_run(tmp_path, "b-0", 3.0, 3.0, rate=0.1)]
    runs += [make_run(tmp_path, "b-1", 10.1, seed=1, rate=0.1), make_run(tmp_path, "b-2", 5.0, "nan", seed=2, rate=0.1)]
    runs.append(make_run(tmp_path, "b-3", seed=3, rate=0.1))  # which came to no validation
    with (runs[-1] / "metrics.jsonl").open("a") as file:
        file.write(lines([step(3, "nan")]))
    shown = markdown(*runs)
    assert shown[4:6] == [
        "| a | 1,280 | 4.000 |  |  |  | 4.000 | +0.000 |",
        "| b | 1,280 | 3.000 | diverged | diverged | diverged |  |  |",
    ]
    assert "| b |  |  |  |  | cannot tell: a run of b diverged |" in shown


def test_what_has_no_loss_there_says_why(tmp_path):
    """A run without validation, one that never was at the place, and one whose seed was there before."""
    runs = [make_run(tmp_path, "a", 5.0, 4.0), make_run(tmp_path, "twin", 5.0, 4.0), make_run(tmp_path, "none", seed=2)]
    runs += [make_run(tmp_path, "short", 5.0, seed=3)]
    shown = markdown(*runs, "--at=steps", "--place=15")
    assert shown[0] == "Validation loss (nats per token) at 15 steps:"
    assert shown[4] == "| a | 960 | 4.500 | same seed | no validation | not there | 4.500 | +0.000 |"


@pytest.mark.parametrize(
    ("fact", "named"),
    [
        ({"tokenizer_sha256": "other", "valid_sha256": "other"}, "differ in tokenizer, validation file: comparing"),
        ({"valid_sha256": "other"}, "differ in validation file: comparing bits per byte"),
        ({"valid_tokens": 50}, "differ in number of validation tokens: comparing bits per byte"),
    ],
    ids=str,
)
def test_runs_that_nats_do_not_compare_are_compared_in_bits_per_byte(fact, named, tmp_path):
    """One line reports another tokenizer, text or part of it, and the table uses the other measure."""
    runs = [make_run(tmp_path, "a", 4.0), make_run(tmp_path, "b", 3.0, rate=0.1, **fact)]
    done = call("runs_compare", *runs, "--output.format=markdown")
    assert done.stdout.splitlines()[0] == "Validation loss (bits per byte) at 640 tokens:"
    assert done.stdout.splitlines()[4:6] == [
        "| a | 640 | 2.000 | 2.000 | +0.000 |",
        "| b | 640 | 1.500 | 1.500 | -0.500 |",
    ]
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_of_an_earlier_version_is_compared_with_a_warning(tmp_path):
    """It does not say what it was measured on, and has no settings: its name tells its group."""
    runs = [make_run(tmp_path, "a", 4.0), make_run(tmp_path, "b-1", 3.0), make_run(tmp_path, "b-2", 3.2)]
    for run in runs[1:]:
        (run / "config.toml").unlink()
        path = run / "metrics.jsonl"
        path.write_text(path.read_text().replace('"tokenizer_sha256": "a", ', ""))
    done = call("runs_compare", *runs, "--output.format=text")
    assert re.search(r"^b +640 +3.000 +3.200 +3.100 +-0.900$", done.stdout, flags=re.M)
    assert "b-1: does not say what it was measured on" in done.stderr
    assert "a run without a config.toml is grouped by its name" in done.stderr


def test_three_pairs_of_seeds_tell(tmp_path):
    """Each group is compared pair by pair; the record has the interval and the verdict, all keys on one level."""
    runs = [make_run(tmp_path, f"a-{seed}", 5.0, 4.0 + seed, seed=seed) for seed in range(3)]
    runs += [make_run(tmp_path, f"b-{seed}", 4.0, 3.9 + seed + seed / 100, seed=seed, rate=0.1) for seed in range(3)]
    first, second = call("runs_compare", *runs, stdin="").records
    assert (first["group"], first["seeds"], first["losses"], first["mean"]) == ("a", [0, 1, 2], [4.0, 5.0, 6.0], 5.0)
    assert (second["verdict"], second["difference.method"], second["more_seeds"]) == ("better", "paired", None)
    assert second["difference.mean"] == pytest.approx(-0.09)
    assert second["difference.low"] < -0.09 < second["difference.high"] < 0
    assert (first["settings.optimizer.learning_rate"], second["settings.optimizer.learning_rate"]) == (0.01, 0.1)
    assert (second["at"], second["place"], second["at.steps"], second["mean_at.steps"]) == (
        "tokens", 1280, 20, pytest.approx(4.91),
    )  # fmt: skip
    assert not [key for record in (first, second) for key, value in record.items() if isinstance(value, dict)]
    assert re.search(r"^b +2\.455 +-0\.0900 +-0\.11\d+ to -0\.06\d+ +3 pairs +better$", text_of(*runs), flags=re.M)


def text_of(*runs: Path) -> str:
    """Return a comparison as text."""
    return call("runs_compare", *runs, "--output.format=text").stdout


def test_other_batches_make_two_samples(tmp_path):
    """Runs with another batch size did not see the same batches: Welch's test, and how many more seeds would tell."""
    losses = [4.0, 4.2, 4.1]
    runs = [make_run(tmp_path, f"a-{seed}", losses[seed], seed=seed) for seed in range(3)]
    for seed in range(3):
        run = make_run(tmp_path, f"b-{seed}", losses[seed] + 0.1, seed=seed)
        path = run / "config.toml"
        path.write_text(path.read_text().replace("batch_size = 4", "batch_size = 8"))
        runs.append(run)
    *_, second = call("runs_compare", *runs).records
    assert (second["difference.method"], second["verdict"]) == ("welch", "cannot tell")
    # n >= 2 (t(0.975) + t(0.8))^2 with 2 (n - 1) degrees of freedom: 17
    assert second["more_seeds"] == 14
    assert "cannot tell: about 14 more seeds of each would" in text_of(*runs)


@pytest.mark.parametrize("sizes", [(3, 6), (6, 3)])
def test_more_seeds_are_counted_from_the_smaller_group(sizes, tmp_path):
    """Whichever of the two it is: that number of seeds of each is needed."""
    losses = [[4.0 + 0.1 * group + 0.1 * (seed % 3) for seed in range(size)] for group, size in enumerate(sizes)]
    runs = [make_run(tmp_path, f"a-{seed}", loss, seed=seed) for seed, loss in enumerate(losses[0])]
    runs += [make_run(tmp_path, f"b-{seed}", loss, seed=10 + seed, rate=0.1) for seed, loss in enumerate(losses[1])]
    *_, second = call("runs_compare", *runs).records
    assert (second["difference.method"], second["verdict"]) == ("welch", "cannot tell")
    assert second["more_seeds"] == welch_difference(*losses).seeds_needed() - 3


@pytest.mark.parametrize(
    ("at", "words"), [("flops", "7.68e+06 FLOPs"), ("steps", "20 steps"), ("end", "each run's end")]
)
def test_the_place_is_the_last_one_that_all_reached(at, words, tmp_path):
    """On each axis; a run that went further is interpolated, and with `end` each is taken as it ended."""
    runs = [make_run(tmp_path, "a", 5.0, 4.0), make_run(tmp_path, "b", 4.8, 4.2, 3.0, rate=0.1)]
    shown = markdown(*runs, f"--at={at}")
    assert shown[0].endswith(f" at {words}:")
    assert shown[5].startswith("| b | 1,920 | 3.000 |" if at == "end" else "| b | 1,280 | 4.200 |")


def test_a_run_without_times_cannot_be_compared_in_seconds(tmp_path):
    """Runs of earlier versions have none; the line says which axis there is."""
    done = call("runs_compare", make_run(tmp_path, "a", 5.0), "--at=seconds")
    assert (done.code, done.stdout) == (2, "")
    assert "its lines do not say at how many seconds a step is; try --at=steps" in done.stderr


def test_the_facts_of_real_runs_are_found(pipeline, tmp_path):
    """This reads what training writes; with other eval_tokens the losses would not be those of the same text."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("metrics.jsonl", "config.toml"):
            (tmp_path / name / file).write_bytes((pipeline.run / file).read_bytes())
    path = tmp_path / "b/metrics.jsonl"
    path.write_text(re.sub(r'"valid_tokens": \d+', '"valid_tokens": 1', path.read_text()))
    done = call("runs_compare", tmp_path / "a", tmp_path / "b")
    assert "differ in number of validation tokens" in done.stderr
    (record,) = done.records  # one group: the settings are the same
    assert record["words"] == ["", "same seed"]
    assert record["losses"][0] > 0
    assert record["seeds"] == [1, 1]


def test_people_see_tables(tmp_path):
    """On a terminal; what a run's settings hold cannot write there."""
    runs = [make_run(tmp_path, "a", 5.0), make_run(tmp_path, "b", 4.0)]
    (runs[1] / "config.toml").write_text('[data]\ntrain = "\\u001b[31m"\n')
    shown = call_in_terminal("runs_compare", *runs).stdout
    assert "\x1b[31m" not in shown
    assert "\\x1b[31m" in shown
    assert "Settings that differ:" in shown


def test_without_matplotlib_the_table_is_printed(tmp_path, monkeypatch):
    """Only the picture is missing, which one line says; the rest is done."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = call("runs_compare", make_run(tmp_path, "a", 4.0), "--picture", tmp_path / "p.png")
    assert (done.code, done.records[0]["losses"]) == (0, [4.0])
    assert done.stderr.startswith("no picture: ")
    assert 'pip install -e ".[plot]"' in done.stderr
    assert not (tmp_path / "p.png").exists()


def test_a_picture_is_written(tmp_path):
    """A PNG is written if asked for, also beside a run that diverged; an unknown suffix is an error."""
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path, "a", 5.0, 4.0), make_run(tmp_path, "b", 4.0, "nan", rate=0.1)]
    done = call("runs_compare", *runs, "--picture", tmp_path / "p.png")
    assert done.stderr == f"{tmp_path}/p.png: written\n"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    done = call("runs_compare", *runs, "--picture", tmp_path / "p.xyz")
    assert done.code == 2
    assert "xyz" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the directory of a run, found no metrics.jsonl in it"),
        ('{"a": 1}\n', "expected validations with metrics.val_loss, found none (set data.valid)"),
        ("{", "expected validations with metrics.val_loss, found none"),
    ],
)
def test_what_is_no_run_is_refused(content, message, tmp_path):
    """Exit 2, with a line that names the directory."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = call("runs_compare", tmp_path)
    assert (done.code, done.stdout) == (2, "")
    *_, error = done.stderr.splitlines()
    assert str(tmp_path) in error
    assert message in error
