"""Which run a start goes on with, and what ranks compare."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from cli import same_run
from config.train import TrainConfig
from tests.training.test_trainer import train
from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.distributed.world import World

ALONE = World()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    clock = iter(range(1, 100))  # a second for each question, so that no two new runs share a name
    monkeypatch.setattr(same_run.time, "strftime", lambda form: f"20260101-{next(clock):06d}")


def nameless(files, folder: Path, changes: dict | None = None) -> TrainConfig:
    """Return the settings of a run without a name of its own."""
    return tiny_config(files, folder, {"logging.run_name": None, **(changes or {})})


def begin(config: TrainConfig) -> Path:
    """Begin a run as the command does, and return its directory."""
    with ExitStack() as stack:
        run_dir = same_run.held_directory(config, ALONE, stack)
        with same_run.remembered(config, run_dir, ALONE):
            pass
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def test_runs_of_the_same_second_are_runs_of_their_own(files, tmp_path, monkeypatch):
    """Whether the other one still trains or has ended; a run with a name is refused where another one trains."""
    monkeypatch.setattr(same_run.time, "strftime", lambda form: "20260101-000000")
    ended, config = begin(nameless(files, tmp_path)), nameless(files, tmp_path)
    with ExitStack() as stack:
        held = [same_run.held_directory(config, ALONE, stack).name for _ in range(2)]
        assert [ended.name, *held] == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]
        named = tiny_config(files, tmp_path)
        same_run.held_directory(named, ALONE, stack)
        with pytest.raises(FileExistsError, match="expected to be the only run here"):
            same_run.held_directory(named, ALONE, stack)


def test_a_job_that_was_queued_again_goes_on_in_its_directory(files, tmp_path, monkeypatch, capsys):
    """SLURM's number of starts tells a second start of a job from a second run in it; its settings tell runs apart."""
    config, other = nameless(files, tmp_path), nameless(files, tmp_path, {"optimizer.learning_rate": 1e-4})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first, second, with_other_settings = begin(config), begin(config), begin(other)
    assert len({first, second, with_other_settings}) == 3
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(config) == second
    assert begin(other) == with_other_settings
    assert f"{second}: this launch goes on with the run that it began" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert begin(config) not in (first, second, with_other_settings)


def test_a_machine_that_comes_back_alone_finds_the_run(files, tmp_path, monkeypatch):
    """A start without some of the launchers keeps their names: each of them can still go on with the run later."""
    config, both = nameless(files, tmp_path), ["torchrun a 1 2", "torchrun b 3 4"]
    here = list(both)
    monkeypatch.setattr(same_run, "_launches", lambda config: here)
    run_dir = begin(config)
    for alone in both[::-1]:
        here[:] = [alone]
        assert begin(config) == run_dir
    assert json.loads((run_dir / "launch.json").read_text()) == {"launches": both}


def test_a_start_that_nobody_repeats_leaves_no_note(files, tmp_path, monkeypatch):
    """A plain start, and a run with a name, keep no record of who launched them."""
    assert list(begin(nameless(files, tmp_path)).iterdir()) == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert begin(tiny_config(files, tmp_path)) == tmp_path / "run"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_did_not_begin_is_forgotten(files, tmp_path, monkeypatch):
    """An error before the first step removes the note of a new run, and leaves that of one that had begun."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = nameless(files, tmp_path)
    run_dir = begin(config)
    note = (run_dir / "launch.json").read_text()
    for directory, is_left in ((tmp_path, False), (run_dir, True)):
        with pytest.raises(ValueError, match="refused"), same_run.remembered(config, directory, ALONE):
            raise ValueError("refused")
        assert (directory / "launch.json").exists() == is_left
    assert (run_dir / "launch.json").read_text() == note


@pytest.mark.parametrize("damage", ["", "[]", '{"launches": 3}', '{"launches": [[]]}', '"x"'])
def test_a_note_that_somebody_damaged_is_no_note(damage, files, tmp_path, monkeypatch):
    """A launch.json that cannot be read belongs to nobody: the older run that can be is found."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = nameless(files, tmp_path)
    whole, damaged = begin(config), begin(config)
    (damaged / "launch.json").write_text(damage)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(config) == whole


def test_places_may_differ_and_nothing_else(files, tmp_path):
    """Copies of the same files under other names are the same run; each other setting is compared."""
    (tmp_path / "copies").mkdir()
    here = tiny_config(files, tmp_path / "runs")
    for name in ("train", "valid"):
        for suffix in (".npy", ".json"):
            shutil.copy(getattr(files, name).with_suffix(suffix), tmp_path / f"copies/{name}{suffix}")
    shutil.copytree(files.tokenizer, tmp_path / "copies/tokenizer")
    data = {f"data.{name}": str(tmp_path / f"copies/{name}.npy") for name in ("train", "valid")}
    there = tiny_config(files, tmp_path / "other", data | {"data.tokenizer": str(tmp_path / "copies/tokenizer")})
    facts = same_run._facts(here)
    assert facts == same_run._facts(there)
    assert {"the tokenizer", "the version of torch", "data.train: sha256", "data.valid: tokens"} <= facts.keys()
    keys = {
        f"{section}.{key}" for section, table in here.model_dump().items() if isinstance(table, dict) for key in table
    }
    assert keys - facts.keys() == {"data.train", "data.valid", "data.tokenizer", "checkpoint.init_from"}


@pytest.mark.parametrize("change", ["a byte", "the length", "the sidecar", "no file", "no sidecar", "no valid"])
def test_a_copy_that_differs_is_noticed(change, files, tmp_path):
    """A damaged, shorter, described otherwise or missing copy has other facts than the whole one."""
    shutil.copytree(files.train.parent, tmp_path / "data")
    path = tmp_path / "data/train.npy"
    whole = tiny_config(files, tmp_path)
    copy = tiny_config(
        files, tmp_path, {"data.train": str(path)} | ({"data.valid": None} if change == "no valid" else {})
    )
    if change == "a byte":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    elif change == "the length":
        path.write_bytes(path.read_bytes()[:-2])
    elif change == "the sidecar":
        path.with_suffix(".json").write_text(json.dumps({"sha256": "0"}))
    elif change == "no file":
        path.unlink()
    elif change == "no sidecar":
        path.with_suffix(".json").unlink()
    assert same_run._facts(copy) != same_run._facts(whole)


def test_a_checkpoint_is_known_by_its_state(files, tmp_path):
    """A run, its best and a checkpoint name the same one alike; a change of its state, or none at all, is seen."""
    train(tiny_config(files, tmp_path, {"training.max_steps": 5}))
    run = tmp_path / "run"
    said = same_run._checkpoint_in_words(run)
    assert said.startswith("step-00000005 (sha256 ")
    for path in (run / "checkpoints", run / "checkpoints/step-00000005", run / "latest", run / "best"):
        assert same_run._checkpoint_in_words(path) == said
    state = run / "checkpoints/step-00000005/state.json"
    state.write_text(state.read_text() + " ")
    assert same_run._checkpoint_in_words(run) not in (said, "none")
    state.unlink()
    assert same_run._checkpoint_in_words(run) == "step-00000005 without a state.json"
    assert same_run._checkpoint_in_words(tmp_path / "nothing") == "none"
