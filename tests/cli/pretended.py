"""The stages of quickstart and fit, pretended: they leave what the next stage reads, in no time."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.training.tiny_run import TinyFiles

PLAN = {
    "flops.per_token": 14_000_000,
    "tokens_per_second": 2048.0,
    "calibration.steps": 6,
    "calibration.first_step_seconds": 1.0,
    "calibration.seconds_per_step": 0.5,
    "calibration.seconds_per_validation": 4.0,
}


def settings_of(command: list[str]) -> dict[str, Any]:
    """Return the settings in the last TOML of a started command, and its other options, by dotted keys."""
    words = [word.removeprefix("--").partition("=")[::2] for word in command[4:]]
    path = Path([value for key, value in words if key == "config"][-1])
    own = {key: value for key, value in words if key != "config"}
    return {**dict(_flat(tomllib.loads(path.read_text(encoding="utf-8")))), **own}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


@dataclass
class Pretended:
    """In the place of `cli.stages.wait_for`: commands that only leave files, and which were started.

    `codes` are exit codes by the number of the command, from 0 on; a command that fails leaves nothing,
    but a training its folder of checkpoints. `reached` are
    the bits per byte of the probe and of the run, and `steps` those that the run makes. `probe_speed` is in tokens a
    second.
    """

    files: TinyFiles
    plan: dict[str, Any] = field(default_factory=lambda: dict(PLAN))
    codes: dict[int, int] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=lambda: {"probe": 3.0, "run": 2.5})
    steps: int = 3
    probe_speed: float = 2048.0
    stopped_by: str = "max_time"
    output: str = "Some words."
    started: list[list[str]] = field(default_factory=list)

    def __call__(self, command: list[str], *, quiet: bool) -> tuple[int, str, str]:
        """Pretend to run a command."""
        self.started.append(command)
        if code := self.codes.get(len(self.started) - 1, 0):
            if command[4:] and command[-1].endswith("train.toml"):
                (Path(command[-1].partition("=")[2]).parent / "run" / "checkpoints").mkdir(parents=True)
            return code, "", "what it said" if quiet else ""
        return 0, getattr(self, f"_{command[3].removeprefix('cli.')}")(settings_of(command)), ""

    def _plan(self, settings: dict[str, Any]) -> str:
        return json.dumps(self.plan)

    def _train_tokenizer(self, settings: dict[str, Any]) -> str:
        shutil.copytree(self.files.tokenizer, settings["output_dir"])
        return ""

    def _make_data(self, settings: dict[str, Any]) -> str:
        for name in ("train", "valid"):
            source, target = getattr(self.files, name), Path(settings[name])
            for suffix in (".npy", ".json", ".documents.npy"):
                shutil.copy(source.with_suffix(suffix), target.with_suffix(suffix))
        return ""

    def _train(self, settings: dict[str, Any]) -> str:
        name = settings["logging.run_name"]
        folder = Path(settings["runs_dir"]) / name
        folder.mkdir(parents=True, exist_ok=True)
        steps = settings["training.max_steps"] if name == "probe" else self.steps
        bits = self.reached[name]
        summary = {"step": steps, "steps": steps, "seconds": 1.5, "tokens_per_second": 2048.0, "passes_over_data": 0.5}
        losses = {"val_loss": 2 * bits, "val_bits_per_byte": bits, "best_checkpoint_val_loss": 1.8 * bits}
        losses |= {"gzip_bits_per_byte": 3.1, "unigram_bits_per_byte": 3.3}
        lines = [
            {"event": "started", "parameters": 700_000, "max_steps": settings["training.max_steps"]},
            *(
                {"step": step, "metrics.loss": 6.0, "metrics.tokens_per_second": self.probe_speed}
                for step in range(1, steps + 1)
            ),
            {"event": "summary", **summary, **losses},
            {"event": "finished", "reason": self.stopped_by},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ""

    def _infer(self, settings: dict[str, Any]) -> str:
        sample = {"event": "sample", "text.prompt": "", "text.output": self.output}
        return "".join(json.dumps({**sample, "number": number}) + "\n" for number in range(4))
