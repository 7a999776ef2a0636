"""All that a run's directory says of it, as facts on one level."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformerlm.experiments.compare import BITS, MEASURED_ON, NATS
from transformerlm.experiments.history import RunHistory, read_history
from transformerlm.experiments.listing import disk_bytes
from transformerlm.experiments.reproduction import command_of
from transformerlm.experiments.run_directories import RunSummary, summary_of
from transformerlm.experiments.saved_checkpoints import checkpoint_directories, linked_names
from transformerlm.experiments.settings import changed

Facts = dict[str, Any]
CURVE_POINTS = 200
_TRAINING_LOSS, _SPEED, _SECONDS = "metrics.loss", "metrics.tokens_per_second", "time.elapsed_s"


def facts_of(directory: Path) -> Facts:
    """Return a run's facts; raise OSError where its lines cannot be read.

    Keys with a dot belong together: `settings.` are those that differ from the defaults, `environment.` and
    `measured_on.` are from the last start, `events.` counts. A number that is not finite is None.
    """
    history, summary = read_history(directory, name=directory.resolve().name), summary_of(directory)
    loss = history.series.get(_TRAINING_LOSS)
    return {
        "name": history.name,
        "directory": str(directory),
        "state": summary.state,
        **_reached(history, summary),
        **_validations(history),
        "elapsed_s": _last(history, _SECONDS),
        "disk_bytes": disk_bytes(directory),
        "bad_lines": history.bad,
        "curve": [] if loss is None else _thinned([_finite(value) for value in loss.values.tolist()]),
        **{f"settings.{key}": value for key, value in changed(history.config).items()},
        **{f"measured_on.{key}": value for key in MEASURED_ON if (value := history.started.get(key))},
        **{f"environment.{key}": value for key, value in _plain(history.environment).items()},
        **checkpoints_of(directory),
        "reproduce": command_of(history),
        **{f"events.{name}": number for name, number in Counter(one["event"] for one in history.events).items()},
        "resumed_at": [one.get("step") for one in history.events if one["event"] == "resumed"],
        "ended_by": None if summary.state == "running" else ended_by(history),
    }


_ENDS = ("started", "finished", "failed")


def ended_by(history: RunHistory) -> Any:
    """Return the signal, the reason or the error with which a run ended; None while it goes on, or was killed."""
    event = next((one for one in reversed(history.events) if one["event"] in _ENDS), {"event": "started"})
    return {"finished": event.get("signal") or event.get("reason"), "failed": event.get("error")}.get(event["event"])


def _reached(history: RunHistory, summary: RunSummary) -> Facts:
    return {
        "step": summary.step,
        "max_steps": summary.max_steps,
        "tokens": summary.tokens,
        "parameters": summary.parameters,
        "flops_per_token": summary.flops_per_token,
        "loss": _last(history, _TRAINING_LOSS),
        "tokens_per_second": _last(history, _SPEED),
    }


def _last(history: RunHistory, key: str) -> float | None:
    series = history.series.get(key)
    return _finite(float(series.values[-1])) if series is not None and len(series.values) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _validations(history: RunHistory) -> Facts:
    """Return the last and the lowest validation; nothing for a run without any."""
    series = history.series.get(NATS)
    if series is None or not len(series.steps):
        return {}
    bits = history.series.get(BITS)
    by_step = {} if bits is None else dict(zip(bits.steps.tolist(), bits.values.tolist(), strict=True))
    found = list(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    finite = [pair for pair in found if math.isfinite(pair[1])]
    facts: Facts = {"num_validations": len(found)}
    for name, pairs in (("", found[-1:]), ("best_", sorted(finite, key=lambda pair: pair[1])[:1])):
        for step, loss in pairs:
            facts |= {f"{name}val_step": step, f"{name}val_loss": _finite(loss)}
            facts[f"{name}val_bits_per_byte"] = _finite(by_step.get(step, math.nan))
    return facts


def _plain(event: Mapping[str, Any]) -> Facts:
    return {key: value for key, value in event.items() if key not in ("event", "step")}


def _thinned(values: list[float | None]) -> list[float | None]:
    return values[:: max(1, math.ceil(len(values) / CURVE_POINTS))]


def checkpoints_of(directory: Path) -> Facts:
    """Return the steps and sizes of a run's checkpoints, the oldest first, and the steps of `latest` and `best`."""
    try:
        found = checkpoint_directories(directory)
    except OSError:
        found = {}
    steps = {path.name: step for step, path in found.items()}
    links = {link: steps[name] for link, name in linked_names(directory).items() if name in steps}
    return {
        "checkpoints.steps": list(found),
        "checkpoints.bytes": [disk_bytes(path) for path in found.values()],
        **{f"checkpoints.{link}": step for link, step in links.items()},
    }
