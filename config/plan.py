"""Schema of `transformerlm-plan`."""

from __future__ import annotations

from pydantic import Field

from config.schemas import Count
from config.train import TrainConfig


class PlanConfig(TrainConfig):
    """Say what a training run will take before it starts: parameters, FLOPs, memory, disk and time.

    It takes the TOML file of transformerlm-train as it is; the token files need not be there yet.
    """

    calibration_steps: Count = Field(
        10, description="steps to measure with the model on random tokens; 0: arithmetic only"
    )
