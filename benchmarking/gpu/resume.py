"""A run that is killed and resumed, beside one that is not; and the two profiling tools on real steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarking.gpu.shapes import SMALL, TINY
from benchmarking.gpu.task import Task
from benchmarking.harness import OURS
from benchmarking.peers.training import TrainCase, make_step
from config.special_tokens import END_OF_TEXT
from databuilder.dataset_builder import build_dataset
from profiling import memory, nvtx
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer, train_bpe

STEPS, CHECKPOINT, KILLED_AFTER = 30, 10, 14
_BATCH_SIZE = 32
_VOCAB_SIZE = 300


def run(task: Task) -> None:
    """Train 30 steps twice, once with a kill; then record memory."""
    _kill_and_resume(task)
    _memory_history(task)


def _kill_and_resume(task: Task) -> None:
    folder = task.scratch / "resume"
    _write_data(folder)
    environment = {**os.environ, **nvtx.ALL_ON}
    whole = _start(task, folder, "whole", environment)  # with NVTX ranges on
    killed = _start(task, folder, "killed", dict(os.environ))
    _wait_for_step(folder / "killed", KILLED_AFTER, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    saved = [path.name for path in (folder / "killed" / "checkpoints").glob("step-*")]
    again = _start(task, folder, "killed", dict(os.environ))
    codes = [process.wait() for process in (whole, again)]
    task.check("a run with NVTX ranges on ends well", codes[0] == 0, f"exit code {codes[0]}")
    task.check("a killed run goes on and ends well", codes[1] == 0, f"exit code {codes[1]}")
    expected, found = (dict(_losses(folder / name)) for name in ("whole", "killed"))
    complete = sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    task.check("each step was logged once", complete, f"{len(found)} and {len(expected)} of {STEPS} steps")
    if complete:
        apart = max(abs(found[step] - expected[step]) for step in expected)
        cells: dict[str, Any] = {"steps": STEPS, "killed_after": KILLED_AFTER, "found_saved": ", ".join(sorted(saved))}
        task.row(
            "Kill and resume: losses against an uninterrupted run", **cells, most_apart=apart, last=expected[STEPS]
        )


def _write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    text = folder / "text.txt"
    sentences = (f"{a} and {b} make {a + b}.{' ' if b % 5 else END_OF_TEXT}" for a in range(60) for b in range(60))
    text.write_text("".join(sentences), encoding="utf-8")
    Tokenizer(*train_bpe(text, _VOCAB_SIZE, [END_OF_TEXT]), [END_OF_TEXT]).save(folder / "tokenizer")
    build_dataset(text, tokenizer=Tokenizer.from_directory(folder / "tokenizer"), train_path=folder / "train.npy")


def _start(task: Task, folder: Path, name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    shape = TINY if task.tiny else SMALL
    settings: dict[str, Any] = {f"model.{key}": value for key, value in shape.model().items()}
    settings |= {"model.vocab_size": _VOCAB_SIZE, "runs_dir": folder, "logging.run_name": name}
    settings |= {"data.train": folder / "train.npy", "data.tokenizer": folder / "tokenizer"}
    settings |= {"training.max_steps": STEPS, "training.batch_size": _BATCH_SIZE, "training.device": task.device}
    settings |= {"training.compile": "false", "checkpoint.interval": CHECKPOINT, "schedule.warmup_steps": 5}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "cli.train", *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


def _losses(run_dir: Path) -> Iterator[tuple[int, float]]:
    path = run_dir / "metrics.jsonl"
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        record = json.loads(line)
        if "metrics.loss" in record:
            yield record["step"], record["metrics.loss"]


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not any(done >= step for done, _ in _losses(run_dir)):
        time.sleep(0.005)


def _memory_history(task: Task) -> None:
    recording = memory.start_history()
    shape = TINY
    case = TrainCase(TransformerLM(**shape.model(), device="meta").hparams(), shape.batch_size, task.device)
    step = make_step(case, OURS, precision="bf16", compiled=False)
    step()
    path = task.scratch / "snapshot.pickle"
    written = memory.dump_snapshot(path)
    if torch.device(task.device).type != "cuda":
        task.check("without CUDA no memory history is recorded", not recording and not written)
        return
    # A snapshot is a pickle, so PyTorch's viewer opens it in a process of its own.
    viewer = [sys.executable, "-m", "torch.cuda._memory_viz", "stats", str(path)]
    opens = written and subprocess.run(viewer, stdin=subprocess.DEVNULL, check=False).returncode == 0
    task.check("the memory history is written and opens", opens, f"{path.stat().st_size:,} bytes")
