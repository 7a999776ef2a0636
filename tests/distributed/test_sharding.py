"""Several ranks that share a model make the steps of one process, whichever way it is cut."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from cli.train import train
from config.train import TrainConfig
from tests.distributed.ranks import run_ranks
from tests.training.tiny_run import (
    TinyFiles,
    read_records,
    step_lines,
    tiny_config,
    write_chat_files,
    write_tiny_files,
)
from transformerlm.distributed.sharding import Shards
from transformerlm.distributed.world import World
from transformerlm.models.lora import num_lora_keys
from transformerlm.token_files.loss_mask import LossMask
from transformerlm.training.build import build_model, build_optimizer, build_shards, num_accumulation_steps
from transformerlm.training.data import MaskedTokens, TrainingRows, get_batch, rows_of_part, sequential_batches
from transformerlm.training.document_rows import DocumentRows
from transformerlm.training.dropout_keys import dropout_keys
from transformerlm.training.loop import batch_loss, evaluate, train_step
from transformerlm.training.reading import Reading
from transformerlm.utils.dtypes import autocast

CPU = torch.device("cpu")
NUM_STEPS = 6
VOCAB_SIZE = 57  # not a multiple of any number of ranks
CONTEXT = 12

# One setting after the other: keys of the configuration that differ from the usual ones.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, dropout": {
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.learning_rate": 0.1,
        "model.dropout": {"embedding": 0.1, "attention": 0.2, "residual": 0.1},
    },
    "muon": {"optimizer.name": "muon", "optimizer.learning_rate": 0.02},
    "accumulation": {"training.micro_batch_size": 1},
    "model": {
        "model.tie_embeddings": True,
        "model.activation_checkpointing": True,
        "model.qk_norm": True,
        "model.logit_soft_cap": 20.0,
        "training.z_loss": 1e-2,
    },
    "all with muon": {
        "optimizer.name": "muon",
        "training.micro_batch_size": 2,
        "model.tie_embeddings": True,
        "model.activation_checkpointing": True,
        "model.qk_norm": True,
        "model.num_kv_heads": 2,
        "training.z_loss": 1e-2,
    },
    "frozen": {"fine_tuning.freeze": ["token_embeddings", "layers.1", "layers.2.attn.q_proj"]},
    "head alone": {"fine_tuning.freeze": ["token_embeddings", "layers", "ln_final"]},
    "frozen, muon": {"fine_tuning.freeze": ["lm_head", "layers.0", "layers.2.ffn"], "optimizer.name": "muon"},
    "lora": {
        "checkpoint.init_from": "base",  # which is not read here
        "fine_tuning.lora": {"rank": 2, "alpha": 8.0, "targets": ["layers.*"], "dropout": 0.1, "train": ["ln_final"]},
        "model.activation_checkpointing": True,
        "training.micro_batch_size": 2,
        "optimizer.learning_rate": 0.03,
    },
    "lora, muon": {
        "checkpoint.init_from": "base",
        "fine_tuning.lora": {"rank": 5, "alpha": 8.0, "targets": ["layers.[12].attn"]},
        "optimizer.name": "muon",
        "optimizer.learning_rate": 0.02,
    },
}
# Rounding to bfloat16 makes small differences larger from step to step, the faster the weights move.
SLOW = {f"slow {name}": {**SETTINGS[name], "optimizer.learning_rate": 1e-3} for name in ("adamw", "muon", "model")}
WORLDS = [
    (2, 2),
    *(pytest.param(*world, marks=pytest.mark.slow) for world in ((3, 3), (4, 2), (2, 1), (3, 1), (4, 1), (4, 4))),
]


def _config(settings: dict[str, Any]) -> TrainConfig:
    tree: dict[str, Any] = {
        "model": {
            "vocab_size": VOCAB_SIZE,
            "context_length": CONTEXT,
            "d_model": 16,
            "num_layers": 3,
            "num_heads": 4,
            "d_ff": 40,
        },
        "training": {"max_steps": NUM_STEPS, "batch_size": 8, "seed": 3},
        "data": {"train": "train.npy", "tokenizer": "tokenizer"},
        "optimizer": {"learning_rate": 0.003},
    }
    for key, value in settings.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return TrainConfig.model_validate(tree)


def _train(
    config: TrainConfig,
    world: World,
    shard_size: int,
    precision: Any = "fp32",
    compiled: bool = False,
    data: TrainingRows | None = None,
    reading: Reading = Reading(),  # noqa: B008  # frozen
) -> dict[str, Any]:
    """Return losses and gradient norms of a few steps, a validation loss, and all rows of the weights after them."""
    random_tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=500).astype(np.uint16)
    tokens = random_tokens if data is None else data
    if world.is_distributed:
        place: dict[str, Any] = {"device": CPU, "world": world, "precision": precision, "compiled": compiled}
        model, shards = build_shards(config, shard_size=shard_size, **place)
    else:
        model = build_model(config, device=CPU)
        shards = Shards.whole(model)
    optimizer = build_optimizer(model, config, shards=shards)
    size = config.training.micro_batch_size or -(-config.training.batch_size // world.world_size)
    count = num_accumulation_steps(config.training.batch_size, size, world.world_size)
    batch = partial(get_batch, tokens, batch_size=8, context_length=CONTEXT, seed=3, num_micro_batches=count)
    ranks = {"rank": world.rank, "world_size": world.world_size}
    batch = partial(batch, **ranks)
    parts = [rows_of_part(8, micro_batch=index, num_micro_batches=count, **ranks) or range(1) for index in range(count)]
    keys = partial(dropout_keys, model.settings, seed=3, num_more=num_lora_keys(model))
    context = partial(autocast, CPU, precision)
    results = [
        train_step(
            model,
            optimizer,
            [batch(step=step, micro_batch=index) for index in range(count)],
            learning_rate=config.optimizer.learning_rate,
            max_grad_norm=0.5,
            autocast=context,
            shards=shards,
            num_tokens=8 * CONTEXT,
            z_loss=config.training.z_loss,
            dropout_keys=[keys(rows, step=step) for rows in parts],
            reading=reading,
            flags=lambda: [world.rank, 1.0],
        )
        for step in range(1, NUM_STEPS + 1)
    ]
    share = {"rank": world.rank, "world_size": world.world_size}
    batches = list(sequential_batches(tokens, batch_size=4, context_length=CONTEXT, max_windows=38, **share))
    how: dict[str, Any] = {"token_bytes": torch.ones(VOCAB_SIZE, dtype=torch.int64), "reading": reading}
    evaluated = evaluate(model, batches, autocast=context, world=world, **how)
    shards.settle()
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "tokens": [result.tokens for result in results],
        "trouble": [result.trouble for result in results],
        "flags": results[-1].flags,
        "valid": evaluated.loss,
        "batches": len(batches),
        "rows": {name: (rows.first, rows.local.clone().numpy()) for name, rows in shards.rows.items()},
    }


def _train_all(world: World, shard_size: int, names: list[str], precision: str) -> dict[str, dict[str, Any]]:
    return {name: _train(_config({**SETTINGS, **SLOW}[name]), world, shard_size, precision) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: _train(_config(settings), World(), 1) for name, settings in SETTINGS.items()}


@pytest.mark.parametrize(("world_size", "shard_size"), WORLDS)
def test_ranks_make_the_steps_of_one_process(world_size, shard_size, alone):
    """Losses, norms, validation and weights are those of one process; 8 windows on 3 ranks too."""
    found = run_ranks(_train_all, world_size, shard_size, list(SETTINGS), "fp32")
    for name, expected in alone.items():
        for rank, results in enumerate(found):
            result = results[name]
            assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6), (name, rank)
            assert result["norm"] == pytest.approx(expected["norm"], rel=2e-5), (name, rank)  # sums in another order
            assert result["valid"] == pytest.approx(expected["valid"], rel=1e-6), (name, rank)
            assert result["flags"] == (sum(range(world_size)), world_size)
            assert result["batches"] == -(-expected["batches"] // world_size)
            for key, (first, rows) in result["rows"].items():
                whole = expected["rows"][key][1]
                np.testing.assert_allclose(rows, whole[first : first + len(rows)], rtol=2e-4, atol=2e-5, err_msg=name)


# --- masks -------------------------------------------------------------------------------------------------------

MASKED: dict[str, dict[str, Any]] = {
    "adamw": {"model.document_mask": True},
    "accumulation": {"model.document_mask": True, "training.micro_batch_size": 1, "optimizer.name": "muon"},
    "written out": {"model.document_mask": True, "model.attention": "reference", "model.qk_norm": True},
}


def _masked_rows(packing: str) -> TrainingRows:
    """Return ids of documents, of which every third one learns its second half: some rows learn nothing at all."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 20, size=70)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = rng.integers(1, VOCAB_SIZE, size=offsets[-1]).astype(np.uint16)
    tokens[offsets[1:] - 1] = 0
    learnt = np.zeros(len(tokens), dtype=np.uint8)
    for start, end in list(pairwise(offsets.tolist()))[::3]:
        learnt[(start + end) // 2 : end - 1] = 1
    mask = LossMask([(0, learnt)])
    if packing == "windows":
        return MaskedTokens(tokens, mask)
    return DocumentRows(tokens, offsets, context_length=CONTEXT, separator_id=0, seed=3, mask=mask)


def _train_masked(world: World, shard_size: int) -> dict[str, dict[str, Any]]:
    reading = Reading(separator_id=0, some_ignored=True)
    return {
        f"{name}, {packing}": _train(_config(settings), world, shard_size, data=_masked_rows(packing), reading=reading)
        for name, settings in MASKED.items()
        for packing in ("windows", "documents")
    }


@pytest.mark.parametrize(
    ("world_size", "shard_size"),
    [(2, 2), *(pytest.param(*world, marks=pytest.mark.slow) for world in ((2, 1), (3, 3), (4, 2)))],
)
def test_masks_mean_the_same_on_any_number_of_ranks(world_size, shard_size):
    """With documents and what is learnt masked, losses, norms, tokens and validation are those of one process."""
    alone = _train_masked(World(), 1)
    for rank, results in enumerate(run_ranks(_train_masked, world_size, shard_size)):
        for name, expected in alone.items():
            result = results[name]
            assert result["trouble"] == expected["trouble"] == [None] * NUM_STEPS
            assert result["tokens"] == expected["tokens"]
            assert 0 < min(expected["tokens"]) <= max(expected["tokens"]) < 8 * CONTEXT / 2
            assert result["loss"] == pytest.approx(expected["loss"], rel=2e-6), (name, rank)
            assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5), (name, rank)
            assert result["valid"] == pytest.approx(expected["valid"], rel=2e-6), (name, rank)


# --- precision ---------------------------------------------------------------------------------------------------


def _train_in_fp64(world: World, shard_size: int, names: list[str]) -> dict[str, dict[str, Any]]:
    torch.set_default_dtype(torch.float64)
    try:
        return _train_all(world, shard_size, names, "fp32")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_only_rounding_sets_ranks_apart_from_one_process():
    """With weights of fp64, losses and norms agree as far as the fp32 in which they are summed can show."""
    expected = _train_in_fp64(World(), 1, list(SETTINGS))
    found = run_ranks(_train_in_fp64, 3, 3, list(SETTINGS))[0]
    for name in SETTINGS:
        assert found[name]["loss"] == pytest.approx(expected[name]["loss"], rel=4e-7), name
        assert found[name]["norm"] == pytest.approx(expected[name]["norm"], rel=4e-7), name


def test_bf16_is_that_of_unsharded_ranks_and_close_to_autocast():
    """Weights gathered as bfloat16 give the digits of autocast; only the order of sums differs."""
    cut, whole = (run_ranks(_train_all, 2, shard_size, list(SLOW), "bf16")[0] for shard_size in (2, 1))
    for name, settings in SLOW.items():
        one = _train(_config(settings), World(), 1, "bf16")
        assert cut[name]["loss"] == pytest.approx(whole[name]["loss"], rel=1e-4)
        assert cut[name]["norm"] == pytest.approx(whole[name]["norm"], rel=1e-3)
        assert cut[name]["loss"] == pytest.approx(one["loss"], rel=1e-3)


def _train_compiled(world: World, precision: str) -> dict[str, Any]:
    return _train(_config(SETTINGS["adamw"]), world, 2, precision, compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_are_compiled_before_they_are_cut(precision):
    """What is gathered together is compiled together, and gives the losses of plain blocks."""
    expected = run_ranks(_train_all, 2, 2, ["adamw"], precision)[0]["adamw"]
    found = run_ranks(_train_compiled, 2, precision, seconds=600)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if precision == "fp32" else 5e-3)


def _bytes_held(world: World, shard_size: int) -> tuple[int, int]:
    """Return the bytes of weights, gradients and moments that this rank holds after a step, and those of all."""
    config = _config({"optimizer.name": "adamw"})
    model, shards = build_shards(config, device=CPU, precision="bf16", world=world, shard_size=shard_size)
    optimizer = build_optimizer(model, config, shards=shards)
    tokens = np.arange(500, dtype=np.uint16) % VOCAB_SIZE
    batch = get_batch(
        tokens, batch_size=8, context_length=CONTEXT, seed=0, step=0, rank=world.rank, world_size=world.world_size
    )
    context = partial(autocast, CPU, "bf16")
    settings: dict[str, Any] = {"learning_rate": 0.01, "max_grad_norm": 1.0, "autocast": context}
    train_step(model, optimizer, [batch], shards=shards, num_tokens=8 * CONTEXT, **settings)
    states = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    held = [*shards.parameters.values(), *(one.grad for one in shards.parameters.values()), *states]
    whole = sum(4 * 4 * int(np.prod(rows.shape)) for rows in shards.rows.values())
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held if one is not None}
    return sum(storages.values()), whole


@pytest.mark.parametrize("shard_size", [1, 4])
def test_a_rank_holds_its_share(shard_size):
    """Weights, gradients and AdamW's moments take 1 / n of the memory, and the padding of the last rows."""
    for held, whole in run_ranks(_bytes_held, 4, shard_size):
        assert held <= 1.15 * whole / shard_size
        assert held >= 0.85 * whole / shard_size


def _bytes_of_saved_weights(world: World, shard_size: int) -> tuple[int, int]:
    """Return the bytes of the blocks' bfloat16 weights that a forward pass keeps, and the number of those weights."""
    config = _config({"model.d_ff": 48, "model.num_kv_heads": 2})
    if world.is_distributed:
        model, _ = build_shards(config, device=CPU, precision="bf16", world=world, shard_size=shard_size)
    else:
        model = build_model(config, device=CPU)
    shapes = {tuple(one.shape) for one in model.layers.parameters() if one.ndim == 2}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_weight = tensor.ndim == 2 and bool({tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes)
        if is_weight and tensor.dtype == torch.bfloat16:
            saved.append(tensor)
        return tensor

    ids = torch.zeros(3, CONTEXT, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, "bf16"):
        batch_loss(model, ids, ids)
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in saved}
    return sum(storages.values()), sum(one.numel() for one in model.layers.parameters() if one.ndim == 2)


def test_sharded_bf16_keeps_no_second_copy_of_the_weights():
    """Autocast keeps two bytes of each weight of a block until the backward pass; sharded, none are left."""
    alone, num_weights = _bytes_of_saved_weights(World(), 1)
    assert alone == 2 * num_weights
    for kept, _ in run_ranks(_bytes_of_saved_weights, 2, 2):
        assert kept < 0.1 * num_weights


# --- the whole command -------------------------------------------------------------------------------------------

EVERYTHING = {
    "optimizer.name": "muon",
    "training.batch_size": 8,
    "training.micro_batch_size": 2,
    "training.log_norms": True,
    "samples.interval": 6,
    "samples.prompts": ["Ada "],
    "samples.sampling.max_new_tokens": 5,
    "logging.backend": "json",
}


CHAT = {
    "data.packing": "documents",
    "data.order": "epoch",
    "model.document_mask": True,
    "model.context_length": 32,
    "training.batch_size": 6,
    "training.micro_batch_size": 2,
    "schedule.name": "constant",
    "logging.backend": "json",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))


def _run(world: World, text: str, max_steps: int, shard: int) -> int:
    """Run the command in a rank, to `max_steps`."""
    config = TrainConfig.model_validate(json.loads(text))
    training = config.training.model_copy(update={"max_steps": max_steps})
    parallel = config.parallel.model_copy(update={"shard": shard})
    return train(config.model_copy(update={"training": training, "parallel": parallel}))


def test_a_run_goes_on_with_any_number_of_ranks(files, tmp_path):
    """On 2, 2x2, 3 and 1 ranks in turn a run logs what one process logs: losses, norms, validations and samples."""
    constant = {**EVERYTHING, "schedule.name": "constant"}
    alone, shared = (tiny_config(files, tmp_path / name, constant) for name in ("alone", "shared"))
    assert train(alone) == 0
    text = shared.model_dump_json()
    for world_size, max_steps, shard in ((2, 3, 2), (4, 6, 2), (3, 9, 3)):
        assert run_ranks(_run, world_size, text, max_steps, shard) == [0] * world_size
    assert train(shared) == 0
    expected, found = step_lines(tmp_path / "alone/run"), step_lines(tmp_path / "shared/run")
    assert [line["step"] for line in found] == list(range(1, 13))
    for theirs, ours in zip(expected, found, strict=True):
        for key, value in theirs.items():
            if key.startswith("metrics.") and "activation" not in key and key in ours:
                assert ours[key] == pytest.approx(value, rel=2e-5), (theirs["step"], key)
    samples = [
        {record["step"]: record["text.output"] for record in read_records(run) if record.get("event") == "sample"}
        for run in (tmp_path / "alone/run", tmp_path / "shared/run")
    ]
    assert samples[0] == {step: samples[1][step] for step in (6, 12)}


@pytest.mark.slow
def test_a_run_on_conversations_goes_on_with_any_number_of_ranks(tmp_path):
    """What is learnt of conversations, and where they end, is the same on 2 ranks, on 3, and then on one."""
    files = write_chat_files(tmp_path)
    alone, shared = (tiny_config(files, tmp_path / name, CHAT) for name in ("alone", "shared"))
    assert train(alone) == 0
    for world_size, max_steps, shard in ((2, 4, 1), (2, 7, 2), (3, 10, 3)):
        assert run_ranks(_run, world_size, shared.model_dump_json(), max_steps, shard) == [0] * world_size
    assert train(shared) == 0
    expected, found = step_lines(tmp_path / "alone/run"), step_lines(tmp_path / "shared/run")
    assert [line["step"] for line in found] == list(range(1, 13))
    for theirs, ours in zip(expected, found, strict=True):
        assert ours["metrics.tokens"] == theirs["metrics.tokens"]
        for key in ("metrics.loss", "metrics.grad_l2_norm", "metrics.val_loss", "metrics.val_bits_per_byte"):
            assert (key in ours) or key.startswith("metrics.val")
            if key in ours and key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-5), (theirs["step"], key)
