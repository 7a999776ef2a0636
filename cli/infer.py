"""`transformerlm-infer`: a checkpoint and prompts in, text or JSON lines out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.infer")

import itertools
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli.checkpoints import described
from cli.stdin_lines import odd_byte, stdin_lines
from cli.terminal import compiling_shown, note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.infer import InferConfig, OutputConfig
from config.schemas import SamplingConfig

if TYPE_CHECKING:
    from logger import Logger
    from transformerlm.inference.predictor import Predictor

# What --help shows.
SHORT = (
    "checkpoint",
    "prompt",
    "prompt_file",
    "num_samples",
    "seed",
    "device",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "sampling.top_p",
    "output.format",
)
EXAMPLES = (
    ("go on with a text", '--checkpoint runs/first --prompt "Once upon a time" --output.format=text'),
    ("type prompts, a line each", "--checkpoint runs/first --output.format=text"),
    ("four samples as JSON lines", '--config infer --prompt "Once upon a time" --num_samples=4'),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-infer", InferConfig, infer, short=SHORT, examples=EXAMPLES), argv)


def infer(config: InferConfig) -> None:
    """Generate from each prompt as the configuration says; the answers go to stdout, and to W&B if it is chosen.

    W&B's lines hold the beginnings of long texts; the artifact of `wandb.log_outputs` has them whole. With
    `logging.backend = "noop"` no line is written at all, and only `output.format = "text"` shows the answers.
    """
    with working("starting"):
        from transformerlm.inference.predictor import Predictor

    config = _with_format(config)
    prompts = [*config.prompt, *map(_prompt_of_file, config.prompt_file)]
    with working("loading the model"):
        predictor = Predictor.from_checkpoint(
            config.checkpoint, device=config.device, precision=config.precision, reproducible=config.reproducible
        )
    assert predictor.checkpoint is not None, "it was loaded"
    note(described(config.checkpoint, predictor.checkpoint))
    keeps = config.wandb.log_outputs and "wandb" in config.logging.backend
    with ExitStack() as stack:
        # The directory is left after the logger, which may still be reading the file.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if keeps else None
        outputs = _Outputs(folder and folder / "outputs.jsonl")
        logger = stack.enter_context(_make_logger(config))
        stack.enter_context(compiling_shown())
        for group in _groups(config, prompts):
            for record in _answers(predictor, config, group):
                logger.log_record({key: _cut_short(value) for key, value in record.items()})
                outputs.write(record)
        if outputs.path is not None and outputs.path.exists():
            logger.log_artifact(outputs.path, name="outputs", type="outputs")


def _with_format(config: InferConfig) -> InferConfig:
    """Return the configuration with `output.format` decided: text for a person at the terminal, else JSON lines."""
    from logger import is_terminal

    if config.output.format != "auto":
        return config
    form: Literal["json", "text"] = "text" if is_terminal() and "json" not in config.logging.backend else "json"
    return config.model_copy(update={"output": OutputConfig(format=form)})


def _make_logger(config: InferConfig) -> Logger:
    """Return the logger of the answers besides stdout, where they go in any case."""
    from logger import NoopLogger, create_logger

    if "wandb" not in config.logging.backend:
        return NoopLogger()
    return create_logger(
        "wandb",
        run_name=config.logging.run_name or f"infer-{time.strftime('%Y%m%d-%H%M%S')}",
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
    )


def _cut_short(value: Any) -> Any:
    is_long = isinstance(value, str) and len(value) > _MAX_LOGGED_CHARS
    return f"{value[:_MAX_LOGGED_CHARS]}..." if is_long else value


def _prompt_of_file(path: Path) -> str:
    """Return the text of a file without its last line end.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    from transformerlm.utils.file_kinds import HEAD_BYTES, TO_UTF8, check_is_text

    data = path.read_bytes()
    check_is_text(data[:HEAD_BYTES], str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        way_out = TO_UTF8.format("ENCODING")
        raise ValueError(f"{path}: expected a prompt in UTF-8, found {odd_byte(error)} ({way_out})") from None
    return text.removesuffix("\n").removesuffix("\r")


def _prompts_of_stdin() -> Iterator[str]:
    """Yield the lines of stdin; raises as `stdin_lines`."""
    is_empty, asks = True, sys.stdin.isatty()
    if asks:
        note("type a prompt and Enter; Ctrl-D ends")
    for line in stdin_lines("a prompt"):
        is_empty = False
        yield line
    if is_empty and not asks:
        note("no prompt: stdin has no line, and neither --prompt nor --prompt_file is given")


@dataclass(frozen=True)
class _Sample:
    """One text to generate; `number` counts all of them."""

    number: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class _Group:
    """The samples of some prompts, of which some may be generated together."""

    prompts: list[str]
    samples: Iterator[_Sample]


def _groups(config: InferConfig, prompts: list[str]) -> Iterator[_Group]:
    """Yield the samples of all prompts, or those of one line of stdin after the other."""
    if prompts:
        return iter([_Group(prompts, _samples(config, enumerate(prompts)))])
    # Who writes the next line may be waiting for the answer to this one.
    return (_Group([text], _samples(config, [(index, text)])) for index, text in enumerate(_prompts_of_stdin()))


def _samples(config: InferConfig, prompts: Iterable[tuple[int, str]]) -> Iterator[_Sample]:
    for index, prompt in prompts:
        for number in range(index * config.num_samples, (index + 1) * config.num_samples):
            yield _Sample(number, prompt, (config.seed + number) % _SEEDS)


def _answers(predictor: Predictor, config: InferConfig, group: _Group) -> Iterator[dict[str, Any]]:
    """Generate the samples, show them on stdout, and yield their records, in order."""
    settings = {**config.sampling.model_dump(), "allow_special": config.allow_special}
    ends = predictor.document_ids.eos_token_ids
    # What changes nothing is not told, beyond the settings that every line has.
    told = [*SamplingConfig.model_fields, *config.sampling.model_dump(exclude_defaults=True), "allow_special"]
    for sample, start, text in _texts(predictor, config, group, settings):
        record = {
            "event": "sample",
            **{f"params.{_LOG_NAMES.get(name, name)}": settings[name] for name in dict.fromkeys(told)},
            "params.eos_token_id": list(ends) if len(ends) > 1 else predictor.eos_token_id,
            "params.seed": sample.seed,
            "text.prompt": sample.prompt,
            "text.output": text,
            "metrics.latency_ms": 1000 * (time.perf_counter() - start),
        }
        if config.output.format == "json" and "noop" not in config.logging.backend:
            print(json.dumps(record), flush=True)
        yield record


def _texts(
    predictor: Predictor, config: InferConfig, group: _Group, settings: dict[str, Any]
) -> Iterator[tuple[_Sample, float, str]]:
    """Yield each sample, when it was begun, and its text: one at a time where they are shown as they come."""
    size = 1 if config.output.format == "text" or config.speculative else config.batch_size
    first = list(itertools.islice(group.samples, size))  # no more slots than there are samples
    if len(first) < 2:
        for sample in itertools.chain(first, group.samples):
            yield sample, time.perf_counter(), _stream_one(predictor, config, sample, settings)
        return
    begun: deque[tuple[_Sample, float]] = deque()

    def begin() -> Iterator[tuple[str, int]]:
        for sample in itertools.chain(first, group.samples):
            begun.append((sample, time.perf_counter()))
            yield sample.prompt, sample.seed

    longest = max(predictor.num_tokens(one, allow_special=config.allow_special) for one in group.prompts)
    for text in predictor.generate_each(begin(), slots=len(first), longest_prompt=longest, **settings):
        yield (*begun.popleft(), text)


def _stream_one(predictor: Predictor, config: InferConfig, sample: _Sample, settings: dict[str, Any]) -> str:
    """Return one text; where text is asked for it is shown as it comes."""
    pieces: list[str] = []
    stream = predictor.stream(sample.prompt, seed=sample.seed, speculative=config.speculative, **settings)
    if config.output.format == "json":
        return "".join(stream)
    if sample.number:
        print("\n" + "-" * 72)
    for piece in itertools.chain([_as_prompt(sample.prompt)], _kept(stream, pieces)):
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


def _as_prompt(text: str) -> str:
    """Return a prompt in bold where a person reads it, so that the model's part is seen to begin; else as it is."""
    plain = not text or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\x1b[1m{text}\x1b[0m"


_LOG_NAMES = {"top_p": "p"}
_MAX_LOGGED_CHARS = 1000
_SEEDS = 2**63  # as transformerlm-serve numbers its choices


def _kept(stream: Iterator[str], pieces: list[str]) -> Iterator[str]:
    for piece in stream:
        pieces.append(piece)
        yield piece


class _Outputs:
    """The answers as a file of JSON lines, for the artifact; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
