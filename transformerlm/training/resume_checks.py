"""Whether a checkpoint is one of this run's: its model, its data, and what its last bits depend on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config.train import TrainConfig
from transformerlm.checkpoints.load import load_config_of, load_tokenizer
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.dtypes import Precision

_CPUINFO = Path("/proc/cpuinfo")
_VECTOR_FLAGS = ("amx", "avx", "fma", "f16c", "sse4", "sve", "asimd", "bf16", "i8mm")
# These change how a model computes, or the weights it begins with, and not what it computes.
_SAME_FUNCTION = ("attention", "activation_checkpointing", "zero_init_outputs")


def check_same_model(directory: Path, config: TrainConfig, model: TransformerLM) -> None:
    """Refuse a checkpoint of another model or optimizer.

    Raises:
        ValueError: it is one; each key that differs is named with both values.
    """
    saved = load_config_of(directory)
    changed = [f"{name} was {theirs}, now {ours}" for name, theirs, ours in _other_settings(saved, model)]
    if saved.optimizer.name != config.optimizer.name:
        changed.append(f"optimizer.name was {saved.optimizer.name}, now {config.optimizer.name}")
    if changed:
        raise ValueError(
            f"{directory}: this run was started with another model or optimizer ({'; '.join(changed)}); "
            "use its settings, or start a new run with another logging.run_name"
        )


def check_same_architecture(directory: Path, model: TransformerLM) -> None:
    """Refuse a checkpoint whose weights are not those of such a model; the context may be longer or shorter.

    Raises:
        ValueError: it is one; each key that differs is named with both values.
    """
    different = [
        f"{name} is {theirs} there, {ours} here"
        for name, theirs, ours in _other_settings(load_config_of(directory), model)
        if name != "model.context_length"
    ]
    if different:
        raise ValueError(
            f"checkpoint.init_from: {directory} is of another architecture ({'; '.join(different)}); use its settings"
        )


def check_same_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Refuse a checkpoint of another tokenizer: its weights know other tokens by the same ids; one without may do.

    Raises:
        ValueError: it is one; both are named.
    """
    if not (directory / "tokenizer").exists():
        return
    theirs, ours = load_tokenizer(directory).fingerprint(), tokenizer.fingerprint()
    if theirs != ours:
        raise ValueError(
            f"checkpoint.init_from: {directory} was trained with the tokenizer {theirs[:12]}..., but data.tokenizer is "
            f"{ours[:12]}...; set data.tokenizer to {directory / 'tokenizer'} and make the data with it"
        )


def _other_settings(saved: TrainConfig, model: TransformerLM) -> list[tuple[str, Any, Any]]:
    """Return name, value there and value here of each setting by which another model would be computed."""
    theirs, ours = asdict(ModelSettings(**saved.model.model_dump())), asdict(model.settings)
    return [
        (f"model.{name}", theirs[name], value)
        for name, value in ours.items()
        if value != theirs[name] and name not in _SAME_FUNCTION
    ]


def check_same_data(directory: Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Refuse a checkpoint of other data; both hold a sha256 under names such as `train_sha256`.

    Raises:
        ValueError: one differs; both are named.
    """
    for name, fingerprint in ours.items():
        if theirs.get(name) != fingerprint:
            raise ValueError(
                f"{directory}: {name.removesuffix('_sha256')} has changed since this checkpoint: it was "
                f"{str(theirs.get(name))[:12]}..., now it is {fingerprint[:12]}...; restore it, or start a new run "
                "with another logging.run_name"
            )


def computed_with(device: torch.device, precision: Precision, *, world_size: int) -> dict[str, Any]:
    """Return what the last bits of a result depend on, besides configuration and data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cpu, flags = _processor()
    return {
        "torch": torch.__version__,
        "torch_build": (torch.version.git_version or "unknown")[:12],
        "num_threads": torch.get_num_threads(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": flags,
        "device": name,
        "precision": precision,
        "processes": world_size,
    }


def changed_bits(theirs: dict[str, Any] | None, ours: dict[str, Any]) -> str | None:
    """Say in one line why a resumed run may differ from the uninterrupted one in its last bits; None: nothing changed.

    `theirs` and `ours` are from `computed_with`; None where the checkpoint does not hold it.
    """
    if theirs is None:
        changes = "this checkpoint does not say what it was computed with"
    else:
        changes = "; ".join(
            f"{name} was {_shown(theirs.get(name), value)}, now {_shown(value, theirs.get(name))}"
            for name, value in ours.items()
            if theirs.get(name) != value
        )
    if not changes:
        return None
    return f"the resumed run may differ from an uninterrupted one in its last bits: {changes}"


def _shown(value: object, other: object) -> object:
    """Of a list, show what the other one lacks."""
    if isinstance(value, list) and isinstance(other, list):
        return f"with {', '.join(sorted(set(value) - set(other))) or 'less'}"
    return value


def _processor() -> tuple[str, list[str]]:
    """Return the processor's name and its vector instructions, where the system lists them."""
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPUINFO.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", "unknown"), sorted(flag for flag in flags if flag.startswith(_VECTOR_FLAGS))
