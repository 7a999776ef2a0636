"""Which run a start goes on with, and whether all ranks mean the same one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.terminal import note, plain
from cli.utils import EXIT_BAD_INPUT
from config.train import TrainConfig

if TYPE_CHECKING:
    from transformerlm.distributed.world import World

# A rank may have the same files under other names; what is in them is compared.
_PLACES = {"runs_dir", "data.train", "data.valid", "data.tokenizer", "checkpoint.init_from"}
_DATA_FACTS = (
    *("format", "tokens", "bytes", "documents", "dtype", "vocab_size", "tokenizer_sha256", "sha256", "shards"),
    *("mask_sha256", "documents_sha256"),
)
_LAUNCH = "launch.json"
_MAX_LAUNCH_BYTES = 1 << 24
_MOST_AT_ONCE = 10_000


def held_directory(config: TrainConfig, world: World, stack: ExitStack) -> Path:
    """Return the directory of the run, the same on all ranks, which rank 0 holds until `stack` ends.

    Without `logging.run_name` a new run is named after the time, by rank 0. If the launcher has started this run
    before, as torchrun does after a failure and SLURM with a job that was queued again, it goes on in its directory.

    Raises:
        FileExistsError: another process trains in it.
    """
    from transformerlm.distributed.launcher import was_requeued
    from transformerlm.distributed.world import gather_text, is_main, together
    from transformerlm.utils.lock import DirectoryLock

    name, known = config.logging.run_name or "", set[str]()
    if not name:
        ours = [one for one in _launches(config) if was_requeued() or not one.startswith("slurm")]
        known = {one for text in gather_text(json.dumps(ours), world) for one in json.loads(text)}
    with together(world):
        if is_main(world):
            before = _directory_of_launch(config.runs_dir, known) if known else None
            if before:
                note(f"{before}: this launch goes on with the run that it began")
            run_dir = config.runs_dir / name if name else before
            if run_dir:
                stack.enter_context(DirectoryLock(run_dir))
            else:
                run_dir = _held_new_directory(config.runs_dir, stack)
            name = run_dir.name
    return config.runs_dir / (config.logging.run_name or gather_text(name, world)[0])


def _held_new_directory(runs_dir: Path, stack: ExitStack) -> Path:
    """Hold and return a directory that is named after the time, with a number where runs began in the same second."""
    from transformerlm.utils.lock import DirectoryLock

    now = time.strftime("%Y%m%d-%H%M%S")
    for name in (now, *(f"{now}-{number}" for number in range(2, _MOST_AT_ONCE))):
        try:
            if not (runs_dir / name).exists():
                stack.enter_context(DirectoryLock(runs_dir / name))
                return runs_dir / name
        except FileExistsError:  # another process has taken it in this moment
            continue
    raise FileExistsError(f"{runs_dir / now}: expected a name that no run has; set logging.run_name")


@contextmanager
def remembered(config: TrainConfig, run_dir: Path, world: World) -> Iterator[None]:
    """Note in a run's directory who launched it, if it has no name of its own; forget it after an error in the block.

    An error there means that the run has not begun: then nothing of it may stay behind.
    """
    from transformerlm.distributed.world import gather_text, is_main
    from transformerlm.utils.files import write_whole

    path = run_dir / _LAUNCH
    if config.logging.run_name:
        yield
        return
    known = {one for text in gather_text(json.dumps(_launches(config)), world) for one in json.loads(text)}
    is_new = is_main(world) and bool(known) and not path.exists()
    if is_main(world) and known:
        known |= _noted(path)  # a machine that is not here now may come back without those that are
        write_whole(path, json.dumps({"launches": sorted(known)}, indent=2) + "\n")
    try:
        yield
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise


def _launches(config: TrainConfig) -> list[str]:
    """Return the names of this launch; a SLURM job may train several models in a row, so its settings belong to it."""
    from transformerlm.distributed.launcher import launches

    digest = sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()[:16]
    return [f"{one} {digest}" if one.startswith("slurm") else one for one in launches()]


def _directory_of_launch(runs_dir: Path, launches: set[str]) -> Path | None:
    """Return the newest run that one of these launches has begun."""
    notes = sorted(runs_dir.glob(f"*/{_LAUNCH}"), reverse=True)
    return next((path.parent for path in notes if launches & _noted(path)), None)


def _noted(path: Path) -> set[str]:
    """Return the launches that a run's directory names; a note that is missing or damaged names none."""
    from transformerlm.utils.json_files import read_json_object

    try:
        found = read_json_object(path, max_bytes=_MAX_LAUNCH_BYTES).get("launches")
    except (OSError, ValueError):
        return set()
    return {one for one in found if isinstance(one, str)} if isinstance(found, list) else set()


# --- the same on all ranks -----------------------------------------------------------------------------------------


def refuse_different_settings(config: TrainConfig, world: World) -> None:
    """End with exit code 2 where ranks have other settings, libraries, data files, tokenizers or initial weights.

    Raises:
        SystemExit: they differ; of each machine, one rank says so.
        OSError: a file cannot be read.
    """
    from transformerlm.distributed.handshake import difference
    from transformerlm.distributed.world import together

    if not world.is_distributed:
        return
    world.arrive("the comparison of the ranks")
    with together(world):
        facts = _facts(config)
    _refuse(difference(facts, world), world)


def refuse_different_directories(run_dir: Path, world: World) -> None:
    """End with exit code 2 where ranks do not see the same run directory with the same newest checkpoint.

    Raises:
        SystemExit: they do not; of each machine, one rank says so.
        OSError: the directory cannot be read.
    """
    from transformerlm.distributed.handshake import shared_directory

    if not world.is_distributed:
        return
    line = shared_directory(run_dir, world, look=lambda: _checkpoint_in_words(run_dir))
    _refuse(f"{line}; every machine must see one and the same runs_dir" if line else None, world)


def _refuse(line: str | None, world: World) -> None:
    """End with exit code 2, if there is a line, once one rank of each machine has said it."""
    if line is None:
        return
    from transformerlm.distributed.world import gather_text

    if not world.local_rank:
        note(f"error: {plain(line)}")
    gather_text("said", world)  # a launcher ends all ranks when the first one does
    sys.exit(EXIT_BAD_INPUT)


def _settings(config: TrainConfig) -> dict[str, str]:
    """Return the settings that must be the same on all ranks, by their dotted names."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    flat = {
        f"{section}.{key}" if isinstance(table, dict) else section: value
        for section, table in tree.items()
        for key, value in (table.items() if isinstance(table, dict) else (("", table),))
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in flat.items() if name not in _PLACES}


def _facts(config: TrainConfig) -> dict[str, str]:
    """Return what must be the same on all ranks before a run may begin, in words."""
    from transformerlm.distributed.handshake import versions
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import resolve_precision

    facts = _settings(config) | versions()
    device = resolve_device(config.training.device)  # "auto" may mean another one on another machine
    facts |= {"the device": device.type, "the precision": resolve_precision(config.training.precision, device)}
    for name, path in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        facts |= {f"{name}: {key}": value for key, value in (_data_facts(path) if path else {}).items()}
    facts["the tokenizer"] = Tokenizer.from_directory(config.data.tokenizer).fingerprint()
    if config.checkpoint.init_from:
        facts["checkpoint.init_from"] = _checkpoint_in_words(config.checkpoint.init_from)
    return facts


def _data_facts(path: Path) -> dict[str, str]:
    """Return what tells a token file from another: what its description says, its size, and a few of its blocks."""
    from transformerlm.distributed.handshake import sampled
    from transformerlm.token_files.sidecar import sidecar_path

    description = path / "index.json" if path.is_dir() else sidecar_path(path)
    if not path.exists() or not description.is_file():
        return {}  # where all ranks lack it, what opens it says more
    try:
        said = dict(json.loads(description.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        said = {"sha256": "not readable"}
    facts = {key: json.dumps(said[key]) for key in _DATA_FACTS if key in said}
    if len(facts.get("shards", "")) > 80:
        facts["shards"] = f"sha256 {sha256(facts['shards'].encode()).hexdigest()[:16]}"
    return facts | sampled(sorted(path.glob("*.npy")) if path.is_dir() else [path])


def _checkpoint_in_words(path: Path) -> str:
    """Return which checkpoint a path means, by its name and the sha256 of its state, which has those of its files."""
    from transformerlm.checkpoints.directory import list_checkpoints
    from transformerlm.checkpoints.naming import LINKS

    if path.name in LINKS and not path.exists():
        path = path.parent / "checkpoints" / path.name
    if not (path / "state.json").is_file():
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        path = next(iter(list_checkpoints(root)), path)
    try:
        state = (path / "state.json").read_bytes()
    except OSError:
        return "none" if "step-" not in path.name else f"{path.name} without a state.json"
    return f"{path.resolve().name} (sha256 {sha256(state).hexdigest()[:16]})"
