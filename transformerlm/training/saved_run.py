"""A run as its checkpoints keep it: what it saves of itself, and how it resumes."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from config.io import dump_toml
from config.train import TrainConfig
from transformerlm.checkpoints import chat_format, document_ids
from transformerlm.checkpoints.directory import step_name
from transformerlm.checkpoints.load import load_optimizer, load_weights
from transformerlm.checkpoints.more_tokens import EXTENDED
from transformerlm.checkpoints.optimizer_state import OptimizerState
from transformerlm.checkpoints.save import Snapshot
from transformerlm.checkpoints.validation import CheckpointError, as_checkpoint_error, read_state
from transformerlm.distributed.rows import Rows
from transformerlm.distributed.sharding import Shards
from transformerlm.distributed.world import is_main, together
from transformerlm.training import resume_checks
from transformerlm.training.build import measured_on
from transformerlm.training.run_data import RunData
from transformerlm.training.runtime import Runtime
from transformerlm.training.spike_guard import GuardState
from transformerlm.training.state import TrainState
from transformerlm.utils.seed import rng_state, set_rng_state

_MEASURED_ON = "measured_on"
_UNSAID = ("valid_context_length", "valid_mask_sha256", "document_mask")
# The checkpoints of earlier versions lack these, too.
_LATER = ("guard", "lowest_val_loss", "patience_val_loss", "validations_since_lowest", "seconds", "elapsed_s")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint's directory and the values of its `state.json`; a run can resume from it."""

    directory: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> SavedRun:
        """Read a checkpoint's `state.json`.

        Raises:
            CheckpointError: it lacks something that a run needs to resume.
        """
        fresh = asdict(TrainState())
        values = {name: fresh[name] for name in _LATER} | read_state(directory)
        missing = {*fresh, "data", "optimizer", "rng", "wandb_id"} - values.keys()
        if missing:
            kinds = {"imported_from": "an imported model", EXTENDED: "a model with tokens added"}
            advice = "choose another logging.run_name, and name it in checkpoint.init_from"
            hint = next((f"; {kind}: {advice}" for key, kind in kinds.items() if key in values), "")
            raise CheckpointError(f"{directory}: state.json does not hold {', '.join(sorted(missing))}{hint}")
        _check_guard(values["guard"], directory)
        return cls(directory, values)

    @property
    def wandb_id(self) -> str | None:
        """The id under which W&B knows the run."""
        found: str | None = self.values["wandb_id"]
        return found

    def state(self, config: TrainConfig, data: RunData) -> TrainState:
        """Return what the run remembered, without losses that were measured on another validation text than `data`."""
        state = TrainState(**{name: self.values[name] for name in asdict(TrainState())})
        state.guard = GuardState(**self.values["guard"])
        if self._is_measured_otherwise(config, data):
            state.forget_validations()
        else:
            state.best_step, state.best_val_loss = self.best or (None, None)
        return state

    @property
    def best(self) -> tuple[int, float] | None:
        """The step and the loss of the best checkpoint beside it, or its own where that is gone; None: it has none."""
        step, own = self.values["best_step"], self.values.get("val_loss")
        if step is not None and self.directory.with_name(step_name(step)).is_dir():
            return step, self.values["best_val_loss"]
        return None if step is None or own is None else (self.values["step"], own)

    def _is_measured_otherwise(self, config: TrainConfig, data: RunData) -> bool:
        before = self.values.get(_MEASURED_ON)  # checkpoints of earlier versions lack it, or some of it
        if not isinstance(before, dict) or "valid_sha256" not in before:
            return False
        now = {
            name: value for name, value in measured_on(config, data).items() if name in before or name not in _UNSAID
        }
        return now != before

    def check(self, config: TrainConfig, data: RunData, *, runtime: Runtime) -> None:
        """Refuse a checkpoint of another run; warn, on one rank, if the resumed run may differ in its last bits.

        Raises:
            ValueError: its model, optimizer, data or tokenizer is not this run's.
        """
        resume_checks.check_same_model(self.directory, config)
        resume_checks.check_same_data(self.directory, self.values["data"], data.fingerprints())
        changes = resume_checks.changed_bits(self.values.get("computed_with"), _computed_with(runtime))
        if changes and is_main(runtime.world):
            warnings.warn(changes, stacklevel=2)
        if self._is_measured_otherwise(config, data) and is_main(runtime.world):
            words = "the validation text, or the part of it, is another one: the best checkpoint and early stopping"
            warnings.warn(f"{self.directory}: {words} begin anew", stacklevel=2)

    def load_into(self, shards: Shards, optimizer: Optimizer) -> None:
        """Restore the weights, the optimizer's state and the states of the random generators; each rank its own rows.

        Raises:
            CheckpointError: a file does not fit the model or its optimizer.
        """
        with together(shards.world):
            load_weights(shards.rows, self.directory)
            load_optimizer(optimizer, self.directory, self.values, rows=_rows_of(shards, optimizer))
        with as_checkpoint_error(f"{self.directory}: "):
            set_rng_state(self.values["rng"])


def _check_guard(found: dict[str, Any], directory: Path) -> None:
    """Refuse a memory of the spike guard that is not one; checkpoints of earlier versions may lack parts of it."""
    fresh = asdict(GuardState())
    for name, value in found.items():
        is_count = type(value) is int and 0 <= value < 2**63
        if name not in fresh or not (is_count or type(value) is type(fresh[name]) is float):
            known = ", ".join(f"{key} of {type(one).__name__}" for key, one in fresh.items())
            raise CheckpointError(
                f"{directory}: guard of state.json: expected {known}, found {name[:40]!r}: {str(value)[:60]}"
            )


def snapshot(
    shards: Shards,
    optimizer: Optimizer,
    state: TrainState,
    *,
    config: TrainConfig,
    data: RunData,
    runtime: Runtime,
    val_loss: float | None,
) -> Snapshot:
    """Return what goes into the checkpoint of this moment: of the tensors, the rows that are here."""
    values = {
        **asdict(state),
        "val_loss": val_loss,
        "rng": rng_state(),
        "data": data.fingerprints(),
        _MEASURED_ON: measured_on(config, data),
        "wandb_id": runtime.logger.run_id,
        "computed_with": _computed_with(runtime),
    } | document_ids.state_of_data(data.train, data.tokenizer)
    if chat_format.KEY in data.train.metadata:  # how conversations become ids, for whoever answers
        values[chat_format.KEY] = data.train.metadata[chat_format.KEY]
    state_of_optimizer = OptimizerState.of(optimizer, _rows_of(shards, optimizer))
    return Snapshot(shards.rows, state_of_optimizer, data.tokenizer, dump_toml(config), values)


def _rows_of(shards: Shards, optimizer: Optimizer) -> list[Rows]:
    return shards.rows_of(one for group in optimizer.param_groups for one in group["params"])


def _computed_with(runtime: Runtime) -> dict[str, Any]:
    return resume_checks.computed_with(runtime.device, runtime.precision, world_size=runtime.world.world_size)
