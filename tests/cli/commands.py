"""What the tests of commands share: the list of commands, and a way to call one within this process."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from config.download import DownloadConfig
from config.eval import EvalConfig
from config.export import ExportConfig
from config.import_ import ImportConfig
from config.infer import InferConfig
from config.init import InitConfig
from config.make_data import MakeDataConfig
from config.plan import PlanConfig
from config.quickstart import QuickstartConfig
from config.train import TrainConfig
from config.train_tokenizer import TrainTokenizerConfig

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "init": InitConfig,
    "download": DownloadConfig,
    "train_tokenizer": TrainTokenizerConfig,
    "make_data": MakeDataConfig,
    "train": TrainConfig,
    "plan": PlanConfig,
    "export": ExportConfig,
    "import_": ImportConfig,
    "infer": InferConfig,
    "eval": EvalConfig,
    "quickstart": QuickstartConfig,
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def records(self) -> list[dict[str, Any]]:
        """The JSON lines on stdout; every line must be one."""
        return [json.loads(line) for line in self.stdout.splitlines()]


def module_of(name: str) -> ModuleType:
    """Return a command's module."""
    return importlib.import_module(f"cli.{name}")


def call(name: str, *arguments: object, stdin: str | TextIO | None = "") -> Outcome:
    """Call a command's `main` as its console script does; a `stdin` of None is that of a process without one."""
    stdout, stderr, old_stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin) if isinstance(stdin, str) else stdin
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            code = exit_code_of(name, [str(argument) for argument in arguments])
    finally:
        sys.stdin = old_stdin
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def exit_code_of(name: str, arguments: Sequence[str]) -> int:
    """Return the code with which a command exits; each of them must exit by SystemExit."""
    try:
        module_of(name).main(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    raise AssertionError(f"{name} returned")


def shipped(name: str) -> Path:
    """Return a command's shipped TOML."""
    return ROOT / "config" / "resources" / f"{name}.toml"
