"""A run that is checked and built, before anything is written: its Trainer needs no more than logger and callbacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from config.train import TrainConfig
from transformerlm.distributed.sharding import Shards
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.run_data import RunData
from transformerlm.training.runtime import Runtime
from transformerlm.training.state import TrainState
from transformerlm.training.trainer import Trainer


@dataclass(frozen=True)
class PreparedRun:
    """The parts from which a Trainer is built.

    Args:
        config: the configuration, with a number where "auto" chose the micro-batch.
        run_dir: the run's directory.
        data: the token files and their tokenizer.
        model: on its device, with initial weights or those of a checkpoint.
        optimizer: an optimizer over the model's parameters.
        shards: how the ranks share the model.
        state: what the run remembers of earlier starts.
        wandb_id: the id under which W&B knows the run, from its checkpoint.
        runtime: where the run computes; it has no logger and no callbacks yet.
        memory_bytes: the estimated memory of a step.
        initial_weights: the checkpoint that `checkpoint.init_from` means; None where it was not read.
    """

    config: TrainConfig
    run_dir: Path
    data: RunData
    model: TransformerLM
    optimizer: Optimizer
    shards: Shards
    state: TrainState
    wandb_id: str | None
    runtime: Runtime
    memory_bytes: int
    initial_weights: Path | None = None

    def trainer(self, **callbacks: Any) -> Trainer:
        """Return the run's trainer; `callbacks` are a logger and other fields of `Runtime`."""
        return Trainer(
            self.config,
            run_dir=self.run_dir,
            data=self.data,
            model=self.model,
            optimizer=self.optimizer,
            runtime=replace(self.runtime, **callbacks),
            state=self.state,
            shards=self.shards if self.runtime.world.is_distributed else None,
        )
