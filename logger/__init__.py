"""Where records go: JSON lines on stdout, W&B, TensorBoard or nowhere, and in any case a `metrics.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, get_args

from config.backends import TrainBackend, check_backends
from config.extras import require_extra
from logger.base import Logger
from logger.console_logger import ConsoleLogger, has_read_it, is_terminal
from logger.file_logger import JsonlLogger, truncate_after_step
from logger.multi import MultiLogger
from logger.noop import NoopLogger
from logger.tensorboard_logger import TensorboardLogger, require_tensorboard
from logger.wandb_logger import WandbLogger

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "Logger",
    "MultiLogger",
    "NoopLogger",
    "TensorboardLogger",
    "WandbLogger",
    "create_logger",
    "has_read_it",
    "is_terminal",
    "require_backends",
    "truncate_after_step",
]


def require_backends(names: Sequence[str]) -> None:
    """Raise ValueError if a backend needs a package that is not installed."""
    if "wandb" in names:
        require_extra("wandb")
    if "tensorboard" in names:
        require_tensorboard()


def create_logger(
    backend: str | Sequence[str],
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
    """Return the logger of a run: the chosen backends, one name or several, and the file `jsonl_path` if it is given.

    "console" writes JSON lines on stdout, or on `stream`, unless that is a terminal, where people read on stderr what a
    command says; "json" always writes them. Both wait `patience` seconds for a reader (None: for ever). "tensorboard"
    writes to the folder `tensorboard` beside `jsonl_path`. `run_id`, `tags` and the `wandb_` names are for W&B only
    (without it `run_id` is kept for a later start), and `config` for both. A logger that fails later never stops the
    run. Raises ValueError for names that are unknown or contradict each other and for a missing package, and OSError if
    a file cannot be opened.
    """
    names = [backend] if isinstance(backend, str) else list(backend)
    try:
        check_backends(names, get_args(TrainBackend))
    except ValueError as error:
        raise ValueError(f"logging.backend: {error}") from None
    if "tensorboard" in names and jsonl_path is None:
        raise ValueError('logging.backend: "tensorboard" needs jsonl_path, beside which its folder is')
    require_backends(names)
    # The files come first: they are cheap to open, and an error there should not leave a W&B run behind.
    loggers: list[Logger] = [] if jsonl_path is None else [JsonlLogger(jsonl_path)]
    if jsonl_path is not None and "tensorboard" in names:
        loggers.append(TensorboardLogger(Path(jsonl_path).parent / "tensorboard", config=config))
    if "json" in names or ("console" in names and not has_read_it(stream)):
        loggers.append(ConsoleLogger(stream, patience=patience))
    if "wandb" in names:
        loggers.append(
            WandbLogger(
                run_name=run_name, project=wandb_project, entity=wandb_entity, run_id=run_id, config=config, tags=tags
            )
        )
    return MultiLogger(loggers, run_id=run_id)
