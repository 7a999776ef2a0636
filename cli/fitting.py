"""From a text to a trained model whose quality was said beforehand: what quickstart and `transformerlm-fit` share."""

from __future__ import annotations

import json
import shlex
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.hints import command_line
from cli.stages import MIN_DOCUMENTS, RUN_NAME, read_json, run_stage, run_with, write_short_documents
from cli.terminal import clock, note, note_invalid_utf8, working
from config.commented_toml import commented_toml
from config.paths import read_name
from config.special_tokens import END_OF_TEXT

if TYPE_CHECKING:
    from transformerlm.experiments.fit.choice import Plan, Speed, Text
    from transformerlm.experiments.fit.results import RunResult, Statement

PROBE_NAME = "probe"
PREDICTION, OUTCOME = "prediction.json", "outcome.json"
PROBE_SHARE = 0.1  # of the time, for all that is tried before the run
MIN_PROBE_SHARE = 0.05  # for the short run, however long it took to time the steps
PROBE_FILL = 0.85  # of the probe's share, for its steps as they were timed; the rest is for the first one and for noise
PROBE_PATIENCE, PATIENT_SECONDS = 3.0, 5.0  # a probe of few seconds may take so many times what it should
SAMPLE_TOKENS = 100
SLOW = 0.6  # of the steps that were planned
MANY_PASSES = 5


@dataclass(frozen=True)
class Task:
    """What is asked for: a text of about `num_bytes` and a time; everything goes to the directory `home`.

    `corpus` is what the text is called among past runs.
    """

    home: Path
    files: Sequence[str]
    corpus: str
    num_bytes: int
    seconds: float
    device: str
    prompts: Sequence[str]
    seed: int = 0
    past_runs: Path | None = None
    most_context: int | None = None


# --- before the run ------------------------------------------------------------------------------------------------


def encode(task: Task) -> tuple[Text, Speed, float]:
    """Learn a vocabulary and encode the text; return its facts, this machine's speed, and how long timing that took."""
    from transformerlm.experiments.fit import choice

    size = task.num_bytes
    speed, spent = _time_steps(task, size)
    began = time.monotonic()
    amount = choice.choose_bytes(size, speed, task.seconds, most_context=_most_context(task))
    files = [Path(file) for file in task.files]
    if amount.value < size:
        part = _part_of(task, amount.value / size, why=amount.why)
        files, size = [part], part.stat().st_size
    tokenizer = task.home / "tokenizer"
    vocab_size = choice.choose_vocab_size(size, task.seconds).value
    run_stage(
        task.home, "train-tokenizer", {"input": files, "output_dir": tokenizer, "tokenizer.vocab_size": vocab_size}
    )
    outputs = {name: task.home / f"{name}.npy" for name in ("train", "valid")}
    share = {"valid_fraction": choice.choose_valid_fraction(size).value}
    run_stage(task.home, "make-data", {"input": files, "tokenizer": tokenizer, **outputs, **share})
    note(f"the text took {clock(time.monotonic() - began)} to encode, not counted in the {clock(task.seconds)}")
    return _facts_of_text(task.home, size), speed, spent


def _time_steps(task: Task, num_bytes: int) -> tuple[Speed, float]:
    """Return the speed of two sizes on this machine, and the seconds that the steps took which say so."""
    from transformerlm.experiments.fit import choice

    with working(f"timing a few steps, to fill {clock(task.seconds)}"):
        small, first = _time_size(task, num_bytes, choice.TIMED[0])
        size = choice.second_timed(num_bytes, task.seconds, small, most_context=_most_context(task))
        large, second = _time_size(task, num_bytes, size)
    return large.beside(small), first + second


def _time_size(task: Task, num_bytes: int, size: int) -> tuple[Speed, float]:
    """Return the speed of one of the sizes, and the seconds that its steps took."""
    from transformerlm.experiments.fit import choice

    most = _most_context(task)
    settings = choice.timed_settings(num_bytes, task.seconds, size=size, most_context=most)
    settings |= _places(task.home) | {"training.device": task.device}
    name = f"plan_{settings['model.d_model']}"
    facts = json.loads(run_stage(task.home, "plan", settings, config="recipes/fast", name=name, quiet=True))
    if "calibration.steps" not in facts:
        raise ValueError(_why_not_timed(facts))
    steps = facts["calibration.steps"] * facts["calibration.seconds_per_step"]
    speed = choice.Speed(
        flops_per_token=facts["flops.per_token"],
        seconds_per_token=1 / facts["tokens_per_second"],
        seconds_per_validation_token=facts["calibration.seconds_per_validation"] / choice.MAX_EVAL_TOKENS,
    )
    return speed, steps + facts["calibration.first_step_seconds"]


def _why_not_timed(facts: dict[str, Any]) -> str:
    from transformerlm.training.planning.preflight import gigabytes

    needed, free = (facts[f"memory.{name}_bytes"] for name in ("total", "available"))
    found = f"{gigabytes(free)} free on {facts['device']}" + (", which ran out of memory" if free >= needed else "")
    return (
        f"memory: expected about {gigabytes(needed)} for the steps that are timed first, found {found}; end other "
        "programs, raise the container's limit, or set another device"
    )


def _most_context(task: Task) -> int:
    from transformerlm.experiments.fit.choice import CONTEXT_LENGTH

    return task.most_context or CONTEXT_LENGTH


def _part_of(task: Task, fraction: float, *, why: str) -> Path:
    """Write a fraction of the documents; where these would be few long ones, of the text cut into short ones."""
    from databuilder.plain_text import write_part
    from transformerlm.utils.text_files import ReadStats

    part, corpus, stats = task.home / "part.txt", task.home / "corpus.txt", ReadStats()
    files = [Path(file) for file in task.files]
    with working("taking a part of the text"):
        number = write_part(files, part, fraction=fraction, separator=END_OF_TEXT, stats=stats)
        if number < MIN_DOCUMENTS and files != [corpus]:
            write_short_documents(files, corpus)
            number = write_part([corpus], part, fraction=fraction, separator=END_OF_TEXT)
    note_invalid_utf8(stats.invalid_utf8)
    note(f"{part}: {number:,} documents, {why}")
    return part


def _facts_of_text(home: Path, num_bytes: int) -> Text:
    from transformerlm.experiments.fit.choice import Text
    from transformerlm.token_files.dataset import TokenDataset
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.yardsticks import share_seen, yardsticks

    train, valid = (TokenDataset(home / f"{name}.npy") for name in ("train", "valid"))
    tokenizer = Tokenizer.from_directory(home / "tokenizer")
    found = yardsticks(train.tokens, valid.tokens, tokenizer)
    if found is None:
        raise ValueError(f"{home / 'valid.npy'}: expected text to validate on, found none")
    return Text(
        num_bytes=num_bytes,
        train_tokens=len(train),
        valid_tokens=len(valid),
        valid_bytes=read_json(home / "valid.json")["bytes"],
        vocab_size=tokenizer.vocab_size,
        gzip_bits_per_byte=found.gzip_bits_per_byte,
        share_seen=share_seen(train.tokens, valid.tokens),
    )


def _places(home: Path) -> dict[str, Any]:
    data = {f"data.{name}": home / f"{name}.npy" for name in ("train", "valid")}
    return {"runs_dir": home, **data, "data.tokenizer": home / "tokenizer"}


def prepare(task: Task, text: Text, speed: Speed, spent: float) -> tuple[Plan, Statement]:
    """Choose the settings, try them in a short run, and predict what a run in the time that is left will reach."""
    from transformerlm.experiments.fit import choice
    from transformerlm.experiments.fit.prediction import PAST_RUNS, predict, read_rows
    from transformerlm.experiments.fit.results import Statement, probe_of

    rows = read_rows(task.past_runs or PAST_RUNS)
    share = max(MIN_PROBE_SHARE * task.seconds, PROBE_SHARE * task.seconds - spent)
    seconds = max(task.seconds / 2, task.seconds - spent - share)
    plan = choice.choose(
        text, speed, seconds=seconds, probe_seconds=PROBE_FILL * share, most_context=_most_context(task)
    )
    size = f"{plan.parameters / 1e6:.2g} million parameters"
    with working(f"a short run of {plan.probe_steps:,} steps, to know what the whole one will reach"):
        result = _probe(task, plan, spare=(1 - PROBE_FILL) * share)
    seconds = max(task.seconds / 2, task.seconds - spent - result.seconds)
    step_seconds = _seconds_per_step(plan, result)
    plan = choice.keep_time(plan, seconds_per_step=step_seconds, seconds=seconds)
    write_run(task, plan, seconds)
    probe = probe_of(result)
    note(f"{size}, about {plan.steps:,} steps in {clock(seconds)}, {_times(plan.passes)} through the text")
    if plan.passes > MANY_PASSES:
        note("more text would help more than more time")
    return plan, Statement(
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        corpus=task.corpus,
        bits_per_byte=predict(probe, plan, rows, share_seen=text.share_seen),
        gzip_bits_per_byte=probe.gzip_bits_per_byte,
        unigram_bits_per_byte=result.unigram_bits_per_byte,
        probe=probe,
        text=text,
        steps=plan.steps,
        passes=plan.passes,
        parameters=plan.parameters,
        seconds=seconds,
    )


def _seconds_per_step(plan: Plan, result: RunResult) -> float:
    """Return what a step took in the short run; where it made too few to say, what was timed, or all its time."""
    if result.tokens_per_second:
        return plan.tokens_per_step / result.tokens_per_second
    return result.seconds / result.steps if result.stopped_by == "max_time" else plan.seconds_per_step


def _probe(task: Task, plan: Plan, *, spare: float) -> RunResult:
    from transformerlm.experiments.fit.results import read_result

    # Where its steps turn out to be slow, its schedule follows the time, and it makes fewer of them.
    seconds = plan.probe_steps * plan.seconds_per_step
    seconds = max(1.0, seconds + spare, min(PROBE_PATIENCE * seconds, PATIENT_SECONDS))
    settings = {
        **_places(task.home),
        **plan.values,
        "training.device": task.device,
        "training.seed": task.seed,
        "training.max_steps": plan.probe_steps,
        "training.max_time": f"{seconds:.1f}s",
        "training.log_interval": 1,
        "training.eval_interval": 0,
        "checkpoint.interval": 0,
        "samples.interval": 0,
        "logging.run_name": PROBE_NAME,
        "logging.backend": "noop",
    }
    run_stage(task.home, "train", settings, config="recipes/fast", name="probe", quiet=True)
    return read_result(task.home / PROBE_NAME)


def write_run(task: Task, plan: Plan, seconds: float) -> None:
    """Write the TOML of the run, with a reason over each setting that was chosen."""
    path = task.home / "train.toml"
    settings = {
        **_places(task.home),
        **plan.values,
        "training.max_time": f"{seconds:.1f}s",
        "training.seed": task.seed,
        "training.device": task.device,
        "samples.prompts": list(task.prompts),
        "samples.sampling.max_new_tokens": SAMPLE_TOKENS,
        "logging.run_name": RUN_NAME,
        "logging.report": True,
    }
    reasons = {key: chosen.why for key, chosen in plan.settings.items()}
    reasons["training.max_time"] = f"what the short runs before it have left of {clock(task.seconds)}"
    line = shlex.join(["transformerlm-train", f"--config={path}"])
    head = f"{line}\nThe comments say why. Change what you like, and run that line."
    path.write_text(commented_toml(settings, reasons, head=head), encoding="utf-8")


# --- the prediction ------------------------------------------------------------------------------------------------


def state(home: Path, said: Statement) -> None:
    """Say what the run should reach, and write it down, before the run begins."""
    from transformerlm.utils.files import write_whole

    write_whole(home / PREDICTION, json.dumps(asdict(said), indent=1) + "\n")
    found = said.bits_per_byte
    note(
        f"expected: {found.middle:.3f} bits per byte on the validation text, between {found.low:.3f} and "
        f"{found.high:.3f} in {_cases(found.confidence)}"
    )
    note(
        f"for comparison: {said.probe.bits_per_byte:.3f} after the short run, {said.gzip_bits_per_byte:.3f} by gzip, "
        f"{said.unigram_bits_per_byte:.3f} by the tokens' frequencies"
    )


def _cases(confidence: float) -> str:
    tenths = 10 * confidence
    return f"{tenths:.0f} of 10 cases" if abs(tenths - round(tenths)) < 1e-9 else f"{confidence:.0%} of all cases"


def _times(passes: float) -> str:
    return f"{passes:.2g} times" if passes < 9.5 else f"{passes:.0f} times"


# --- the run -------------------------------------------------------------------------------------------------------


def train(home: Path, said: Statement) -> bool:
    """Begin the training or go on with it, say and write down how good the prediction was; return whether it can be."""
    from transformerlm.experiments.fit.results import judgement, read_result, row_of
    from transformerlm.utils.files import write_whole

    run_with("train", [f"--config={home / 'train.toml'}", *_places_in(home)])
    try:
        result = read_result(home / RUN_NAME)
    except ValueError as error:
        note(f"nothing to hold against the prediction: {error}")
        return False
    found = judgement(said.bits_per_byte, result)
    write_whole(home / OUTCOME, json.dumps({**found, "row": asdict(row_of(result, said))}, indent=1) + "\n")
    note("\n" + _verdict(found))
    if result.steps < SLOW * said.steps and result.stopped_by == "max_time":
        note(f"the machine was slower than it was while it was timed: {result.steps:,} steps instead of {said.steps:,}")
    return True


def _places_in(home: Path) -> list[str]:
    """Return the options with which a directory that was copied or moved is trained, and not where it was before."""
    try:
        written = tomllib.loads((home / "train.toml").read_text(encoding="utf-8")).get("runs_dir")
    except (OSError, ValueError):  # the training says what is wrong with it
        return []
    if written is None or Path(read_name(written)).absolute() == home.absolute():
        return []
    return [f"--{key}={place}" for key, place in _places(home).items()]


def hints_of_more_time(run: Path, said: Statement, longer: str) -> list[tuple[str, str]]:
    """Return the hint that trains a run for twice its time, which is `longer`, if that would make it better."""
    from transformerlm.experiments.fit.choice import gains_by_more_time

    if not gains_by_more_time(said.passes):
        return []
    again = [f"--training.max_steps={2 * said.steps}", f"--training.max_time={longer}"]
    command = command_line("train", f"--config={run / 'config.toml'}", *again)
    return [(f"train it to twice the time: {longer}", command)]


def _verdict(found: dict[str, Any]) -> str:
    side = "above" if found["above_middle"] > 0 else "below"
    where = "inside" if found["inside"] else "outside"
    return (
        f"it came to {found['bits_per_byte']:.3f} bits per byte: {where} the interval, "
        f"{abs(found['above_middle']):.1%} {side} what was expected"
    )
