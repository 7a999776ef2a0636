"""Checkpoints are whole or not there, and what is loaded is what was saved."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from config.io import dump_toml
from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.checkpoints import save, validation
from transformerlm.checkpoints.directory import (
    list_checkpoints,
    newest_whole,
    point,
    prune,
    remove_leftovers,
    resolve,
    restore_links,
    set_aside,
    step_name,
    step_of,
)
from transformerlm.checkpoints.load import load_config_of, load_model, load_optimizer, load_tokenizer, load_weights
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.checkpoints.validation import FORMAT, CheckpointError, verify
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.loss import cross_entropy
from transformerlm.training.optim import AdamW, parameter_groups
from transformerlm.utils import files as disk
from transformerlm.utils.json_files import values_sha256

ABLATIONS = {
    "default": {},
    "tied": {"model.tie_embeddings": True},
    "post-norm": {"model.norm_position": "post"},
    "no-norm": {"model.norm_position": "none"},
    "nope": {"model.position": "none"},
    "silu": {"model.ffn": "silu"},
    "grouped": {"model.num_kv_heads": 1},
    "qk-norm": {"model.qk_norm": True},
    "soft-cap": {"model.logit_soft_cap": 20.0},
    "reference": {"model.attention": "reference"},
    "recompute": {"model.activation_checkpointing": True},
    "all": {"model.tie_embeddings": True, "model.num_kv_heads": 1, "model.qk_norm": True, "model.ffn": "silu"},
}
FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.toml",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens.json",
]


def make_snapshot(files: TinyFiles, changes: dict | None = None, *, steps: int = 2) -> Snapshot:
    """Return a model after a few steps, with its optimizer and all else that a checkpoint holds."""
    config = tiny_config(files, Path("runs"), changes)
    model = TransformerLM(**config.model.model_dump())
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), 1e-2)
    snapshot = Snapshot(model, optimizer, Tokenizer.from_directory(files.tokenizer), dump_toml(config), {"tokens": 7})
    for _ in range(steps):
        take_step(snapshot)
    return snapshot


def take_step(snapshot: Snapshot) -> None:
    """Make one optimizer step on fixed ids."""
    ids = torch.arange(24).view(2, 12)
    cross_entropy(snapshot.model(ids), ids + 1).backward()
    snapshot.optimizer.step()
    snapshot.optimizer.zero_grad()


def two_checkpoints(root: Path, files: TinyFiles) -> tuple[Path, Path]:
    """Save steps 1 and 2 of a run, and return their directories."""
    snapshot = make_snapshot(files)
    return save_checkpoint(root, 1, snapshot), save_checkpoint(root, 2, snapshot)


# --- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATIONS)
def test_model_and_optimizer_come_back_bit_for_bit(name, files, tmp_path):
    """A loaded model gives the saved one's logits, and its next optimizer step is the same, for every kind of model."""
    saved = make_snapshot(files, ABLATIONS[name])
    directory = save_checkpoint(tmp_path, 2, saved)
    model = load_model(directory)
    ids = torch.arange(16).unsqueeze(0)
    assert not model.training
    torch.testing.assert_close(model(ids), saved.model.eval()(ids), rtol=0, atol=0)

    fresh = make_snapshot(files, ABLATIONS[name], steps=0)
    load_weights(fresh.model, directory)
    load_optimizer(fresh.optimizer, directory, verify(directory))
    for snapshot in (saved, fresh):
        snapshot.model.train()
        take_step(snapshot)
    torch.testing.assert_close(fresh.model.state_dict(), saved.model.state_dict(), rtol=0, atol=0)


def test_state_config_and_tokenizer_come_back(files, tmp_path):
    """The state's values, the configuration and the tokenizer are those that were saved."""
    snapshot = make_snapshot(files)
    directory = save_checkpoint(tmp_path, 2, snapshot)
    state = verify(directory)
    assert (state["step"], state["tokens"], state["format"]) == (2, 7, FORMAT)
    assert dump_toml(load_config_of(directory)) == snapshot.config_toml
    assert load_tokenizer(directory).fingerprint() == snapshot.tokenizer.fingerprint()


def test_directory_is_self_contained_and_holds_no_pickle(files, tmp_path):
    """A checkpoint holds exactly the documented files, stands alone when moved, and has no pickle or zip."""
    directory = save_checkpoint(tmp_path / "here", 2, make_snapshot(files)).rename(tmp_path / "elsewhere")
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert names == sorted(FILES)
    assert all((directory / name).read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04") for name in names)
    load_model(directory)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_that_the_umask_gives(mask, files, tmp_path):
    """Every file of a checkpoint can be read by those whom the user's umask allows, the tensors too."""
    old = os.umask(mask)
    try:
        directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    finally:
        os.umask(old)
    assert {(directory / name).stat().st_mode & 0o777 for name in FILES} == {0o666 & ~mask}


def test_dtype_and_tying_survive_loading(files, tmp_path):
    """`dtype` casts the weights, and a tied head is stored once."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files, ABLATIONS["tied"]))
    model = load_model(directory, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head is None


def test_weights_of_another_model_are_refused(files, tmp_path):
    """Weights whose names or shapes are not the model's are refused by name, and nothing is loaded."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn"):
        load_weights(make_snapshot(files, {"model.num_layers": 3}, steps=0).model, directory)
    with pytest.raises(CheckpointError, match=r"expected shape \(128, 32\), found \(64, 32\)"):
        load_weights(make_snapshot(files, {"model.d_ff": 128}, steps=0).model, directory)


# --- damage ------------------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    """Flip the lowest bit of a digit or letter in the middle of a file: a damage that text formats survive."""
    data = bytearray(path.read_bytes())
    binary = path.suffix == ".safetensors"
    place = next(i for i in range(len(data) // 2, len(data)) if binary or data[i : i + 1].isalnum())
    data[place] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut off the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"flipped": flip_bit, "cut": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_older_checkpoint_used(name, damage, files, tmp_path):
    """A file that is missing, cut or has one bit flipped sets its checkpoint aside; the one before it is found."""
    older, newer = two_checkpoints(tmp_path, files)
    DAMAGES[damage](newer / name)
    with pytest.raises(CheckpointError):
        load_model(newer)
    warnings: list[str] = []
    assert newest_whole(tmp_path, warn=warnings.append) == older
    assert (tmp_path / "step-00000002.bad").is_dir()
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert warnings[0].endswith("set aside as step-00000002.bad, step-00000001 is used instead")
    assert "\n" not in warnings[0]


def test_many_damaged_checkpoints_are_kept_apart(files, tmp_path):
    """A second damaged checkpoint of the same step gets its own `.bad` name; none is overwritten."""
    snapshot = make_snapshot(files)
    older = save_checkpoint(tmp_path, 1, snapshot)
    for _ in range(3):
        (save_checkpoint(tmp_path, 2, snapshot) / "state.json").unlink()
        assert newest_whole(tmp_path, warn=lambda line: None) == older
    assert sorted(path.name for path in tmp_path.glob("*.bad*")) == [f"step-00000002.bad{n}" for n in ("", 2, 3)]


def test_damage_to_all_checkpoints_is_refused_each_time(files, tmp_path):
    """Each is named and stays where it is, so that the next start refuses, too; so do those set aside before."""
    for directory in two_checkpoints(tmp_path, files):
        DAMAGES["missing"](directory / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"found .*step-00000002.*step-00000001") as caught:
            newest_whole(tmp_path)
        assert f"to begin anew, remove {tmp_path.parent} or choose another logging.run_name" in str(caught.value)
    for directory in list_checkpoints(tmp_path):
        set_aside(directory)
    with pytest.raises(CheckpointError, match=r"step-00000002\.bad: set aside as damaged before"):
        newest_whole(tmp_path)


HOSTILE = {
    "list": "[]",
    "number": "7",
    "deep": "[" * 100_000,
    "not-utf8": b"\xff\xfe\x00",
    "empty": "",
    "no-step": '{"format": 1, "sha256": {}}',
    "text-step": '{"format": 1, "step": "2", "sha256": {}}',
    "true-step": '{"format": 1, "step": true, "sha256": {}}',
    "list-sha": '{"format": 1, "step": 2, "sha256": []}',
    "no-files": '{"format": 1, "step": 2, "sha256": {}}',
    "escape": '{"format": 1, "step": 2, "sha256": {"../../state.json": "00"}}',
    "huge-number": '{"format": 1, "step": ' + "9" * 5000 + ', "sha256": {}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_state_is_a_checkpoint_error(name, files, tmp_path):
    """Whatever stands in `state.json`, reading it raises CheckpointError in one line and nothing else."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    text = HOSTILE[name]
    if isinstance(text, str) and text.startswith("{") and name != "huge-number":  # by somebody who knows the format
        state = json.loads(text)
        text = json.dumps({**state, "state_sha256": values_sha256(state, kept_in="state_sha256")})
    (directory / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        verify(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["tokens", "step", "optimizer", "sha256"])
def test_a_changed_value_in_the_state_is_found(key, files, tmp_path):
    """`state.json` is covered by a checksum of its own: a value that was edited or rotted is noticed."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    state = json.loads((directory / "state.json").read_text())
    state[key] = state[key] + 1 if isinstance(state[key], int) else {**state[key], "more": "00"}
    (directory / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json|more"):
        verify(directory)


def test_another_format_is_refused_and_not_set_aside(files, tmp_path):
    """A checkpoint of a newer version is not damage: it is refused with both numbers and stays where it is."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, found 2"):
        newest_whole(tmp_path)
    assert directory.is_dir()


# --- interrupted saves -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the moment at which the process stops."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the file-system operation after the `number`-th raise: writing, flushing, renaming, linking."""
    left = [number]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (save, "save_file"),
        (save, "file_sha256"),
        (validation, "file_sha256"),
        *((Path, name) for name in ("write_text", "mkdir", "rename", "replace", "symlink_to", "unlink")),
    ]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(os, "fsync", counted(lambda descriptor: None))  # the real one is slow and changes nothing here


@pytest.mark.parametrize("cleans_up", [True, False], ids=["exception", "kill"])
def test_a_save_stopped_at_any_operation_leaves_a_whole_checkpoint(cleans_up, files, tmp_path, monkeypatch):
    """Whichever operation is the last one, what has a checkpoint's name is whole, and the older one is still there."""
    snapshot, number, finished = make_snapshot(files), 0, False
    while not finished:
        root = tmp_path / str(number)
        older = save_checkpoint(root, 1, snapshot)
        with monkeypatch.context() as patch:
            if not cleans_up:
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            interrupt_after(patch, number)
            try:
                save_checkpoint(root, 2, snapshot)
                finished = True
            except Killed:
                pass
        named = list_checkpoints(root)
        assert older in named
        for directory in named:
            verify(directory)
        remove_leftovers(root)
        assert not [path.name for path in root.iterdir() if ".tmp" in path.name]
        assert newest_whole(root) == named[0]
        number += 1
    assert number > 20  # there were that many places to stop at


def test_an_interrupted_clean_up_leaves_nothing_that_looks_whole(files, tmp_path, monkeypatch):
    """`prune` renames before it removes: stopped half-way, the rest of a checkpoint has no checkpoint's name."""
    _, newer = two_checkpoints(tmp_path, files)

    def remove_one_file(directory, **kwargs):
        (Path(directory) / "model.safetensors").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", remove_one_file)
    with pytest.raises(Killed):
        prune(tmp_path, keep=1)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [newer]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sigkill_at_any_moment_leaves_whole_checkpoints(files, tmp_path):
    """A process that saves without pause and is killed at random moments never leaves a damaged checkpoint behind."""
    snapshot, rng = make_snapshot(files), random.Random(0)
    save_checkpoint(tmp_path, 1, snapshot)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            step = step_of(list_checkpoints(tmp_path)[0])
            while True:
                step += 1
                save_checkpoint(tmp_path, step, snapshot)
                prune(tmp_path, 2)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = list_checkpoints(tmp_path)
        assert found
        for directory in found:
            verify(directory)
        remove_leftovers(tmp_path)


def test_everything_is_durable_before_the_name_appears(files, tmp_path, monkeypatch):
    """Files and directories are flushed before the rename, parents after it; then all is read back, then announced."""
    events: list[tuple[str, str]] = []
    sync, rename, real_point, real_verify = disk.sync, Path.rename, save.point, save.verify
    monkeypatch.setattr(disk, "sync", lambda path: (events.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append(("rename", path.name)), rename(path, to))[1])
    monkeypatch.setattr(save, "verify", lambda path: (events.append(("verify", path.name)), real_verify(path))[1])
    monkeypatch.setattr(save, "point", lambda link, to: (events.append(("point", link.name)), real_point(link, to)))
    root = tmp_path / "checkpoints"
    save_checkpoint(root, 2, make_snapshot(files))
    renamed = events.index(("rename", "step-00000002.tmp"))
    before = {name for kind, name in events[:renamed] if kind == "sync"}
    assert before >= {Path(name).name for name in FILES} | {"tokenizer", "step-00000002.tmp"}
    after = [("sync", name) for name in ("checkpoints", tmp_path.name, tmp_path.parent.name)]
    assert events[renamed + 1 :] == [*after, ("verify", "step-00000002"), ("point", "latest")]


def test_a_full_disk_raises_and_leaves_nothing_behind(files, tmp_path, monkeypatch):
    """When a write fails the error reaches the caller, the half-written directory goes, and older ones stay."""
    snapshot = make_snapshot(files)
    older = save_checkpoint(tmp_path, 1, snapshot)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, snapshot)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", older.name]


def test_what_the_disk_does_not_give_back_is_not_announced(files, tmp_path, monkeypatch):
    """A save that reads back otherwise than it was written is set aside, and the one before stays the newest."""
    snapshot = make_snapshot(files)
    older = save_checkpoint(tmp_path, 1, snapshot)
    rotten = "model.safetensors"
    monkeypatch.setattr(disk, "forget_cached", lambda path: flip_bit(path) if path.name == rotten else None)
    with pytest.raises(
        OSError, match=r"model\.safetensors is damaged.*does not give back.*older checkpoints are whole"
    ):
        save_checkpoint(tmp_path, 2, snapshot)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", older.name, "step-00000002.bad"]
    assert (tmp_path / "latest").resolve() == older.resolve()
    assert newest_whole(tmp_path) == older


def test_saving_a_step_again_sets_the_old_one_aside(files, tmp_path):
    """A directory that has the name already is never written over."""
    first = save_checkpoint(tmp_path, 2, make_snapshot(files))
    (first / "note.txt").write_text("mine")
    again = save_checkpoint(tmp_path, 2, make_snapshot(files))
    verify(again)
    assert not (again / "note.txt").exists()
    assert (tmp_path / "step-00000002.bad" / "note.txt").exists()


# --- finding and keeping -----------------------------------------------------------------------------------------


def empty_checkpoints(root: Path, steps: list[int]) -> list[Path]:
    """Make directories with the names of checkpoints."""
    directories = [root / step_name(step) for step in steps]
    for directory in directories:
        directory.mkdir(parents=True)
        (directory / "state.json").write_text("{}")
    return directories


@pytest.mark.parametrize("by_link", [True, False], ids=["link", "file"])
def test_prune_keeps_the_newest_and_the_best(by_link, tmp_path, monkeypatch):
    """All but the newest `keep` are removed, except the one that `best` names, by a link or by a file."""
    directories = empty_checkpoints(tmp_path, [1, 2, 3, 4, 5])
    if not by_link:
        monkeypatch.setattr(Path, "symlink_to", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no right")))
    point(tmp_path / "best", directories[1])
    assert (tmp_path / "best").is_symlink() == by_link
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [step_name(n) for n in (2, 4, 5)]


def test_order_is_by_step_not_by_name(tmp_path):
    """Steps beyond eight digits are newer, though their names sort before; other names are not checkpoints."""
    empty_checkpoints(tmp_path, [99_999_999, 100_000_000, 5])
    for name in ("step-00000009.tmp", "step-00000009.bad", "step-9", "other"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100_000_000, 99_999_999, 5]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("by_link", [True, False], ids=["link", "file"])
def test_resolve_takes_every_way_to_name_a_checkpoint(by_link, tmp_path, monkeypatch):
    """A run, its `checkpoints`, one checkpoint, `latest` and `best` all lead to a checkpoint's directory."""
    root = tmp_path / "run" / "checkpoints"
    older, newer = empty_checkpoints(root, [1, 2])
    monkeypatch.setattr("transformerlm.checkpoints.directory.verify", lambda directory: {})
    if not by_link:
        monkeypatch.setattr(Path, "symlink_to", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no right")))
    point(root / "latest", newer)
    point(root / "best", older)
    names = {"run": newer, "run/checkpoints": newer, "run/checkpoints/step-00000001": older}
    for name, expected in (names | {"run/latest": newer, "run/best": older}).items():
        assert resolve(tmp_path / name) == expected
    assert resolve(root / "latest").resolve() == newer.resolve()
    assert resolve(root / "best").resolve() == older.resolve()


def test_a_run_without_validation_has_no_best(tmp_path):
    """`RUN/best` of a run that saved no validation loss is refused in words; a run that is called best is a run."""
    empty_checkpoints(tmp_path / "best" / "checkpoints", [1])
    with pytest.raises(CheckpointError, match="best: expected one checkpoint to be best, found none"):
        resolve(tmp_path / "best" / "best")
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is whole"), pytest.warns(match="older one"):
        resolve(tmp_path / "best")


def test_resolve_passes_over_damage_with_a_warning(files, tmp_path):
    """A reader of a run gets its newest whole checkpoint and a warning that names the damaged one, which stays."""
    older, newer = two_checkpoints(tmp_path, files)
    DAMAGES["missing"](newer / "model.safetensors")
    with pytest.warns(UserWarning, match=r"2: model\.safetensors is missing; step-00000001 is used instead"):
        assert resolve(tmp_path) == older
    assert newer.is_dir()
    DAMAGES["missing"](older / "config.toml")
    with (
        pytest.warns(UserWarning, match="there is no older one"),
        pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"),
    ):
        resolve(tmp_path)


def test_resolve_says_what_it_found_instead(tmp_path):
    """A missing directory and one without checkpoints are told apart, each in one line."""
    with pytest.raises(CheckpointError, match="no such checkpoint or run directory"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found neither"):
        resolve(tmp_path)


def test_moving_a_link_is_one_rename(tmp_path):
    """`point` replaces an existing link, a dangling one too, without a moment at which there is none."""
    first, second = empty_checkpoints(tmp_path, [1, 2])
    point(tmp_path / "latest", first)
    shutil.rmtree(first)
    point(tmp_path / "latest", second)
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_directory_in_the_place_of_a_link_gives_way(tmp_path):
    """`point` sets aside what a copy has put where the link belongs, and leaves nothing temporary."""
    (target,) = empty_checkpoints(tmp_path, [1])
    (tmp_path / "best").mkdir()
    point(tmp_path / "best", target)
    assert (tmp_path / "best").resolve() == target.resolve()
    assert (tmp_path / "best.bad").is_dir()
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("own", ["whole", "damaged", "missing"])
def test_copied_links_become_links_again(own, files, tmp_path):
    """A copy that followed links has directories for links: one copy of each step stays, a whole one."""
    for directory in two_checkpoints(tmp_path, files):
        link = tmp_path / ("best" if directory.name.endswith("1") else "latest")
        link.unlink(missing_ok=True)
        shutil.copytree(directory, link)
    if own == "damaged":
        DAMAGES["missing"](tmp_path / "step-00000001/model.safetensors")
    elif own == "missing":
        shutil.rmtree(tmp_path / "step-00000001")
    restore_links(tmp_path)
    assert (tmp_path / "best").is_symlink()
    assert (tmp_path / "latest").is_symlink()
    assert verify((tmp_path / "best").resolve())["step"] == 1
    names = ["best", "latest", "step-00000001", "step-00000001.bad", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        name for name in names if own == "damaged" or name[-1] != "d"
    ]
