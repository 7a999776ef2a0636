"""`transformerlm-eval` with `mode = "answers"`: conversations in, how many answers are exactly right out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.checkpoints import described
from cli.entry import STOP_CODES
from cli.progress import Progress
from cli.tables import shortened, table_lines
from cli.terminal import LIVE, note, print_record, working
from config.eval import EvalConfig
from config.schemas import duration_seconds

if TYPE_CHECKING:
    from transformerlm.evaluation.answers import Question
    from transformerlm.inference.answers import Answer
    from transformerlm.tokenizer.chat import ChatFormat

NUM_WRONG = 5
MOST_SHOWN = 100  # characters of a question
ENDS = {"SIGINT": "Ctrl-C", "time": "time"}


@dataclass
class _Subject:
    """A checkpoint, its answers as they come, and those that it has given, by the number of the question."""

    path: Path
    answers: Iterator[Answer]
    end_strings: tuple[str, ...] = ()
    given: dict[int, str | None] = field(default_factory=dict)
    """None: the answer had not ended when it was long enough."""

    def is_right(self, questions: Sequence[Question], number: int) -> bool:
        return self.given[number] == questions[number].reference


def evaluate_answers(config: EvalConfig) -> int:
    """Let each checkpoint answer, and report how many answers are right; return the exit code."""
    with working("starting"):
        from transformerlm.checkpoints.directory import resolve
        from transformerlm.evaluation.answers import read_questions

        paths = [resolve(path) for path in config.checkpoints]
        questions = read_questions(
            config.input,
            messages_field=config.chat.messages_field if config.chat else "messages",
            kind_field=config.kind_field,
            refuse_invalid=config.invalid_utf8 == "refuse",
        )
        num_all = len(questions)
        questions = _drawn(config, questions)
        subjects = [_subject(config, path, questions) for path in paths]
    for named, path in zip(config.checkpoints, paths, strict=True):
        note(described(named, path))
    _note_out_of_reach(subjects, questions)
    stopped_by = _answer_all(config, subjects, questions)
    answered = range(_num_answered(subjects))
    record = _record(config, subjects, [questions[number] for number in answered], answered, questions)
    record |= {"partial": len(answered) < num_all, "stopped_by": stopped_by, "questions": num_all}
    _show(record, subjects, questions)
    print_record(record)
    return STOP_CODES["SIGINT"] if stopped_by == "SIGINT" else 0


def _note_out_of_reach(subjects: Sequence[_Subject], questions: Sequence[Question]) -> None:
    """Say of each way to end an answer how many right answers it cuts short."""
    from transformerlm.evaluation.answers import count_out_of_reach

    for end_strings in dict.fromkeys(subject.end_strings for subject in subjects):
        if cut := count_out_of_reach(questions, end_strings):
            ends = ", ".join(json.dumps(end, ensure_ascii=False) for end in end_strings)
            held = f"{cut:,} of {len(questions):,} right answers hold the string that ends an answer ({ends})"
            note(f"{held}: none of these can be right")


def _drawn(config: EvalConfig, questions: list[Question]) -> list[Question]:
    """Return the questions of at most `max_documents` conversations, in an order that `seed` draws.

    So the first ones of them are a sample of all.
    """
    from transformerlm.evaluation.documents import draw

    rows = sorted({question.conversation for question in questions})
    drawn = {rows[number] for number in draw(config.max_documents or len(rows), len(rows), seed=config.seed)}
    chosen = [question for question in questions if question.conversation in drawn]
    return [chosen[number] for number in _shuffled(len(chosen), seed=config.seed)]


def _num_answered(subjects: Sequence[_Subject]) -> int:
    """Return how many questions were answered by all up to the first that was not.

    Others may be answered, too, but short answers end first, and would count too often.
    """
    return next(number for number in count() if not all(number in subject.given for subject in subjects))


def _shuffled(count: int, *, seed: int) -> list[int]:
    import random

    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def _subject(config: EvalConfig, path: Path, questions: Sequence[Question]) -> _Subject:
    """Load a checkpoint and give it all questions, each after the token that starts the model's documents."""
    from transformerlm.inference.answers import answers
    from transformerlm.inference.generate import PREFIX_BYTES
    from transformerlm.inference.predictor import Predictor
    from transformerlm.tokenizer.chat import ChatRenderer

    predictor = Predictor.from_checkpoint(path, device=config.device, precision=config.precision)
    renderer = ChatRenderer(predictor.tokenizer, _format(config, path), start_id=predictor.document_ids.start_id)
    prompts = [renderer.prompt(question.messages).tolist() for question in questions]
    longest = max(map(len, prompts))
    if longest > predictor.model.context_length:
        count = sum(len(prompt) > predictor.model.context_length for prompt in prompts)
        note(f"{path}: {count:,} of {len(prompts):,} questions are longer than its context: it reads their end")
    batcher = predictor.batcher(
        slots=min(config.batch_size, len(prompts)),
        prefix_cache_bytes=PREFIX_BYTES,
        max_length=min(longest + config.max_new_tokens, predictor.model.context_length),
        reads_first=True,
    )
    given = answers(
        batcher,
        prompts,
        tokenizer=predictor.tokenizer,
        max_new_tokens=config.max_new_tokens,
        ends=frozenset({*predictor.document_ids.eos_token_ids, *renderer.end_ids}),
        stop=renderer.end_strings,
        start_id=predictor.start_id,
    )
    return _Subject(path, given, renderer.end_strings)


def _format(config: EvalConfig, path: Path) -> ChatFormat:
    from transformerlm.checkpoints.chat_format import chat_format_of
    from transformerlm.tokenizer.chat import ChatFormat

    if config.chat is not None and config.chat.model_fields_set - {"messages_field"}:
        return ChatFormat.of(config.chat.model_dump(exclude={"messages_field"}))
    return chat_format_of(path) or ChatFormat()


def _answer_all(config: EvalConfig, subjects: Sequence[_Subject], questions: Sequence[Question]) -> str | None:
    """Let all checkpoints answer side by side, and return what ended it early, if anything did."""
    limit = duration_seconds(config.time) if config.time else None
    total = len(questions)
    progress = Progress(total * len(subjects), unit="answer", limit=limit)
    began = time.monotonic()
    num_right = 0
    try:
        while len((behind := min(subjects, key=lambda subject: len(subject.given))).given) < total:
            if limit is not None and time.monotonic() - began >= limit and _num_answered(subjects):
                return "time"
            answer = next(behind.answers)
            behind.given[answer.number] = answer.text if answer.is_whole else None
            num_right += behind.is_right(questions, answer.number)
            done = sum(len(subject.given) for subject in subjects)
            progress(done, {"exact_match": num_right / done} if len(subjects) == 1 else {})
    except KeyboardInterrupt:
        if not _num_answered(subjects):
            raise
        return "SIGINT"
    finally:
        LIVE.show(None)
    return None


def _record(
    config: EvalConfig,
    subjects: Sequence[_Subject],
    answered: list[Question],
    numbers: Sequence[int],
    questions: Sequence[Question],
) -> dict[str, Any]:
    """Return what the JSON line says of settings and results; `numbers` are those of the questions answered by all."""
    from transformerlm.evaluation.answers import compare_answers, count_out_of_reach, score_answers, score_by_kind

    drawing: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    settings = drawing | {
        name: getattr(config, name) for name in ("mode", "max_new_tokens", "time", "max_documents", "precision")
    }
    record: dict[str, Any] = {"event": "evaluated", "input": config.input}
    record |= {f"params.{name}": value for name, value in settings.items()}
    rights = [[subject.is_right(questions, number) for number in numbers] for subject in subjects]
    for letter, subject, right in zip(("a.", "b.") if len(subjects) > 1 else ("",), subjects, rights, strict=True):
        found = score_answers(answered, right, **drawing)
        found["out_of_reach"] = count_out_of_reach(answered, subject.end_strings)
        record[f"{letter}checkpoint"] = str(subject.path)
        record |= {f"{letter}metrics.{name}": value for name, value in found.items()}
        record[f"{letter}kinds"] = score_by_kind(answered, right, **drawing)
    if len(subjects) > 1:
        difference = compare_answers(answered, *rights, **drawing)
        record |= {f"metrics.{name}": value for name, value in difference.items()}
    return record


def _show(record: dict[str, Any], subjects: Sequence[_Subject], questions: Sequence[Question]) -> None:
    """Write a table of kinds for people, and some answers that are wrong."""
    letters = ("a.", "b.") if len(subjects) > 1 else ("",)
    heads = ["kind", "answers", *(["exactly right"] if len(letters) == 1 else ["first", "second"])]
    parts = [record[f"{letter}kinds"] for letter in letters]
    rows = [[kind, f"{parts[0][kind]['answers']:,}", *(_share(part[kind]) for part in parts)] for kind in parts[0]]
    wholes = [_metrics(record, letter) for letter in letters]
    rows.append(["all", f"{wholes[0]['answers']:,}", *map(_share, wholes)])
    note("\n".join(f"  {line}" for line in table_lines(heads, rows)))
    if len(letters) > 1:
        found = _metrics(record, "")
        low, high = found["exact_match_difference_low"], found["exact_match_difference_high"]
        ends = "" if low is None else f"  [{low:+.1%}, {high:+.1%}]"
        note(f"  second - first  {found['exact_match_difference']:+.1%}{ends}")
    if record["partial"]:
        stopped = record["stopped_by"]
        note(f"partial ({ENDS[stopped] if stopped else 'max_documents'}): of {record['questions']:,} questions")
    _show_wrong(subjects[-1], questions)


def _show_wrong(subject: _Subject, questions: Sequence[Question]) -> None:
    wrong = [number for number in sorted(subject.given) if not subject.is_right(questions, number)]
    for number in wrong[:NUM_WRONG]:
        *_, (_, asked) = (("user", ""), *questions[number].messages)
        given = subject.given[number]
        answer = "no end" if given is None else _quoted(given)
        expected = _quoted(questions[number].reference)
        note(f"  wrong: {shortened(' '.join(asked.split()), MOST_SHOWN)}  found {answer}, expected {expected}")


def _quoted(text: str) -> str:
    return json.dumps(shortened(text, MOST_SHOWN), ensure_ascii=False)


def _metrics(record: dict[str, Any], letter: str) -> dict[str, Any]:
    start = f"{letter}metrics."
    return {name.removeprefix(start): value for name, value in record.items() if name.startswith(start)}


def _share(metrics: dict[str, Any]) -> str:
    low, high = metrics["exact_match_low"], metrics["exact_match_high"]
    ends = "" if low is None else f"  [{low:.1%}, {high:.1%}]"
    return f"{metrics['exact_match']:.1%}{ends}"
