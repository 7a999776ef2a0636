"""A Hugging Face directory of the Llama or Qwen3 architecture, turned into a run of ours with one checkpoint.

The files may be a stranger's: only JSON and safetensors are read, headers are compared with the files and with the
model before a tensor is loaded, and no name may lead out of the directory.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from config.io import dump_toml
from config.schemas import ModelConfig
from config.train import TrainConfig
from transformerlm.checkpoints.document_ids import KEY, DocumentIds
from transformerlm.checkpoints.load import load_model
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.checkpoints.validation import TensorFacts, check_contained, check_finite, read_header
from transformerlm.interop import llama, tokenizer_json
from transformerlm.interop.hf_export import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE
from transformerlm.interop.verify import NOT_ASKED, verify_model, verify_tokenizer_json
from transformerlm.models.estimates import count_parameters
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, whole_directory
from transformerlm.utils.json_files import read_json_object, read_limited

_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 25
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_DTYPES = ("F32", "F16", "BF16")
_IGNORED = ".rotary_emb.inv_freq"  # old files keep the angles, which follow from rope_theta
_HEAD = "lm_head.weight"  # under this name here, too


def read_hf(
    source: Path, out: Path, *, with_tokenizer: bool = True, verify: bool = True, overwrite: bool = False
) -> str:
    """Write the run directory `out` and return one line about how it was verified; weights become fp32.

    Raises:
        FileExistsError: `out` exists already, and `overwrite` is not set.
        ValueError: the model or the tokenizer is not one of ours, a file is damaged, or `transformers` computes
            something else.
    """
    check_free(out, overwrite=overwrite, holds="checkpoints")
    if not source.is_dir():
        found = "a file (for a tokenizer's file set format)" if source.exists() else "none"
        raise FileNotFoundError(f"{source}: expected the directory of a model, found {found}")
    if not (source / CONFIG_FILE).exists():
        found = "a run of transformerlm, which needs no import" if (source / "checkpoints").is_dir() else "none"
        raise FileNotFoundError(f"{source}: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it, found {found}")
    check_contained(source)
    config = _read_config(source / CONFIG_FILE)
    tokenizer = _read_tokenizer(source, config.vocab_size) if with_tokenizer else None
    model = _build(source, ModelSettings(**config.model_dump()))
    snapshot = Snapshot.of(
        model,
        _fresh_optimizer(model),
        tokenizer,
        config_toml=_config_toml(config, source.name),
        state={"tokens": 0, "imported_from": source.name, KEY: _read_ids(source, config.vocab_size, tokenizer)},
    )
    with whole_directory(out) as directory:
        checkpoint = save_checkpoint(directory / "checkpoints", 0, snapshot)
        return _verify(source, checkpoint, tokenizer) if verify else NOT_ASKED


def _read_config(path: Path) -> ModelConfig:
    """Return the keys of the model, within the limits of our own configuration."""
    config = read_json_object(path, max_bytes=_MAX_CONFIG_BYTES)
    try:
        return ModelConfig.model_validate(llama.from_config(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "model"
        raise ValueError(f"{path}: {where}: {first['msg']}, found {str(first['input'])[:80]}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    path = source / tokenizer_json.FILE
    try:
        if not path.exists():
            raise ValueError(f"{path}: expected the tokenizer, found none")
        tokenizer = tokenizer_json.from_file(path, keeps_leading=True)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{path}: expected at most {vocab_size:,} tokens, found {tokenizer.vocab_size:,}")
    except ValueError as error:
        raise ValueError(f"{error}; set tokenizer = false to import the model without it") from None
    return tokenizer


def _read_ids(source: Path, vocab_size: int, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """Return where the model's documents begin and end, for `state.json`; None: the files do not say.

    As in transformers, `generation_config.json` overrides `config.json`. An id that is not a special token is ignored:
    it is the default of another model, in a file that never set its own.
    """
    facts = read_json_object(source / CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES)
    if (source / GENERATION_FILE).exists():
        said = read_json_object(source / GENERATION_FILE, max_bytes=_MAX_CONFIG_BYTES)
        facts |= {key: value for key, value in said.items() if value is not None}
    allowed = range(vocab_size) if tokenizer is None else set(tokenizer.special_token_ids.values())
    found: dict[str, list[int]] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = facts.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        found[key] = [one for one in values if type(one) is int and one in allowed]
        if len(found[key]) < len(values):
            expected = "ids of the model" if tokenizer is None else "special tokens of the tokenizer"
            warnings.warn(f"{source}: {key}: expected {expected}, found {str(value)[:60]}: left out", stacklevel=2)
    bos, pad = (next(iter(found[key]), None) for key in ("bos_token_id", "pad_token_id"))
    leading = None
    if tokenizer is not None:
        text = tokenizer_json.leading_token(source / tokenizer_json.FILE)
        leading = tokenizer.special_token_ids.get(text or "")
    if not found["eos_token_id"] and leading is None:
        return None
    bos = bos if leading is None else leading
    return DocumentIds(bos, tuple(found["eos_token_id"]), pad, starts_texts=leading is not None).to_state()


def _build(source: Path, settings: ModelSettings) -> TransformerLM:
    """Return the model with its weights in fp32, once the headers of all files agree with it."""
    names = llama.weight_names(settings)
    ours = {theirs: name for name, theirs in names.items()}
    places: dict[str, Path] = {}
    facts: dict[str, TensorFacts] = {}
    for path in _weight_files(source):
        used = {name: one for name, one in read_header(path).items() if not name.endswith(_IGNORED)}
        if twice := sorted(used.keys() & facts.keys()):
            raise ValueError(f"{path}: expected each weight in one file, found {twice[0][:80]!r} in two")
        facts |= used
        places |= dict.fromkeys(used, path)
    doubled = {_HEAD} & facts.keys() if settings.tie_embeddings else set()
    _check_names(source, facts.keys() - doubled, ours.keys())
    found = sum(math.prod(one.shape) for name, one in facts.items() if name not in doubled)
    if found != count_parameters(settings):
        raise ValueError(f"{source}: expected {count_parameters(settings):,} numbers in weights, found {found:,}")
    model = TransformerLM(settings, device="meta")
    _check_shapes(source, facts, {theirs: tuple(model.get_parameter(name).shape) for theirs, name in ours.items()})
    weights = _load(places, {**ours, _HEAD: _HEAD}, settings.d_head)
    if doubled and not torch.equal(weights.pop(_HEAD), weights["token_embeddings.weight"]):
        raise ValueError(
            f"{source}: {_HEAD}: expected the numbers of the embedding, as {CONFIG_FILE} says that the two are tied, "
            "found others, with which transformers would compute; for a head of its own set tie_word_embeddings = false"
        )
    model.load_state_dict(weights, assign=True)
    check_finite(dict(model.named_parameters()), source)
    return model


def _weight_files(source: Path) -> list[Path]:
    """Return the single file of weights, or the shards that the index names."""
    if (source / WEIGHTS_FILE).exists():
        return [source / WEIGHTS_FILE]
    index = source / INDEX_FILE
    if not index.exists():
        raise ValueError(
            f"{source}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither (a .bin or .pt holds a pickle, which "
            "can run code when it is loaded, and is not read; save the model as safetensors)"
        )
    places = read_json_object(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    names = sorted(set(map(str, places.values())) if isinstance(places, dict) else {str(places)})
    for name in names:
        if not _SHARD.fullmatch(name):
            raise ValueError(f"{index}: expected weight_map to name .safetensors files, found {name[:80]!r}")
    return [source / name for name in names]


def _check_names(source: Path, found: AbstractSet[str], expected: AbstractSet[str]) -> None:
    if found != expected:
        different = ", ".join(sorted(found ^ expected)[:4])
        raise ValueError(f"{source}: weights do not fit the model of {CONFIG_FILE}: {different[:200]}")


def _check_shapes(source: Path, facts: Mapping[str, TensorFacts], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if facts[name].shape != shape:
            raise ValueError(f"{source}: {name}: expected shape {shape}, found {facts[name].shape}")
        if facts[name].dtype not in _DTYPES:
            raise ValueError(f"{source}: {name}: expected dtype F32, F16 or BF16, found {facts[name].dtype}")


def _load(places: Mapping[str, Path], ours: Mapping[str, str], d_head: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in set(places.values()):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in (name for name, place in places.items() if place == path):
                    weight = llama.pairs_from_halves(ours[name], tensors.get_tensor(name).float(), d_head)
                    weights[ours[name]] = weight.contiguous()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    return weights


def _fresh_optimizer(model: TransformerLM) -> Optimizer:
    """Return what every checkpoint holds: here an AdamW's settings, matrices before vectors, and no step made yet."""
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == are_matrices], "weight_decay": 0.0}
        for are_matrices in (True, False)
    ]
    return Optimizer(groups, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})


def _config_toml(model: ModelConfig, name: str) -> str:
    """Return the configuration that a checkpoint needs; of an imported one only [model] is known."""
    tree = {
        "model": model.model_dump(),
        "data": {"train": "unknown.npy", "tokenizer": "tokenizer"},
        "training": {"max_steps": 1, "batch_size": 1},
    }
    toml = dump_toml(TrainConfig.model_validate(tree))
    return f"# imported from {json.dumps(name)}: only [model] says anything\n{toml}"


def _verify(source: Path, checkpoint: Path, tokenizer: Tokenizer | None) -> str:
    """Compare the checkpoint with what the libraries compute from the source."""
    outcome = verify_model(load_model(checkpoint), tokenizer, source)
    if tokenizer is None:
        return outcome
    text = read_limited(source / tokenizer_json.FILE, max_bytes=tokenizer_json.MAX_FILE_BYTES).decode()
    return f"{outcome}; {verify_tokenizer_json(tokenizer, text)}"
