"""What a command says about the checkpoint that it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CLEARLY = 1.005  # times a loss: a little more training, or another seed, changes a loss by less


def described(path: Path, directory: Path) -> str:
    """Return name, step and validation loss of a checkpoint, and whether its run has a clearly better one."""
    from transformerlm.checkpoints.validation import read_state

    state = read_state(directory)
    loss, better = loss_of(state), ""
    if path.name != directory.name and directory.parent.name == "checkpoints" and has_better(state):
        best = directory.parent.parent / "best"
        better = f"; its best is {best}: step {state['best_step']:,}, val loss {state['best_val_loss']:.3f}"
    return f"{path}: step {state['step']:,}{'' if loss is None else f', val loss {loss:.3f}'}{better}"


def loss_of(state: dict[str, Any]) -> float | None:
    """Return the validation loss in a checkpoint's state; None: it was not measured, or not recorded."""
    is_best = state["step"] == state.get("best_step")
    loss: float | None = state.get("best_val_loss") if is_best else state.get("val_loss")
    return loss


def has_better(state: dict[str, Any]) -> bool:
    """Return whether an older checkpoint of the run is clearly better, or this one's validation loss is unknown."""
    best, own = state.get("best_val_loss"), loss_of(state)
    return best is not None and state.get("best_step") != state["step"] and (own is None or is_worse(own, best))


def is_worse(loss: float, than: float) -> bool:
    """Return whether a validation loss is so far above another that it cannot be chance."""
    return loss > than * _CLEARLY
