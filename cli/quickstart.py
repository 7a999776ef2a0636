"""`transformerlm-quickstart`: the four commands in order, with their shipped TOMLs, on text that every install has.

Nothing here trains or generates: each stage is the command a user would type, which is shown before it runs.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.quickstart")

import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.utils import EXIT_FAILED, Command, clock, note
from cli.utils import main as run_command
from config.io import SHIPPED
from config.quickstart import QuickstartConfig
from config.schemas import duration_seconds

SEPARATOR = "<|endoftext|>"
CORPUS_BYTES = 6_000_000
CALIBRATION_STEPS = 12
MIN_STEPS = 20
MIN_DOCUMENTS = 20
MIN_TEXT_BYTES = 20_000
# The part of the budget that goes into steps; the rest is for validation, checkpoints and a machine that gets busy.
STEPS_SHARE = 0.75
RUN_NAME = "run"
DOCSTRING_PROMPTS = ["Return the", "Create a new", ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command("transformerlm-quickstart", QuickstartConfig, quickstart, default_config="quickstart.toml")
    run_command(command, argv)


def quickstart(config: QuickstartConfig) -> int:
    """Run the pipeline in a fresh directory, and return the exit code of the first command that fails, or 0."""
    _check_text(config.text)
    home = _free_directory(config.dir)
    home.mkdir(parents=True)
    try:
        corpus = home / "corpus.txt"
        text = _documents(config.text, corpus) if config.text else [str(_write_corpus(corpus))]
        _run("train-tokenizer", input=text, output_dir=home / "tokenizer")
        _run(
            "make-data",
            input=text,
            tokenizer=home / "tokenizer",
            train=home / "train.npy",
            valid=home / "valid.npy",
        )
        _train(config, home)
        _show_picture(home / RUN_NAME)
        _sample(config, home)
    except subprocess.CalledProcessError as error:
        note(f"{error.cmd} ended with exit code {error.returncode}; everything so far is in {home}")
        return int(error.returncode) if error.returncode > 0 else EXIT_FAILED
    _say_what_next(home)
    return 0


def _check_text(patterns: list[str]) -> None:
    """Refuse the user's files before anything is written.

    Raises:
        FileNotFoundError: a name without a file.
        ValueError: too little text to train on, a file that is no text, or a pipe, which can be read once.
    """
    from transformerlm.utils.text_files import expand_inputs, total_bytes

    paths = expand_inputs(patterns) if patterns else []
    if pipes := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"text: expected files, as several commands read them, found the pipe {pipes[0]} (save it first)"
        )
    size = total_bytes(paths) if patterns else MIN_TEXT_BYTES
    if size < MIN_TEXT_BYTES:
        raise ValueError(f"text: expected at least {MIN_TEXT_BYTES:,} bytes to train on, found {size:,}")


def _free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of wanted-2, wanted-3, ... that is not there yet."""
    number, free = 1, wanted
    while free.exists():
        number += 1
        free = wanted.with_name(f"{wanted.name}-{number}")
    return free


def _write_corpus(path: Path) -> Path:
    from databuilder.docstring_corpus import write_corpus

    note("collecting the docstrings of the installed Python, torch and numpy ...")
    report = write_corpus(path, max_bytes=CORPUS_BYTES)
    note(f"{path}: {report.bytes / 1e6:.1f} MB of text, {report.documents:,} documents, {report.seconds:.1f} s")
    return path


def _documents(patterns: list[str], corpus: Path) -> list[str]:
    """Return the user's files, or `corpus` with their text cut into documents: a validation split needs some."""
    from databuilder.plain_text import write_documents
    from transformerlm.utils.text_files import expand_inputs, read_text

    paths = expand_inputs(patterns)
    blocks = (block for path in paths for block in read_text(path))
    if sum(block.text.count(SEPARATOR) + block.ends_document for block in blocks) >= MIN_DOCUMENTS:
        return patterns
    number = write_documents(paths, corpus, separator=SEPARATOR)
    note(f"{corpus}: the text names no documents with {SEPARATOR}, so it is cut at blank lines into {number:,}")
    return [str(corpus)]


def _run(verb: str, **options: object) -> None:
    """Run `transformerlm-<verb>` with its shipped TOML and these overrides; its data on stdout goes to nobody.

    Raises:
        subprocess.CalledProcessError: it ended with another exit code than 0.
    """
    arguments = ["--config", _shipped(verb)]
    for key, value in options.items():
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        name = f"--{key.replace('__', '.')}"
        # A value that looks like an option must be joined to its key.
        arguments += [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]
    note(f"\n$ transformerlm-{verb} {shlex.join(arguments)}")
    # -P: a folder called `config` in the working directory is not ours.
    command = [sys.executable, "-P", "-m", f"cli.{verb.replace('-', '_')}", *arguments]
    quiet = verb != "infer"
    # Ctrl-C reaches the command as well, which may want to save what it has; how it ended says the rest.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None, check=False)
    finally:
        signal.signal(signal.SIGINT, previous)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, f"transformerlm-{verb}")


def _shipped(verb: str) -> str:
    """Return the path of a command's shipped TOML, relative to the working directory where that is shorter."""
    path = SHIPPED / f"{verb.replace('-', '_')}.toml"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _train(config: QuickstartConfig, home: Path) -> None:
    """Time a few steps, then train for as many as fit into the budget."""
    budget = duration_seconds(config.time)
    shared = {
        "data__train": home / "train.npy",
        "data__valid": home / "valid.npy",
        "data__tokenizer": home / "tokenizer",
        "model__vocab_size": _vocab_size(home / "tokenizer"),
        "training__device": config.device,
    }
    note(f"\ntiming {CALIBRATION_STEPS} steps, to fill {clock(budget)} ...")
    _run(
        "train",
        **shared,
        runs_dir=home / "calibration",
        logging__run_name=RUN_NAME,
        training__max_steps=CALIBRATION_STEPS,
        training__log_interval=1,
        training__eval_tokens=1,
        schedule__warmup_steps=0,
        samples__interval=0,
    )
    steps = max(MIN_STEPS, int(budget * STEPS_SHARE / _seconds_per_step(home / "calibration" / RUN_NAME)))
    _run(
        "train",
        **shared,
        runs_dir=home,
        logging__run_name=RUN_NAME,
        training__max_steps=steps,
        training__max_time=config.time,
        training__eval_interval=max(1, steps // 12),
        schedule__warmup_steps=steps // 4,
        checkpoint__interval=max(1, steps // 3),
        samples__interval=steps // 3 + 1,
    )


def _vocab_size(tokenizer: Path) -> int:
    return len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))


def _seconds_per_step(run_dir: Path) -> float:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [record["metrics.tokens_per_second"] for record in records if "metrics.tokens_per_second" in record]
    steps = [record["metrics.tokens"] for record in records if "metrics.tokens" in record]
    tokens_per_step = steps[0]
    return float(tokens_per_step / statistics.median(rates[len(rates) // 2 :]))  # the first steps are slower


def _show_picture(run_dir: Path) -> None:
    from cli.loss_curve import save_loss_curve

    picture = save_loss_curve(run_dir / "metrics.jsonl", run_dir / "loss.png")
    note(f"loss curve: {picture}")


def _sample(config: QuickstartConfig, home: Path) -> None:
    prompts = config.prompt or (["", "", ""] if config.text else DOCSTRING_PROMPTS)
    _run(
        "infer",
        checkpoint=home / RUN_NAME,
        prompt=prompts,
        output__format="text",
        sampling__max_new_tokens=160,
        device=config.device,
    )


def _say_what_next(home: Path) -> None:
    run = shlex.quote(str(home / RUN_NAME))
    note(
        f"\nEverything is in {home}. Next:\n"
        f'  transformerlm-infer --config {_shipped("infer")} --checkpoint={run} --output.format=text --prompt "..."\n'
        "  transformerlm-quickstart --text FILE... --time 10m     train on your own text, for longer\n"
        f"  transformerlm-train --config {run}/config.toml --training.max_time=none --training.max_steps=...\n"
        "                                                         train it further\n"
        "  transformerlm-train --help                             every setting, with its default"
    )
