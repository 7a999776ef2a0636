"""What a training run was made with, as one event of its log: without it, no report can say how the run came about."""

from __future__ import annotations

import platform
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformerlm.training.run_data import RunData
    from transformerlm.training.runtime import Runtime
    from transformerlm.training.trainer import Trainer


def log_environment(trainer: Trainer, settings: str) -> None:
    """Log the event `environment` at the run's step; `settings` is the text of its `config.toml`."""
    facts = environment(settings, trainer.data, runtime=trainer.runtime)
    trainer.runtime.logger.log_event("environment", step=trainer.state.step, **facts)


def environment(settings: str, data: RunData, *, runtime: Runtime) -> dict[str, Any]:
    """Return what the run computes with, and on which data.

    The fingerprints of the data are those that transformerlm-make-data wrote beside them: nothing is read again.
    """
    from transformerlm.training.resume_checks import computed_with
    from transformerlm.utils import environment as here

    computed = computed_with(runtime.device, runtime.precision, world_size=runtime.world.world_size)
    is_gpu = runtime.device.type == "cuda"
    files = {"train": data.train, "valid": data.valid}
    return {
        "versions": {
            "transformerlm": here.installed_version("transformerlm"),
            "python": platform.python_version(),
            "torch": computed["torch"],
            "numpy": here.installed_version("numpy"),
        },
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": here.cpu_model(),
        "threads": computed["num_threads"],
        "device": f"{runtime.device} ({computed['device']})" if is_gpu else str(runtime.device),
        "processes": computed["processes"],
        "git": here.package_commit(),
        "source_sha256": here.source_sha256(),
        "command": here.without_secrets(sys.argv),
        "directory": here.working_directory(),
        "project.git": here.commit_of(Path()),
        "config_sha256": sha256(settings.encode()).hexdigest(),
        "data": {key: {"sha256": one.sha256, "tokens": one.num_tokens} for key, one in files.items() if one},
        "tokenizer_sha256": data.tokenizer.fingerprint(),
    }
