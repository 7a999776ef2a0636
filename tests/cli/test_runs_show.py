"""`transformerlm-runs show` says what one run is, in words and as JSON."""

from __future__ import annotations

from tests.cli.commands import call, call_in_terminal
from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run


def test_a_real_run_in_words(pipeline):
    """State, losses, settings, environment, checkpoints, events, and the command that reproduces it."""
    done = call("runs_show", pipeline.run, "--output.format=text")
    assert (done.code, done.stderr) == (0, "")
    titles = [line[:14].strip() for line in done.stdout.splitlines()[1:]]
    wanted = ["state", "step", "parameters", "validation", "bits per byte", "training loss", "settings", "measured on"]
    wanted += ["environment", "checkpoints", "size", "events", "reproduce"]
    assert [title for title in titles if title] == wanted
    assert "finished, ended by max_steps" in done.stdout
    assert "model.d_model = " in done.stdout
    assert "optimizer.beta1 = " not in done.stdout  # a default
    assert "latest, best" in done.stdout
    (record,) = call("runs_show", pipeline.run).records
    assert record["state"] == "finished"
    assert record["checkpoints.latest"] == record["step"]
    assert record["environment.versions.python"]
    assert f"reproduce     {record['reproduce']}\n" in done.stdout
    assert record["reproduce"].startswith("cd ")


def test_a_run_that_trains_is_shown_as_far_as_it_is(tmp_path):
    """Without validations, checkpoints and an end; texts of its lines cannot write to the terminal."""
    directory = write_run(
        tmp_path, "a", STARTED, {"event": "environment", "host": "\x1b[31m"}, step(3, 4.0), config={"model.d_model": 8}
    )
    shown = call_in_terminal("runs_show", directory).stdout
    assert "state         interrupted\n" in shown
    assert "step          3 of 50, 192 tokens\n" in shown
    assert "environment   host \\x1b[31m\n" in shown
    assert "validation" not in shown


def test_damage_and_resumes_are_said(tmp_path):
    """Lines that are no JSON are counted, and each resume is named by its step."""
    records = [STARTED, validation(10, 4.0), {"event": "resumed", "step": 10}, validation(20, 4.5), FINISHED]
    directory = write_run(tmp_path, "a", *records)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("{{{\n")
    text = call("runs_show", directory, "--output.format=text").stdout
    assert "validation    4.000 at step 10, the lowest; 4.500 at step 20, the last\n" in text
    assert "resumed       at step 10\n" in text
    assert "damage        1 line of metrics.jsonl is no JSON object, and is left out\n" in text


def test_what_is_no_run_is_refused(tmp_path):
    """Exit 2, with a line that names the file; without a run, the line says what is expected."""
    folder = tmp_path / "folder"
    folder.mkdir()
    done = call("runs_show", folder)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == f"error: {folder}: expected the directory of a run, found no metrics.jsonl in it\n"
    assert call("runs_show").stderr.startswith("transformerlm-runs show: expected RUN, or --config FILE.toml")
