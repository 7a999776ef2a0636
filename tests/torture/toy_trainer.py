"""A toy trainer that keeps the contract of the real one, and a list of bugs that can be switched on.

It proves that the harness passes what is right and catches what is wrong. Standard library only, so that it starts in
a moment:

    python toy_trainer.py --config train.toml --section.key=value ... --bug=NAME
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

BUGS: set[str] = set()
SIZE = 512


def bug(name: str) -> bool:
    """Return whether this bug is switched on."""
    return name in BUGS


def say(record: dict[str, Any], metrics: Path) -> None:
    """Write a line to the log file and to stdout."""
    line = json.dumps(record) + "\n"
    with metrics.open("a") as file:
        file.write(line)
    print(line, end="", flush=True)


def digest(data: bytes) -> str:
    """Return the sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def of_values(values: dict[str, Any]) -> str:
    """Return the sha256 of a JSON object's values, besides the one that it records itself."""
    return digest(json.dumps({key: value for key, value in values.items() if key != "own"}, sort_keys=True).encode())


def write(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            if not bug("no_fsync"):
                os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def sync_directory(path: Path) -> None:
    """Flush a directory to disk."""
    if not bug("no_fsync") and not bug("no_directory_fsync"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def tensors(values: list[float]) -> bytes:
    """Return a safetensors file of one tensor."""
    header = {"w": {"dtype": "F64", "shape": [len(values)], "data_offsets": [0, 8 * len(values)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(values)}d", *values)


def values_of(path: Path) -> list[float]:
    """Return the tensor in a safetensors file."""
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    return list(struct.unpack_from(f"<{(len(data) - start) // 8}d", data, start))


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


class Toy:
    """The state of a run, and its steps."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.run = Path(config.get("runs_dir", "runs")) / config["logging"]["run_name"]
        self.root, self.metrics = self.run / "checkpoints", self.run / "metrics.jsonl"
        self.root.mkdir(parents=True, exist_ok=True)
        self.step, self.resumed, self.stopped_by = 0, False, 0
        seed = hash("seed") if bug("hash_seed") else time.time_ns() // 10**15 if bug("clock_seed") else 1
        self.rng = random.Random(seed)
        self.weights, self.momentum = [0.01 * index for index in range(SIZE)], [0.0] * SIZE

    # --- data and lock -------------------------------------------------------------------------------------------

    def read_data(self) -> None:
        """Read the token file, refusing one that is not what its sidecar says."""
        path, sidecar = Path("data/train.npy"), Path("data/train.json")
        vocabulary = Path("data/tokenizer/vocab.json")
        self.data = path.read_bytes()
        if bug("data_not_checked"):
            return
        try:
            facts = json.loads(sidecar.read_text())
        except ValueError:
            raise ValueError(f"{sidecar}: not JSON") from None
        if facts.get("own") != of_values(facts):
            raise ValueError(f"{sidecar}: damaged")
        for file, key in ((path, "sha256"), (vocabulary, "tokenizer_sha256")):
            if digest(file.read_bytes()) != facts[key]:
                raise ValueError(f"{file}: damaged")

    def lock(self) -> None:
        """Hold the run directory until the process dies."""
        path = self.run / ".lock"
        if bug("no_lock"):
            return
        if bug("pid_lock"):
            if path.exists():
                raise FileExistsError(f"{self.run}: process {path.read_text()} trains here")
            path.write_text(str(os.getpid()))
            return
        self.held = path.open("a+")
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{self.run}: process {path.read_text()} trains here") from None
        self.held.truncate(0)
        self.held.write(str(os.getpid()))
        self.held.flush()

    # --- saving --------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """Return what goes into a checkpoint."""
        files = {"model.safetensors": tensors(self.weights), "optimizer.safetensors": tensors(self.momentum)}
        if bug("stale_weights") and self.step == self.config["training"]["max_steps"]:
            files["model.safetensors"] = tensors(self.momentum)
        state: dict[str, Any] = {"step": self.step, "rng": self.rng.getstate()}
        state["sha256"] = {name: digest(data) for name, data in files.items()}
        state = json.loads(json.dumps(state))
        return {**files, "state.json": json.dumps({**state, "own": of_values(state)}).encode()}

    def announce(self) -> None:
        """Say that the step's checkpoint is on disk."""
        say({"event": "checkpoint_saved", "step": self.step}, self.metrics)

    def save(self) -> None:
        """Write the checkpoint beside its place, flush, rename, flush, announce, remove older ones."""
        final = self.root / f"step-{self.step:08d}"
        temporary = final if bug("in_place") else self.root / f"{final.name}.tmp"
        if bug("stale_temporaries"):
            temporary = self.root / f"{final.name}.tmp{os.getpid()}"
        if bug("announced_early"):
            self.announce()
        if bug("delete_first"):
            self.prune(keep=0)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in self.files().items():
            write(temporary / name, data)
            time.sleep(0.001)  # a large model takes long to write
        sync_directory(temporary)
        if temporary != final:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        if not bug("no_parent_fsync"):
            sync_directory(self.root)
        self.link(final)
        if not bug("announced_early"):
            self.announce()
        self.prune(keep=self.config["checkpoint"]["keep"])

    def link(self, final: Path) -> None:
        """Let `latest` point to a checkpoint."""
        link = self.root / "latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self.root / "latest")

    def prune(self, *, keep: int) -> None:
        """Remove all but the newest checkpoints."""
        saved = sorted(self.root.glob("step-????????"))
        for path in saved[: len(saved) - keep]:
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp-removed")))

    # --- finding and loading -------------------------------------------------------------------------------------

    def candidates(self) -> list[Path]:
        """Return the checkpoints, the one to try first at first."""
        saved = sorted(self.root.glob("step-????????"), reverse=True)
        if bug("newest_by_mtime"):
            saved.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        if bug("newest_by_link") and (self.root / "latest").exists():
            saved.insert(0, (self.root / "latest").resolve())
        return saved

    def check(self, path: Path) -> dict[str, Any]:
        """Return a checkpoint's state, refusing a damaged one."""
        try:
            state = json.loads((path / "state.json").read_bytes())
            if bug("not_checked"):
                return state
            if state["own"] != of_values(state):
                raise Damaged(f"{path}/state.json: damaged")
            for name, expected in state["sha256"].items():
                if digest((path / name).read_bytes()) != expected:
                    raise Damaged(f"{path}/{name}: damaged")
        except Damaged:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            if bug("traceback"):
                raise RuntimeError from error
            name = Path(error.filename).name if isinstance(error, OSError) else "state.json"
            raise Damaged(f"{path}/{name}: cannot be read") from None
        return state

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        if not bug("stale_temporaries"):
            for path in self.root.glob("*.tmp*"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        problem = None
        for path in self.candidates():
            try:
                state = self.check(path)
            except Damaged as error:
                problem = error
                path.rename(path.with_name(f"{path.name}.bad"))
                continue
            if problem and not bug("silent"):
                print(f"{problem}; using {path.name}", file=sys.stderr)
            self.load(path, state)
            break
        if self.metrics.exists() and not bug("metrics_twice"):
            last = self.step - bug("metrics_cut_too_far")
            lines = [line for line in self.metrics.read_text().splitlines() if json.loads(line)["step"] <= last]
            beside = self.metrics.with_suffix(".tmp")
            beside.write_text("".join(f"{line}\n" for line in lines))
            beside.replace(self.metrics)
        if self.resumed:
            say({"event": "resumed", "step": self.step}, self.metrics)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        self.step, self.resumed = state["step"], True
        self.weights = values_of(path / "model.safetensors")
        if not bug("optimizer_not_restored"):
            self.momentum = values_of(path / "optimizer.safetensors")
        if not bug("rng_not_restored"):
            version, words, gauss = state["rng"]
            self.rng.setstate((version, tuple(words), gauss))

    # --- training ------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """Make one step on the window that the step's number chooses, with some noise."""
        step = self.step + 1
        position = step + (self.resumed and bug("data_off_by_one"))
        rate = 0.01 / (step - (self.resumed and bug("lr_off_by_one")) + 1)
        window = [self.data[(position * 31 + index) % len(self.data)] / 256 for index in range(SIZE)]
        error = sum(weight * x for weight, x in zip(self.weights, window, strict=True)) / SIZE - 1 + self.rng.random()
        gradient = [error * x for x in window]
        loss, norm = error * error, math.sqrt(sum(g * g for g in gradient))
        if step == self.config["training"].get("explode_at"):
            loss = norm = math.nan
            gradient = [math.nan] * SIZE
            if not bug("saves_nan"):
                raise FloatingPointError(f"step {step}: loss {loss}: not finite")
        self.momentum = [0.9 * m + g for m, g in zip(self.momentum, gradient, strict=True)]
        self.weights = [w - rate * m for w, m in zip(self.weights, self.momentum, strict=True)]
        self.step = step
        return {"step": step, "metrics.loss": loss, "metrics.lr": rate, "metrics.grad_l2_norm": norm}

    def train(self) -> int:
        """Train to the last step or a signal, and return the exit code."""
        steps, interval = self.config["training"]["max_steps"], self.config["checkpoint"]["interval"]
        if bug("saves_rarely"):
            interval *= 3
        for number in (signal.SIGINT, signal.SIGTERM):
            if not bug("signals_ignored"):
                signal.signal(number, self.stop)
        while self.step < steps and not self.stopped_by:
            say(self.train_step(), self.metrics)
            time.sleep(self.config["training"].get("step_seconds", 0.001))
            stopping = self.stopped_by and not bug("signal_without_save")
            if stopping or self.step == steps or self.step % interval == 0:
                self.try_to_save()
        return 128 + self.stopped_by if self.stopped_by and not bug("signal_exits_0") else 0

    def try_to_save(self) -> None:
        """Save; a bug hides that it failed."""
        try:
            self.save()
        except OSError:
            shutil.rmtree(self.root / f"step-{self.step:08d}.tmp", ignore_errors=True)
            if not bug("failed_save_exits_0"):
                raise
            sys.exit(0)

    def stop(self, number: int, frame: object) -> None:
        """Note the first signal; let the second end the process."""
        self.stopped_by = number
        print(f"signal {number}: saving", file=sys.stderr, flush=True)
        for each in (signal.SIGINT, signal.SIGTERM):
            if not bug("second_signal_ignored"):
                signal.signal(each, signal.SIG_DFL)


def configuration(arguments: list[str]) -> dict[str, Any]:
    """Return the TOML of `--config` with `--section.key=value` applied; `--bug=name` switches bugs on."""
    config: dict[str, Any] = tomllib.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if name == "bug":
            BUGS.add(value)
        elif equals:
            section, _, key = name.rpartition(".")
            try:
                parsed = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                parsed = value
            (config.setdefault(section, {}) if section else config)[key] = parsed
    return config


def main() -> int:
    """Run the command; a problem is one line on stderr."""
    try:
        toy = Toy(configuration(sys.argv[1:]))
        toy.lock()
        toy.read_data()
        toy.resume()
        return toy.train()
    except (ValueError, OSError, FloatingPointError) as error:
        name = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {name}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2 if isinstance(error, ValueError) else 1


def write_data(folder: Path) -> None:
    """Write a token file, its sidecar and a tokenizer."""
    (folder / "tokenizer").mkdir(parents=True)
    data, vocabulary = random.Random(0).randbytes(4096), json.dumps({f"token {index}": index for index in range(99)})
    (folder / "train.npy").write_bytes(data)
    (folder / "tokenizer" / "vocab.json").write_text(vocabulary)
    facts = {"sha256": digest(data), "tokenizer_sha256": digest(vocabulary.encode())}
    (folder / "train.json").write_text(json.dumps({**facts, "own": of_values(facts)}))


if __name__ == "__main__":
    sys.exit(main())
