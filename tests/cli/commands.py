"""What the tests of commands share: the list of commands, and a way to call one within this process."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from config.add_tokens import AddTokensConfig
from config.adopt import AdoptConfig
from config.chat import ChatCommandConfig
from config.download import DownloadConfig
from config.eval import EvalConfig
from config.export import ExportConfig
from config.import_ import ImportConfig
from config.infer import InferConfig
from config.init import InitConfig
from config.make_data import MakeDataConfig
from config.plan import PlanConfig
from config.quickstart import QuickstartConfig
from config.runs_compare import RunsCompareConfig
from config.runs_list import RunsListConfig
from config.runs_report import RunsReportConfig
from config.runs_show import RunsShowConfig
from config.runs_tail import RunsTailConfig
from config.runs_verify import RunsVerifyConfig
from config.serve import ServeConfig
from config.train import TrainConfig
from config.train_tokenizer import TrainTokenizerConfig

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "init": InitConfig,
    "download": DownloadConfig,
    "train_tokenizer": TrainTokenizerConfig,
    "make_data": MakeDataConfig,
    "adopt": AdoptConfig,
    "add_tokens": AddTokensConfig,
    "train": TrainConfig,
    "plan": PlanConfig,
    "export": ExportConfig,
    "import_": ImportConfig,
    "infer": InferConfig,
    "chat": ChatCommandConfig,
    "serve": ServeConfig,
    "eval": EvalConfig,
    "quickstart": QuickstartConfig,
    "runs_list": RunsListConfig,
    "runs_report": RunsReportConfig,
    "runs_show": RunsShowConfig,
    "runs_tail": RunsTailConfig,
    "runs_compare": RunsCompareConfig,
    "runs_verify": RunsVerifyConfig,
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


def script_of(name: str) -> list[str]:
    """Return the console script of a command, and the word that follows it where a script has several."""
    if name.startswith("runs_"):
        return ["transformerlm-runs", name.removeprefix("runs_")]
    return ["transformerlm-" + name.rstrip("_").replace("_", "-")]


def module_of(name: str) -> ModuleType:
    """Return a command's module."""
    return importlib.import_module(f"cli.{name}")


def call(name: str, *arguments: object, stdin: str | TextIO | None = "") -> Outcome:
    """Call a command's `main` as its console script does; a `stdin` of None means a process without stdin."""
    stdout, stderr, old_stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin) if isinstance(stdin, str) else stdin
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            code = exit_code_of(name, [str(argument) for argument in arguments])
    finally:
        sys.stdin = old_stdin
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def call_in_terminal(name: str, *arguments: object) -> Outcome:
    """Call a command in a pseudo-terminal, where both streams are one screen; its text, as it came, is in `stdout`."""
    import pty  # not on Windows
    import threading

    master, slave = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(master, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", encoding="utf-8") as screen, redirect_stdout(screen), redirect_stderr(screen):
        code = exit_code_of(name, [str(argument) for argument in arguments])
    reader.join()
    os.close(master)
    return Outcome(code, b"".join(chunks).decode().replace("\r\n", "\n"), "")


def lines_on_screen(text: str) -> list[str]:
    """Return the lines that are left on a terminal, after some were erased and rewritten."""
    return [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]


def exit_code_of(name: str, arguments: Sequence[str]) -> int:
    """Return the exit code of a command, which must end by SystemExit."""
    try:
        module_of(name).main(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    raise AssertionError(f"{name} returned")


def shipped(name: str) -> Path:
    """Return a command's shipped TOML."""
    return ROOT / "config" / "resources" / f"{name}.toml"
