"""What a command says of the checkpoint that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CLEARLY = 1.005  # times a loss: what training on or another seed changes in a loss is less


def described(path: Path, directory: Path) -> str:
    """Return the name, the step and the validation loss of a checkpoint, and where its run has a clearly better one."""
    from transformerlm.checkpoints.validation import read_state

    state = read_state(directory)
    loss, better = loss_of(state), ""
    if path.name != directory.name and directory.parent.name == "checkpoints" and has_better(state):
        best = directory.parent.parent / "best"
        better = f"; its best is {best}: step {state['best_step']:,}, val loss {state['best_val_loss']:.3f}"
    return f"{path}: step {state['step']:,}{'' if loss is None else f', val loss {loss:.3f}'}{better}"


def loss_of(state: dict[str, Any]) -> float | None:
    """Return the validation loss of a checkpoint by its state; None: it was not measured, or is not recorded."""
    is_best = state["step"] == state.get("best_step")
    loss: float | None = state.get("best_val_loss") if is_best else state.get("val_loss")
    return loss


def has_better(state: dict[str, Any]) -> bool:
    """Whether an older checkpoint of the run is clearly better, or this one's validation loss is not known."""
    best, own = state.get("best_val_loss"), loss_of(state)
    return best is not None and state.get("best_step") != state["step"] and (own is None or is_worse(own, best))


def is_worse(loss: float, than: float) -> bool:
    """Whether a validation loss is so much above another that it is no accident."""
    return loss > than * _CLEARLY
