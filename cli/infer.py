"""`transformerlm-infer`: a checkpoint and prompts in, text or JSON lines out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.infer")

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.utils import Command, note
from cli.utils import main as run_command
from config.infer import InferConfig

if TYPE_CHECKING:
    from logger import Logger
    from transformerlm.inference.predictor import Predictor


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-infer", InferConfig, infer), argv)


def infer(config: InferConfig) -> None:
    """Generate from each prompt as the configuration says; the answers go to stdout, and to W&B if it is chosen."""
    from transformerlm.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(config.checkpoint, device=config.device, precision=config.precision)
    with ExitStack() as stack:
        # The directory is left after the logger, which may still be reading the file.
        outputs = _Outputs(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "outputs.jsonl")
        logger = stack.enter_context(_make_logger(config))
        for number, prompt in enumerate(_prompts(config)):
            for sample in range(config.num_samples):
                seed = config.seed + number * config.num_samples + sample
                record = _answer(predictor, config, prompt, seed=seed, first=number == sample == 0)
                logger.log_record(record)
                outputs.write(record)
        if config.wandb.log_outputs and outputs.path.exists():
            logger.log_artifact(outputs.path, name="outputs", type="outputs")


def _make_logger(config: InferConfig) -> Logger:
    """Return the logger of the answers besides stdout, where they go in any case."""
    from logger import NoopLogger, create_logger

    if config.logging.backend != "wandb":
        return NoopLogger()
    return create_logger(
        "wandb",
        run_name=config.logging.run_name or f"infer-{time.strftime('%Y%m%d-%H%M%S')}",
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
    )


def _prompts(config: InferConfig) -> Iterator[str]:
    if config.prompt:
        return iter(config.prompt)
    if sys.stdin.isatty():
        note("type a prompt and Enter; Ctrl-D ends")
    return (line.rstrip("\r\n") for line in sys.stdin)


def _answer(predictor: Predictor, config: InferConfig, prompt: str, *, seed: int, first: bool) -> dict[str, Any]:
    """Generate one sample, show it on stdout, and return its record."""
    pieces: list[str] = []
    start = time.perf_counter()
    stream = predictor.stream(prompt, seed=seed, **config.sampling.model_dump())
    if config.output.format == "text":
        if not first:
            print("\n" + "-" * 72)
        shown = itertools.chain([prompt], _kept(stream, pieces))
        for piece in shown:
            print(piece, end="", flush=True)
        print(flush=True)
    else:
        pieces.extend(stream)
    record = {
        "event": "sample",
        **{f"params.{_LOG_NAMES.get(name, name)}": value for name, value in config.sampling.model_dump().items()},
        "params.eos_token_id": predictor.eos_token_id,
        "params.seed": seed,
        "text.prompt": prompt,
        "text.output": "".join(pieces),
        "metrics.latency_ms": 1000 * (time.perf_counter() - start),
    }
    if config.output.format == "json":
        print(json.dumps(record), flush=True)
    return record


_LOG_NAMES = {"top_p": "p"}


def _kept(stream: Iterator[str], pieces: list[str]) -> Iterator[str]:
    for piece in stream:
        pieces.append(piece)
        yield piece


class _Outputs:
    """The answers as a file of JSON lines, for the artifact."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
