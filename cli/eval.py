"""`transformerlm-eval`: one checkpoint or two and a text in; loss and bits per byte, or right answers, out."""

from __future__ import annotations

from config.special_tokens import END_OF_TEXT

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.eval")

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli.checkpoints import described
from cli.entry import STOP_CODES
from cli.progress import Progress
from cli.terminal import LIVE, note, note_invalid_utf8, print_record, working
from cli.utils import Command
from cli.utils import main as run_command
from config.eval import EvalConfig, is_token_file
from config.schemas import duration_seconds

if TYPE_CHECKING:
    from transformerlm.checkpoints.document_ids import DocumentIds
    from transformerlm.evaluation.documents import Array
    from transformerlm.evaluation.scoring import Scoring
    from transformerlm.tokenizer.tokenizer import Tokenizer

# What --help shows.
SHORT = (
    "checkpoint",
    "compare",
    "input",
    "text_field",
    "mode",
    "time",
    "max_documents",
    "device",
    "precision",
    "resamples",
)
EXAMPLES = (
    ("on the validation split", "--config eval"),
    ("on a text", "--checkpoint runs/first --input data/corpus.txt"),
    ("two models on the same text", "--compare runs/first runs/second --input data/corpus.txt"),
    ("answers in conversations", "--mode answers --checkpoint runs/chat --input data/chat/test.jsonl"),
)
SECONDS_BETWEEN_ESTIMATES = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-eval", EvalConfig, evaluate, short=SHORT, examples=EXAMPLES), argv)


def evaluate(config: EvalConfig) -> int:
    """Evaluate as the configuration says: a table on stderr, and a JSON line on stdout unless that is a terminal.

    If Ctrl-C or `time` ends the text early, the results so far are reported. Returns the exit code.
    """
    if config.mode == "answers":
        from cli.eval_answers import evaluate_answers

        return evaluate_answers(config)
    with working("starting"):
        from transformerlm.checkpoints.directory import resolve
        from transformerlm.evaluation.scoring import scores_in_common
        from transformerlm.evaluation.statistics import compare, summarize

        subjects = [_open(config, resolve(path)) for path in config.checkpoints]
    texts = None if _is_token_file(config) else _read(config, config.separator or _separator_of(subjects))
    for path, subject in zip(config.checkpoints, subjects, strict=True):
        note(described(path, subject.path))
    tasks = [_task(config, subject, texts) for subject in subjects]
    stopped_by = _score(config, [task.scoring for task in tasks])
    scores = scores_in_common([task.scoring for task in tasks])
    is_partial = bool(stopped_by) or len(scores[0].nats) < tasks[0].num_documents
    settings: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    record: dict[str, Any] = {"event": "evaluated", "input": config.input, "params.mode": config.mode}
    record |= {f"params.{name}": value for name, value in settings.items()}
    record |= {"params.time": config.time, "params.max_documents": config.max_documents}
    record |= {"partial": is_partial, "stopped_by": stopped_by, "documents": tasks[0].num_documents}
    record |= {"learnt_only": tasks[0].learnt_only}
    parts = [
        task.facts | {f"metrics.{name}": value for name, value in summarize(each, **settings).items()}
        for task, each in zip(tasks, scores, strict=True)
    ]
    if len(parts) == 1:
        record |= parts[0]
    else:
        for letter, part in zip("ab", parts, strict=True):
            record |= {f"{letter}.{name}": value for name, value in part.items()}
        record |= {f"metrics.{name}": value for name, value in compare(*scores, **settings).items()}
    _show(record, parts)
    print_record(record)
    return STOP_CODES["SIGINT"] if stopped_by == "SIGINT" else 0


def _is_token_file(config: EvalConfig) -> bool:
    return is_token_file(config.input[0])


@dataclass(frozen=True)
class _Subject:
    """A checkpoint to evaluate; `ids` say where its documents begin and end, as far as the input needs them."""

    path: Path
    tokenizer: Tokenizer
    ids: DocumentIds


def _open(config: EvalConfig, path: Path) -> _Subject:
    from transformerlm.checkpoints.document_ids import DocumentIds, ids_of_checkpoint, recorded_ids
    from transformerlm.checkpoints.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    if config.separator is None and not _is_token_file(config):
        return _Subject(path, tokenizer, ids_of_checkpoint(path, tokenizer))
    separator = None if _is_token_file(config) else config.separator  # a token file names its own
    given = DocumentIds.of_separator(tokenizer.special_token_ids.get(separator or ""))
    return _Subject(path, tokenizer, recorded_ids(path, tokenizer) or given)


def _separator_of(subjects: list[_Subject]) -> str:
    """Return the text that ends a document for all checkpoints.

    Raises:
        ValueError: they do not agree.
    """

    found = [subject.ids.separator(subject.tokenizer) or END_OF_TEXT for subject in subjects]
    if len(set(found)) > 1:
        raise ValueError(
            f"separator: expected one for both checkpoints, found {found[0]!r} and {found[1]!r}; set separator to what "
            "is between the documents of this text"
        )
    return found[0]


def _read(config: EvalConfig, separator: str) -> list[str]:
    from transformerlm.evaluation.documents import read_documents
    from transformerlm.utils.text_files import ReadStats

    stats = ReadStats(refuse_invalid=config.invalid_utf8 == "refuse")
    texts = read_documents(
        config.input,
        separator=separator,
        text_field=config.text_field,
        allow_special=config.allow_special,
        stats=stats,
    )
    note_invalid_utf8(stats.invalid_utf8)
    return texts


@dataclass(frozen=True)
class _Task:
    """One checkpoint's scoring, and what the record says about it.

    `num_documents` are those of the whole text; `learnt_only`: it says which tokens are learnt, and those alone count.
    """

    scoring: Scoring
    num_documents: int
    learnt_only: bool
    facts: dict[str, Any]


def _task(config: EvalConfig, subject: _Subject, texts: list[str] | None) -> _Task:
    from transformerlm.checkpoints.load import load_model
    from transformerlm.evaluation.documents import encode_documents, open_token_file
    from transformerlm.evaluation.scoring import Scoring, Windowing
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import autocast, resolve_precision

    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    model = load_model(subject.path, device=device)
    compute = partial(autocast, device, precision)
    windowing = Windowing(config.context_length, config.stride, batch_size=config.batch_size, autocast=compute)
    context_length, stride = windowing.resolve(model)
    if texts is None:
        whole = open_token_file(config.input[0], subject.tokenizer, document_ids=subject.ids)
        documents, num_documents = whole.take(_drawn(config, len(whole))), len(whole)
        if not documents.num_bytes.any():
            raise ValueError(
                f"{config.input[0]}: max_documents: expected text, found none in the {len(documents)} drawn"
            )
    else:
        some, num_documents = [texts[number] for number in _drawn(config, len(texts))], len(texts)
        documents = encode_documents(some, subject.tokenizer, document_ids=subject.ids)
    params = {"context_length": context_length, "stride": stride, "precision": precision}
    mode: Literal["documents", "sliding"] = "sliding" if config.mode == "sliding" else "documents"
    scoring = Scoring(model, documents, mode=mode, windowing=windowing, seed=config.seed)
    facts = {"checkpoint": str(subject.path), **{f"params.{name}": value for name, value in params.items()}}
    return _Task(scoring, num_documents, documents.learnt is not None, facts)


def _drawn(config: EvalConfig, num_documents: int) -> Array:
    from transformerlm.evaluation.documents import draw

    return draw(config.max_documents or num_documents, num_documents, seed=config.seed)


def _score(config: EvalConfig, scorings: list[Scoring]) -> str | None:
    """Read the text with all checkpoints side by side, and return what ended it early, if anything did."""
    limit = duration_seconds(config.time) if config.time else None
    progress = Progress(sum(scoring.num_tokens[1] for scoring in scorings), unit="token", limit=limit)
    began = shown = time.monotonic()
    facts = _so_far(scorings)
    try:
        while unfinished := [scoring for scoring in scorings if not scoring.is_done]:
            behind = min(unfinished, key=lambda scoring: scoring.num_tokens[0] / scoring.num_tokens[1])
            if limit is not None and time.monotonic() - began >= limit and _so_far(scorings):
                return "time"
            behind.advance()
            if time.monotonic() - shown > SECONDS_BETWEEN_ESTIMATES:
                facts, shown = _so_far(scorings), time.monotonic()
            progress(sum(scoring.num_tokens[0] for scoring in scorings), facts)
    except KeyboardInterrupt:
        if not _so_far(scorings):
            raise
        return "SIGINT"
    finally:
        LIVE.show(None)
    return None


def _so_far(scorings: list[Scoring]) -> dict[str, float]:
    from transformerlm.evaluation.scoring import scores_in_common
    from transformerlm.evaluation.statistics import estimate

    scores = scores_in_common(scorings)
    if not scores[0].num_bytes.any():
        return {}
    value, margin = estimate(*scores)
    name = "bits_per_byte" if len(scores) == 1 else "bits_per_byte_difference"
    return {name: value} | ({} if margin is None else {"margin": margin})


def _show(record: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Write the table for people."""
    from transformerlm.evaluation.statistics import FEW_DOCUMENTS

    whole = f" of {record['documents']:,}" if record["partial"] else ""
    for part in parts:
        note(part["checkpoint"])
        note(
            "  {documents:,}{whole} documents, {tokens:,} tokens, {bytes:,} bytes".format(whole=whole, **_metrics(part))
        )
        for name, title in (
            ("loss", "loss (nats/token)"),
            ("perplexity", "perplexity"),
            ("bits_per_byte", "bits/byte"),
        ):
            note(f"  {title:<18} {_with_interval(_metrics(part), name)}")
    if record["learnt_only"]:
        note("conversations: the tokens that are learnt count alone, and special tokens among them have no bytes")
    if len(parts) > 1:
        difference = _with_interval(_metrics(record), "bits_per_byte_difference")
        note(f"second - first, bits/byte  {difference}")
    if record["partial"]:
        ends = {"SIGINT": "Ctrl-C", "time": f"time = {record['params.time']}"}
        ended = f"stopped by {ends[record['stopped_by']]}" if record["stopped_by"] else "max_documents"
        note(f"partial ({ended}): an estimate of the whole text")
    if _metrics(parts[0])["documents"] < FEW_DOCUMENTS and _metrics(parts[0])["loss_low"] is not None:
        note(f"fewer than {FEW_DOCUMENTS} documents: do not trust the intervals")


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("metrics."): value for name, value in record.items() if name.startswith("metrics.")}


def _with_interval(metrics: dict[str, Any], name: str) -> str:
    value, low, high = (metrics[f"{name}{end}"] for end in ("", "_low", "_high"))
    text = "too large to show" if value is None else f"{value:10.4f}"
    return text if low is None or high is None else f"{text}  [{low:.4f}, {high:.4f}]"
