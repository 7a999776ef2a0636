"""`transformerlm-runs verify` prints a receipt, and its exit code is the verdict."""

from __future__ import annotations

import pytest

from tests.cli.commands import call, call_in_terminal, lines_on_screen
from tests.experiments.verified_run import change_step, make_run, replay_here


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run of 12 steps with three checkpoints."""
    return make_run(tmp_path_factory.mktemp("made"))


def test_a_verified_run_is_exit_0_and_its_receipt_names_the_seed(made, monkeypatch):
    """Without --seed a new one is drawn, and with it the receipt is the same again; what is done is on stderr."""
    replay_here(monkeypatch)
    first = call("runs_verify", made.directory)
    assert first.code == 0
    (receipt,) = first.records
    assert (receipt["verdict"], receipt["share_asked_for"]) == ("verified", 0.05)
    assert "replaying steps 9 to 12" in first.stderr
    again = call("runs_verify", made.directory, f"--seed={receipt['seed']}").records[0]
    timed = {"replays"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in receipt.items() if k not in timed}


def test_a_changed_run_is_exit_1_and_says_so_in_words(made, tmp_path, monkeypatch):
    """On a terminal the receipt is text: the verdict first, then why, then what was replayed and what is not known."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    run = made.copy(tmp_path)
    change_step(run, 8, **{"metrics.val_loss": 1.0})
    done = call_in_terminal("runs_verify", run, "--seed=5")
    lines = lines_on_screen(done.stdout)
    assert done.code == 1
    assert "run: NOT verified: the run is not what it says" in lines
    assert any(line.startswith("  differs: step 8: metrics.val_loss is 1.0, but ") for line in lines)
    assert "  replayed 0.0% of 12 steps, drawn by --seed=5:" in lines


def test_bad_input_is_exit_2(tmp_path):
    """A directory that is no run is refused in one line."""
    done = call("runs_verify", tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert "expected the directory of a run, found no metrics.jsonl in it" in done.stderr
