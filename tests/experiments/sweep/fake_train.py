"""A stand-in for transformerlm-train that needs no torch: it makes steps, saves, resumes exactly, and obeys signals.

    python fake_train.py CONFIG [--fail NAME] [--seconds S]

Its losses are a function of the learning rate, the seed and the step. Each step that it makes is a line of `made.txt`
with the number of its start, so that tests see what was made twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import tomllib
from pathlib import Path

from transformerlm.utils.lock import DirectoryLock


def main(path: str, *options: str) -> None:
    """Train the run of a TOML file."""
    config = tomllib.loads(Path(path).read_text())
    run_dir = Path(config["runs_dir"]) / config["logging"]["run_name"]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    try:
        with DirectoryLock(run_dir):
            code = train(config, run_dir, stopped, options)
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


def loss_at(rate: float, seed: int, step: int) -> float:
    """Return the loss of a step: lowest for a rate of 0.01, falling with the steps."""
    return abs(rate - 0.01) * 100 + 10 / (step + 1) + random.Random(f"{seed}-{step}").random() / 10


def train(config: dict, run_dir: Path, stopped: list[int], options: tuple[str, ...]) -> int:
    """Make the steps that are left; return the exit code."""
    training, saved, metrics = config["training"], run_dir / "saved.json", run_dir / "metrics.jsonl"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    old = metrics.read_text().splitlines() if metrics.exists() else []
    kept = [line for line in old if line.endswith("}") and json.loads(line).get("step", 0) <= step]
    (run_dir / "metrics.tmp").write_text("".join(f"{line}\n" for line in kept))
    (run_dir / "metrics.tmp").replace(metrics)
    if "--fail" in options and options[options.index("--fail") + 1] in run_dir.name:
        print("something went wrong\nerror: no luck", file=sys.stderr)
        return 1
    with metrics.open("a") as lines, (run_dir / "made.txt").open("a") as made:

        def write(**record: object) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        write(event="started", step=step)
        while step < training["max_steps"] and not stopped:
            step += 1
            made.write(f"{os.getpid()} {step}\n")
            made.flush()
            loss = loss_at(config["optimizer"]["learning_rate"], training["seed"], step)
            record = {"step": step, "metrics.loss": loss}
            if step % training["eval_interval"] == 0 or step == training["max_steps"]:
                record["metrics.val_loss"] = loss
            write(**record)
            if step % config["checkpoint"]["interval"] == 0 or step == training["max_steps"]:
                save(saved, step)
            time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        save(saved, step)
        done = step == training["max_steps"]
        write(event="finished", step=step, **({"reason": "max_steps"} if done else {"reason": "signal"}))
    return 0 if done else 128 + stopped[0]


def save(path: Path, step: int) -> None:
    """Note how far the run is, in one piece."""
    path.with_suffix(".tmp").write_text(json.dumps({"step": step}))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
