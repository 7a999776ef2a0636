"""`transformerlm-eval`: one checkpoint or two and a text in, loss, perplexity and bits per byte out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.eval")

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.checkpoints import described
from cli.progress import StageProgress
from cli.terminal import note, print_record, working
from cli.utils import Command
from cli.utils import main as run_command
from config.eval import EvalConfig

if TYPE_CHECKING:
    from transformerlm.evaluation.scoring import Scores
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.document_ids import DocumentIds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-eval", EvalConfig, evaluate), argv)


def evaluate(config: EvalConfig) -> None:
    """Evaluate as the configuration says: a table on stderr, and a JSON line on stdout, if that is no terminal."""
    with working("starting"):
        from transformerlm.evaluation.statistics import compare, summarize
        from transformerlm.training.checkpoint import resolve

        subjects = [_open(config, resolve(path)) for path in config.checkpoints]
    texts = None if _is_token_file(config) else _read(config, config.separator or _separator_of(subjects))
    for path, subject in zip(config.checkpoints, subjects, strict=True):
        note(described(path, subject.path))
    scores, records = [], []
    for subject in subjects:
        score, params = _score(config, subject, texts)
        metrics = summarize(score, resamples=config.resamples, seed=config.seed)
        scores.append(score)
        records.append({**params, **{f"metrics.{name}": value for name, value in metrics.items()}})
    record: dict[str, Any] = {"event": "evaluated", "input": config.input, "params.mode": config.mode}
    record |= {"params.resamples": config.resamples, "params.seed": config.seed}
    if len(records) == 1:
        record |= records[0]
    else:
        for letter, part in zip("ab", records, strict=True):
            record |= {f"{letter}.{name}": value for name, value in part.items()}
        difference = compare(*scores, resamples=config.resamples, seed=config.seed)
        record |= {f"metrics.{name}": value for name, value in difference.items()}
    _show(record, records)
    print_record(record)


def _is_token_file(config: EvalConfig) -> bool:
    return config.input[0].endswith(".npy")


@dataclass(frozen=True)
class _Subject:
    """A checkpoint to evaluate; `ids` are those at which its documents begin and end, as far as a text needs them."""

    path: Path
    tokenizer: Tokenizer
    ids: DocumentIds


def _open(config: EvalConfig, path: Path) -> _Subject:
    from transformerlm.training.checkpoint import load_tokenizer
    from transformerlm.training.document_ids import DocumentIds, ids_of_checkpoint, recorded_ids

    tokenizer = load_tokenizer(path)
    if config.separator is None and not _is_token_file(config):
        return _Subject(path, tokenizer, ids_of_checkpoint(path, tokenizer))
    given = DocumentIds.of_separator(tokenizer.special_token_ids.get(config.separator or ""))
    return _Subject(path, tokenizer, recorded_ids(path) or given)


def _separator_of(subjects: list[_Subject]) -> str:
    """Return the text that ends a document for all checkpoints.

    Raises:
        ValueError: they do not agree.
    """
    from transformerlm.evaluation.documents import DEFAULT_SEPARATOR

    found = [subject.ids.separator(subject.tokenizer) or DEFAULT_SEPARATOR for subject in subjects]
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
    if stats.invalid_utf8:
        note(f"the text is not all UTF-8: U+FFFD was read {stats.invalid_utf8:,} times in place of other bytes")
    return texts


def _score(config: EvalConfig, subject: _Subject, texts: list[str] | None) -> tuple[Scores, dict[str, Any]]:
    """Return what each document costs one checkpoint, and with which settings."""
    from transformerlm.evaluation.documents import encode_documents, open_token_file
    from transformerlm.evaluation.scoring import Windowing, score_documents
    from transformerlm.training.checkpoint import load_model
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import autocast, resolve_precision

    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    progress = StageProgress({"score": "token"})
    model = load_model(subject.path, device=device)
    windowing = Windowing(
        config.context_length,
        config.stride,
        batch_size=config.batch_size,
        autocast=partial(autocast, device, precision),
        progress=partial(progress, "score"),
    )
    context_length, stride = windowing.resolve(model)
    if texts is None:
        documents = open_token_file(config.input[0], subject.tokenizer)
    else:
        documents = encode_documents(texts, subject.tokenizer, document_ids=subject.ids)
    params = {"context_length": context_length, "stride": stride, "precision": precision}
    scores = score_documents(model, documents, mode=config.mode, windowing=windowing)
    return scores, {"checkpoint": str(subject.path), **{f"params.{name}": value for name, value in params.items()}}


def _show(record: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the table for people."""
    for part in records:
        note(part["checkpoint"])
        note("  {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes".format(**_metrics(part)))
        for name, title in (
            ("loss", "loss (nats/token)"),
            ("perplexity", "perplexity"),
            ("bits_per_byte", "bits/byte"),
        ):
            note(f"  {title:<18} {_with_interval(_metrics(part), name)}")
    if len(records) > 1:
        difference = _with_interval(_metrics(record), "bits_per_byte_difference")
        note(f"second - first, bits/byte  {difference}")


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("metrics."): value for name, value in record.items() if name.startswith("metrics.")}


def _with_interval(metrics: dict[str, Any], name: str) -> str:
    value, low, high = (metrics[f"{name}{end}"] for end in ("", "_low", "_high"))
    text = "too large to show" if value is None else f"{value:10.4f}"
    return text if low is None or high is None else f"{text}  [{low:.4f}, {high:.4f}]"
