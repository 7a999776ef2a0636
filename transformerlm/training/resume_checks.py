"""Whether a checkpoint and a token file fit this run: its model, its tokenizer, its data, its last bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config.train import TrainConfig
from transformerlm.checkpoints.load import load_config_of, load_tokenizer
from transformerlm.models.settings import SAME_FUNCTION, ModelSettings
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.dtypes import Precision

_CPUINFO = Path("/proc/cpuinfo")
_VECTOR_FLAGS = ("amx", "avx", "fma", "f16c", "sse4", "sve", "asimd", "bf16", "i8mm")


def check_same_model(directory: Path, config: TrainConfig) -> None:
    """Refuse a checkpoint of another model or optimizer.

    Raises:
        ValueError: it is of another one; each key that differs is named with both values.
    """
    saved = load_config_of(directory)
    changed = [f"{name} was {theirs}, now {ours}" for name, theirs, ours in _other_settings(saved, config)]
    changed += [f"{name} was {_said(theirs)}, now {_said(ours)}" for name, theirs, ours in _trained(saved, config)]
    if saved.optimizer.name != config.optimizer.name:
        changed.append(f"optimizer.name was {saved.optimizer.name}, now {config.optimizer.name}")
    if changed:
        raise ValueError(
            f"{directory}: this run was started with another model or optimizer ({'; '.join(changed)}); "
            "use its settings, or start a new run with another logging.run_name"
        )


def _trained(saved: TrainConfig, config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return name, value there and value here of each setting by which other weights are trained; dropout may vary."""
    theirs, ours = (each.fine_tuning.model_dump() for each in (saved, config))
    pairs = [("fine_tuning.freeze", theirs["freeze"], ours["freeze"])]
    there, here = (each["lora"] or {} for each in (theirs, ours))
    names = [name for name in {**there, **here} if name != "dropout"]
    pairs += [(f"fine_tuning.lora.{name}", there.get(name), here.get(name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _said(value: object) -> object:
    return "not set" if value is None else value


def check_same_architecture(directory: Path, config: TrainConfig) -> None:
    """Refuse a checkpoint whose weights do not fit the configured model.

    The context may be shorter or longer, and for a longer one the rotary embedding may be scaled.

    Raises:
        ValueError: they do not fit; each key that differs is named with both values.
    """
    saved = load_config_of(directory)
    may_differ = {"model.context_length"}
    if saved.model.rope_scaling is None and saved.model.context_length < config.model.context_length:
        may_differ.add("model.rope_scaling")
    different = [
        f"{name} is {theirs} there, {ours} here"
        for name, theirs, ours in _other_settings(saved, config)
        if name not in may_differ
    ]
    if different:
        raise ValueError(
            f"checkpoint.init_from: {directory} is of another architecture ({'; '.join(different)}); use its settings"
        )


def _other_settings(saved: TrainConfig, config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return name, value there and value here of each setting by which the model computes something else."""
    theirs, ours = (asdict(ModelSettings(**each.model.model_dump())) for each in (saved, config))
    return [
        (f"model.{name}", theirs[name], value)
        for name, value in ours.items()
        if value != theirs[name] and name not in SAME_FUNCTION
    ]


def check_tokenizer_of_data(dataset: TokenDataset, tokenizer: Tokenizer, *, key: str, config: TrainConfig) -> None:
    """Refuse a token file of another tokenizer; `key` is its name in the TOML.

    The tokenizer may have more special tokens than the one that made the file: its ids mean the same.

    Raises:
        ValueError: it is of another one; both are named.
    """
    made = f"{key}: {dataset.path} was made with"
    setting = f"data.tokenizer ({config.data.tokenizer})"
    advice = "run transformerlm-make-data again with this tokenizer"
    tokenizer.check_fingerprint(
        dataset.tokenizer_sha256, vocab_size=dataset.vocab_size, made=made, ours=setting, advice=advice
    )


def check_tokenizer_of_checkpoint(directory: Path, tokenizer: Tokenizer) -> None:
    """Refuse a checkpoint of another tokenizer, whose ids mean other tokens; one without a tokenizer passes.

    Raises:
        ValueError: it is of another one; both are named.
    """
    if (directory / "tokenizer").exists():
        made = f"checkpoint.init_from: {directory} was trained with"
        advice = (
            f"set data.tokenizer to {directory / 'tokenizer'} and make the data with it (transformerlm-add-tokens adds "
            "special tokens to a checkpoint)"
        )
        theirs = load_tokenizer(directory).fingerprint()
        tokenizer.check_fingerprint(theirs, made=made, ours="data.tokenizer", advice=advice)


_MASK = "train_mask_sha256"


def check_same_data(directory: Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Refuse a checkpoint of other data; `theirs` and `ours` hold a sha256 under names such as `train_sha256`.

    Raises:
        ValueError: one differs; both values are named.
    """
    for name in dict.fromkeys((*ours, _MASK)):
        before, now = theirs.get(name), ours.get(name)
        if before != now and not (name == _MASK and before is None):  # checkpoints of earlier versions do not say
            raise ValueError(
                f"{directory}: {name.removesuffix('_sha256')} has changed since this checkpoint: it was "
                f"{str(before)[:12]}..., now it is {str(now)[:12]}...; restore it, or start a new run "
                "with another logging.run_name"
            )


def computed_with(device: torch.device, precision: Precision, *, world_size: int) -> dict[str, Any]:
    """Return what decides the last bits of a result, besides configuration and data."""
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
    """Return a line that says why a resumed run may differ in its last bits; None: nothing has changed.

    `theirs` and `ours` are from `computed_with`; `theirs` is None where the checkpoint does not hold it.
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
    """Return a value for the line above; of a list, only what the other one lacks."""
    if isinstance(value, list) and isinstance(other, list):
        return f"with {', '.join(str(one) for one in value if one not in other) or 'less'}"
    return value


def _processor() -> tuple[str, list[str]]:
    """Return the processor's name and its vector instructions, where the system lists them."""
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPUINFO.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", "unknown"), sorted(flag for flag in flags if flag.startswith(_VECTOR_FLAGS))
