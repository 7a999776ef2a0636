"""Where records go: JSON lines on stdout, Weights & Biases or nowhere, and in any case a `metrics.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

from logger.base import Logger
from logger.console_logger import ConsoleLogger, has_read_it, is_terminal
from logger.file_logger import JsonlLogger, truncate_after_step
from logger.multi import MultiLogger
from logger.noop import NoopLogger
from logger.wandb_logger import WandbLogger, require_wandb

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "Logger",
    "MultiLogger",
    "NoopLogger",
    "WandbLogger",
    "create_logger",
    "has_read_it",
    "is_terminal",
    "require_wandb",
    "truncate_after_step",
]


def create_logger(
    backend: Literal["console", "json", "wandb", "noop"],
    *,
    run_name: str,
    jsonl_path: str | os.PathLike[str] | None = None,
    run_id: str | None = None,
    wandb_entity: str | None = None,
    wandb_project: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    stream: TextIO | None = None,
    patience: float | None = None,
) -> MultiLogger:
    """Return the logger of a run: the chosen backend and, if `jsonl_path` is given, that file.

    "console" writes JSON lines on stdout, or on `stream`, unless that is a terminal, where people read on stderr what a
    command says; "json" always writes them. Both wait `patience` seconds for a reader (None: for ever). `run_id`,
    `config`, `tags` and the `wandb_` names go to W&B only. A logger that fails later never stops the run. Raises
    ValueError for an unknown backend or a missing `wandb` package, and OSError if the file cannot be opened.
    """
    # The file comes first: it is cheap to open, and an error there should not leave a W&B run behind.
    loggers: list[Logger] = [] if jsonl_path is None else [JsonlLogger(jsonl_path)]
    if backend == "json" or (backend == "console" and not has_read_it(stream)):
        loggers.append(ConsoleLogger(stream, patience=patience))
    elif backend == "wandb":
        loggers.append(
            WandbLogger(
                run_name=run_name, project=wandb_project, entity=wandb_entity, run_id=run_id, config=config, tags=tags
            )
        )
    elif backend not in ("console", "noop"):
        raise ValueError(f"logging.backend: expected console, json, wandb or noop, got {backend!r}")
    return MultiLogger(loggers)
