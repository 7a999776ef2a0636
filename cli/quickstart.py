"""`transformerlm-quickstart`: the commands in order, with shipped TOMLs, on stories from our grammar or on your text.

Nothing here trains or generates: each stage is a command that a user would type, and it is shown before it runs.
"""

from __future__ import annotations

from config.special_tokens import END_OF_TEXT

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.quickstart")

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cli.budget import MAX_EVAL_TOKENS, Budget, Size, Speed, plan_budget
from cli.hints import command_line, from_here, hint_lines
from cli.terminal import clock, note, working
from cli.utils import EXIT_BAD_INPUT, EXIT_FAILED, Command
from cli.utils import main as run_command
from config.io import SHIPPED, dump_settings
from config.quickstart import QuickstartConfig
from config.schemas import duration_seconds

# What --help shows.
SHORT = ("text", "corpus", "time", "dir", "prompt", "device")
EXAMPLES = (
    ("stories, in three minutes", ""),
    ("your own text, files or folders, for longer", "--text README.md docs --time 10m"),
)
CORPUS_BYTES = 6_000_000
MIN_DOCUMENTS = 20
MIN_TEXT_BYTES = 20_000
MAX_FILES = 1_000  # listed one by one in a TOML
CALIBRATION_STEPS = 6
# d_model, num_layers, num_heads, in ascending order; one is timed.
SIZES = ((96, 3, 4), (128, 3, 4), (192, 3, 4), (256, 3, 4), (256, 4, 4), (384, 6, 6), (512, 8, 8), (768, 12, 12))
TIMED = 3
BATCH_SIZE = 4
RUN_NAME = "run"
DOCSTRING_PROMPTS = ["Return the", "Create a new", "Raise"]
CONTEXT_LENGTH = 512  # two or three stories, so that most windows see how one begins
STORY_TOKENS, STORY_TEMPERATURE = 300, 0.6  # a grammar leaves fewer choices than text by people
TEXT_TOKENS, TEXT_TEMPERATURE = 160, 0.8
NUM_STORIES = 20  # generated at the end, to be checked by the grammar
NUM_SHOWN = 3
SAMPLE_TOKENS = 100  # of those during training
MANY_PASSES = 5
SLOW = 0.6  # of the steps that were planned
CHECKPOINT_VALIDATIONS = 3  # validations between two checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-quickstart",
        QuickstartConfig,
        quickstart,
        default_config="quickstart.toml",
        short=SHORT,
        examples=EXAMPLES,
    )
    run_command(command, argv)


def quickstart(config: QuickstartConfig) -> int:
    """Run the pipeline in a fresh directory, and return the exit code of the first command that fails, or 0."""
    files = _text_files(config.text)
    home = _free_directory(config.dir)
    try:
        with _directory(home):
            text = _prepare_text(config, files, home)
            _make_tokens(config, home, text)
        shared = _shared(config, home)
        budget = _plan(config, home, shared)
        _train(config, home, shared, budget)
        samples = _generate(config, home)
    except subprocess.CalledProcessError as error:
        kept = f"; everything so far is in {home}" if home.exists() else ""
        note(f"{error.cmd} ended with exit code {error.returncode}{kept}")
        return int(error.returncode) if error.returncode > 0 else EXIT_FAILED
    _show(config, samples)
    _say_what_next(config, home, budget)
    return 0


def _text_files(patterns: list[str]) -> list[str]:
    """Return the user's files; unsuitable ones are refused before anything is written.

    Raises:
        FileNotFoundError: a name without a file.
        ValueError: too little text to train on, a file that is not text, or a pipe, which can be read only once.
    """
    from transformerlm.utils.text_files import expand_inputs, total_bytes

    if not patterns:
        return []
    paths = expand_inputs(patterns)
    if pipes := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"text: expected files, as several commands read them, found the pipe {pipes[0]} (save it first)"
        )
    if (size := total_bytes(paths)) < MIN_TEXT_BYTES:
        raise ValueError(f"text: expected at least {MIN_TEXT_BYTES:,} bytes to train on, found {size:,}")
    return [str(path) for path in paths]


def _free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of wanted-2, wanted-3, ... that does not exist yet."""
    number, free = 1, wanted
    while free.exists():
        number += 1
        free = wanted.with_name(f"{wanted.name}-{number}")
    return free


@contextmanager
def _directory(home: Path) -> Iterator[None]:
    """Make a directory; if it stays empty or the text is refused, remove it with the parents made for it."""
    made = [path for path in (home, *home.parents) if not path.exists()]
    home.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        is_refused = isinstance(error, ValueError) or getattr(error, "returncode", 0) == EXIT_BAD_INPUT
        if is_refused or not any(home.iterdir()):
            shutil.rmtree(home)
            with suppress(OSError):  # somebody else uses it by now
                for parent in made[1:]:
                    parent.rmdir()
        raise


# --- the text ------------------------------------------------------------------------------------------------------


def _prepare_text(config: QuickstartConfig, files: list[str], home: Path) -> list[str]:
    """Return the files to train on: the user's, or one in `home`."""
    corpus = home / "corpus.txt"
    if files:
        return _documents(files, corpus)
    size = round(CORPUS_BYTES * max(1.0, min(10.0, duration_seconds(config.time) / 90)))
    from databuilder import docstring_corpus, stories

    with working(f"writing {config.corpus}"):
        module = stories if config.corpus == "stories" else docstring_corpus
        report = module.write_corpus(corpus, max_bytes=size)
    what = "stories" if config.corpus == "stories" else "docstrings of the installed Python, torch and numpy"
    note(f"{corpus}: {report.documents:,} {what}, {report.bytes / 1e6:.1f} MB, {report.seconds:.1f} s")
    return [str(corpus)]


def _documents(files: list[str], corpus: Path) -> list[str]:
    """Return the user's files, or `corpus` with their text cut into documents, which a validation split needs."""
    from databuilder.plain_text import write_documents
    from transformerlm.utils.text_files import read_text

    paths = [Path(file) for file in files]
    blocks = (block for path in paths for block in read_text(path))
    ends = sum(block.text.count(END_OF_TEXT) + block.ends_document for block in blocks)
    if ends >= MIN_DOCUMENTS and len(files) <= MAX_FILES:
        return files
    number = write_documents(paths, corpus, separator=END_OF_TEXT)
    note(f"{corpus}: the text, cut at blank lines into {number:,} documents")
    return [str(corpus)]


def _make_tokens(config: QuickstartConfig, home: Path, text: list[str]) -> None:
    from transformerlm.utils.text_files import total_bytes

    size = total_bytes([Path(file) for file in text])
    vocab_size = 2048 if _tells_stories(config) else max(512, min(4096, size // 200))
    tokenizer = home / "tokenizer"
    learn = {"input": text, "output_dir": tokenizer, "tokenizer.vocab_size": vocab_size}
    _run(home, "train-tokenizer", learn)
    encode = {"input": text, "tokenizer": tokenizer, "train": home / "train.npy", "valid": home / "valid.npy"}
    _run(home, "make-data", encode)


# --- the model -----------------------------------------------------------------------------------------------------


def _plan(config: QuickstartConfig, home: Path, shared: dict[str, Any]) -> Budget:
    """Time a few steps of one size, and return what fits into the time."""
    seconds = duration_seconds(config.time)
    with working(f"timing a few steps, to fill {clock(seconds)}"):
        timed = {"calibration_steps": CALIBRATION_STEPS, "training.eval_tokens": MAX_EVAL_TOKENS}
        settings = shared | _size_settings(*SIZES[TIMED]) | timed
        out = _run(home, "plan", settings, config="recipes/fast", quiet=True)
    facts = json.loads(out)
    speed = Speed(
        flops_per_token=facts["flops.per_token"],
        seconds_per_token=1 / facts["tokens_per_second"],
        seconds_per_validation_token=facts["calibration.seconds_per_validation"] / MAX_EVAL_TOKENS,
    )
    sizes = [_costs(*size, shared=shared) for size in SIZES]
    budget = plan_budget(seconds, speed=speed, sizes=sizes, tokens_per_step=facts["tokens.per_step"])
    note(
        f"{facts['tokens_per_second']:,.0f} tokens/s with {sizes[TIMED].parameters / 1e6:.1f} million parameters; "
        f"what fills {clock(seconds)} best: {budget.size.parameters / 1e6:.1f} million, about {budget.steps:,} steps"
    )
    passes = budget.steps * facts["tokens.per_step"] / facts["data.tokens"]
    if passes > MANY_PASSES:
        note(f"that is {passes:.0f} times through the text: more text would help more than more time")
    return budget


def _shared(config: QuickstartConfig, home: Path) -> dict[str, Any]:
    """Return the settings for all commands that build the model; short text gets a shorter context."""
    num_train, num_valid = (_read_json(home / f"{split}.json")["tokens"] for split in ("train", "valid"))
    longest = min(num_train // 50, num_valid // 2)
    return {
        "data.train": home / "train.npy",
        "data.valid": home / "valid.npy",
        "data.tokenizer": home / "tokenizer",
        "model.vocab_size": len(_read_json(home / "tokenizer/vocab.json")),
        "model.context_length": min(CONTEXT_LENGTH, max(16, 2 ** max(0, longest.bit_length() - 1))),
        "training.batch_size": BATCH_SIZE,
        "training.device": config.device,
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _size_settings(d_model: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {"model.d_model": d_model, "model.num_layers": num_layers, "model.num_heads": num_heads}


def _costs(d_model: int, num_layers: int, num_heads: int, *, shared: dict[str, Any]) -> Size:
    from transformerlm.models.estimates import count_parameters, flops_per_token
    from transformerlm.models.settings import ModelSettings

    size = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads}
    sizes = {**size, "vocab_size": shared["model.vocab_size"], "context_length": shared["model.context_length"]}
    model = ModelSettings(**sizes, qk_norm=True)
    flops = flops_per_token(model, model.context_length)
    return Size(**size, parameters=count_parameters(model), flops_per_token=flops)


def _train(config: QuickstartConfig, home: Path, shared: dict[str, Any], budget: Budget) -> None:
    """Train until the time is over, when the learning rate has decayed, too."""
    settings = {
        "runs_dir": home,
        **shared,
        **_size_settings(budget.size.d_model, budget.size.num_layers, budget.size.num_heads),
        "training.max_steps": budget.steps,
        "training.max_time": config.time,
        "training.log_interval": max(1, budget.steps // 100),
        "training.eval_interval": budget.eval_interval,
        "training.eval_tokens": budget.eval_tokens,
        "checkpoint.interval": CHECKPOINT_VALIDATIONS * budget.eval_interval,
        "samples.interval": budget.sample_interval,
        "samples.prompts": [_prompts(config)[0]],
        "samples.sampling.max_new_tokens": SAMPLE_TOKENS,
        "logging.run_name": RUN_NAME,
        "logging.report": True,
    }
    _run(home, "train", settings, config="recipes/fast")
    lines = (home / RUN_NAME / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    done = max(json.loads(line).get("step", 0) for line in lines)
    if done < SLOW * budget.steps:
        note(f"the machine was slower than it was while it was timed: {done:,} steps instead of {budget.steps:,}")


# --- its texts -----------------------------------------------------------------------------------------------------


def _prompts(config: QuickstartConfig) -> list[str]:
    if config.prompt:
        return config.prompt
    if config.text:
        return [""]
    from databuilder.stories import PROMPTS

    return [PROMPTS[0]] if _tells_stories(config) else DOCSTRING_PROMPTS


def _generate(config: QuickstartConfig, home: Path) -> list[dict[str, Any]]:
    """Return the trained model's samples, as the infer command writes them."""
    prompts, tells_stories = _prompts(config), _tells_stories(config)
    number = NUM_STORIES if _is_checked(config) else -(-NUM_SHOWN // len(prompts))
    settings = {
        "checkpoint": home / RUN_NAME,
        "prompt": prompts,
        "num_samples": number,
        "batch_size": number,
        "output.format": "json",
        "sampling.max_new_tokens": STORY_TOKENS if tells_stories else TEXT_TOKENS,
        "sampling.temperature": STORY_TEMPERATURE if tells_stories else TEXT_TEMPERATURE,
        "device": config.device,
    }
    with working("writing"):
        out = _run(home, "infer", settings, quiet=True)
    return [record for record in map(json.loads, out.splitlines()) if record.get("event") == "sample"]


def _tells_stories(config: QuickstartConfig) -> bool:
    return config.corpus == "stories" and not config.text


def _is_checked(config: QuickstartConfig) -> bool:
    return _tells_stories(config) and not config.prompt


def _show(config: QuickstartConfig, samples: list[dict[str, Any]]) -> None:
    """Print some of the texts, and how many texts the grammar accepts."""
    texts = [sample["text.prompt"] + sample["text.output"] for sample in samples]
    print(("\n" + "-" * 72 + "\n").join(text.rstrip() for text in texts[:NUM_SHOWN]), flush=True)
    if _is_checked(config):
        from databuilder.stories import summarize

        found = summarize(texts)
        note(
            f"\nOf {len(texts)} new stories, {found.keeps_hero:.0%} keep their hero's name and {found.grammatical:.0%} "
            "are grammatical from end to end, by the grammar that wrote the corpus."
        )


def _say_what_next(config: QuickstartConfig, home: Path, budget: Budget) -> None:
    run = home / RUN_NAME
    longer = f"{2 * duration_seconds(config.time):g}s"
    again = [f"--training.max_steps={2 * budget.steps}", f"--training.max_time={longer}"]
    hints = [
        ("talk to it: it goes on from the line you type", command_line("infer", f"--checkpoint={run}")),
        (f"train it to twice the time: {longer}", command_line("train", f"--config={run / 'config.toml'}", *again)),
        ("hand it on, in the format of Hugging Face", _export(run, home / "export")),
        (
            "a model of other text: --text takes your files and folders",
            command_line("quickstart", "--corpus=docstrings", "--time=5m"),
        ),
        ("every setting of the training, with its default", command_line("train", "--help-all")),
        (
            "serve it, to a browser and to programs that speak OpenAI's API",
            command_line("serve", f"--checkpoint={run}", "--limits.overflow=slide"),
        ),
    ]
    note("\n".join(["", f"Everything is in {home}. Next:", "", *hint_lines(hints)]))


def _export(run: Path, output: Path) -> str:
    return command_line("export", "--config", _shipped("export"), f"--checkpoint={run}", f"--output={output}")


# --- commands ------------------------------------------------------------------------------------------------------


def _run(home: Path, verb: str, settings: dict[str, Any], *, config: str = "", quiet: bool = False) -> str:
    """Run `transformerlm-<verb>` with its shipped TOML, or another one, and a TOML of `settings`; return its stdout.

    The settings have dotted keys. What a `quiet` command says on stderr is shown only if it fails.

    Raises:
        subprocess.CalledProcessError: it ended with another exit code than 0.
    """
    name = verb.replace("-", "_")
    words = [f"--config={path}" for path in (_shipped(config or name), home / f"{name}.toml")]
    line = f"transformerlm-{verb} {shlex.join(words)}"
    (home / f"{name}.toml").write_text(f"# {line}\n\n{dump_settings(settings)}", encoding="utf-8")
    note(f"\n$ {line}")
    # -P: do not import a folder called `config` from the working directory.
    command = [sys.executable, "-P", "-m", f"cli.{name}", *words]
    code, out, err = _wait_for(command, quiet=quiet)
    if code:
        if err:
            note(err.rstrip())
        raise subprocess.CalledProcessError(code, f"transformerlm-{verb}")
    return out


def _wait_for(command: list[str], *, quiet: bool) -> tuple[int, str, str]:
    """Run a command; return its exit code, its stdout and, if quiet, its stderr.

    Ctrl-C reaches the command, too, which may want to save what it has; other requests to end are passed on to it. Its
    exit code says how it ended.
    """
    environment = {**os.environ, "TRANSFORMERLM_HINTS": "0"}  # ours come at the end
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe if quiet else None, encoding="utf-8", env=environment)
    passed_on = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in passed_on}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        out, err = child.communicate()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return child.returncode, out, err or ""


def _shipped(name: str) -> str:
    """Return the path of a shipped TOML, relative to the working directory if that is shorter."""
    return from_here(SHIPPED / f"{name}.toml")
