"""The lines and facts of a run in words for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from cli.tables import real, short_bytes, short_number
from cli.terminal import clock, plain

Record = Mapping[str, Any]
_LINE_CHARS = 160


def words_of(record: Record, *, max_steps: int | None = None) -> str:
    """Return a line of a run in words: `step 250/1,000  loss 1.910  12,345 tokens/s`."""
    step = record.get("step")
    of = f"/{max_steps:,}" if max_steps is not None else ""
    at = f"step {step:,}{of}" if isinstance(step, int) else ""
    if "event" in record:
        details = {key: value for key, value in record.items() if key not in ("event", "step")}
        text = record.get("text.output") if record["event"] == "sample" else None
        said = repr(text) if text is not None else ", ".join(f"{key} {value}" for key, value in details.items())
        line = f"{at}  {record['event']}{': ' if said else ''}{said}"
        return plain(line.strip() if len(line) <= _LINE_CHARS else f"{line[:_LINE_CHARS].strip()}...")
    parts = [at]
    for key, form in (
        ("loss", "loss {:.3f}"),
        ("val_loss", "val loss {:.3f}"),
        ("val_bits_per_byte", "{:.3f} bits/byte"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    ):
        value = record.get(f"metrics.{key}")
        if isinstance(value, int | float):
            parts.append(form.format(value))
        elif value is not None:
            parts.append(f"{key} {value}")  # nan and inf are words
    return plain("  ".join(filter(None, parts)))


def rows_of(facts: Record) -> Iterator[tuple[str, str]]:
    """Yield the facts of a run as pairs of a title and words; a title may be empty, as a row that goes on."""
    of = f" of {facts['max_steps']:,}" if facts["max_steps"] is not None else ""
    ended = f", ended by {facts['ended_by']}" if facts["ended_by"] else ""
    yield "state", f"{facts['state']}{ended}"
    tokens = f", {facts['tokens']:,} tokens" if facts["tokens"] is not None else ""
    spent = f", {clock(facts['elapsed_s'])} of training" if facts["elapsed_s"] is not None else ""
    yield "step", f"{facts['step']:,}{of}{tokens}{spent}"
    if facts["parameters"] is not None:
        flops = f", {short_number(facts['flops_per_token'])} FLOPs a token" if facts["flops_per_token"] else ""
        yield "parameters", f"{facts['parameters']:,}{flops}"
    yield from _loss_rows(facts)
    yield from _several("settings", (f"{key} = {_value(value)}" for key, value in _under(facts, "settings")))
    yield from _several("measured on", (f"{key} {value}" for key, value in _under(facts, "measured_on")))
    yield from _several("environment", (f"{key} {_value(value)}" for key, value in _under(facts, "environment")))
    yield from _several("checkpoints", _checkpoints(facts))
    yield "size", f"{short_bytes(facts['disk_bytes'])} on disk"
    events = ", ".join(f"{number} {name}" for name, number in _under(facts, "events"))
    if events:
        yield "events", events
    if facts["resumed_at"]:
        yield "resumed", "at step " + ", ".join(f"{step:,}" for step in facts["resumed_at"] if isinstance(step, int))
    if facts["bad_lines"]:
        several = facts["bad_lines"] != 1
        words = "lines of metrics.jsonl are no JSON objects, and are" if several else ""
        words = words or "line of metrics.jsonl is no JSON object, and is"
        yield "damage", f"{facts['bad_lines']} {words} left out"
    if facts["reproduce"]:
        yield "reproduce", facts["reproduce"]


def _loss_rows(facts: Record) -> Iterator[tuple[str, str]]:
    if facts.get("best_val_loss") is not None:
        best = f"{facts['best_val_loss']:.3f} at step {facts['best_val_step']:,}, the lowest"
        last = f"; {real(facts['val_loss'])} at step {facts['val_step']:,}, the last" if facts["val_loss"] else ""
        yield "validation", best + ("" if facts["best_val_step"] == facts["val_step"] else last)
    if facts.get("best_val_bits_per_byte") is not None:
        yield "bits per byte", real(facts["best_val_bits_per_byte"])
    if facts["loss"] is not None:
        speed = f", {facts['tokens_per_second']:,.0f} tokens/s" if facts["tokens_per_second"] else ""
        yield "training loss", f"{facts['loss']:.3f} at the last line{speed}"


def _under(facts: Record, section: str) -> Iterator[tuple[str, Any]]:
    prefix = f"{section}."
    return ((key.removeprefix(prefix), value) for key, value in facts.items() if key.startswith(prefix))


def _several(title: str, texts: Iterator[str]) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(texts):
        yield ("" if number else title), text


def _value(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return shlex.join(value)
    return str(value).lower() if isinstance(value, bool) else "unknown" if value is None else str(value)


def _checkpoints(facts: Record) -> Iterator[str]:
    for step, size in zip(facts["checkpoints.steps"], facts["checkpoints.bytes"], strict=True):
        links = [link for link in ("latest", "best") if facts.get(f"checkpoints.{link}") == step]
        yield f"step {step:,}, {short_bytes(size)}{', ' if links else ''}{', '.join(links)}"
