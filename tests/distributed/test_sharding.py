"""Several ranks that share a model make the steps of one process, whichever way it is cut."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from cli.train import train
from config.train import TrainConfig
from tests.distributed.ranks import run_ranks
from tests.training.tiny_run import TinyFiles, read_records, step_lines, tiny_config, write_tiny_files
from transformerlm.distributed.sharding import Shards
from transformerlm.distributed.world import World
from transformerlm.training.build import build_model, build_optimizer, build_shards, num_accumulation_steps
from transformerlm.training.data import get_batch, rows_of_part, sequential_batches
from transformerlm.training.dropout_keys import dropout_keys
from transformerlm.training.loop import batch_loss, evaluate, train_step
from transformerlm.utils.dtypes import autocast

CPU = torch.device("cpu")
NUM_STEPS = 12
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
}
# Rounding to bfloat16 makes small differences larger from step to step, the faster the weights move.
SLOW = {f"slow {name}": {**SETTINGS[name], "optimizer.learning_rate": 1e-3} for name in ("adamw", "muon", "model")}
WORLDS = [(2, 2), (3, 3), (4, 2)]
MORE_WORLDS = [pytest.param(*world, marks=pytest.mark.slow) for world in ((2, 1), (3, 1), (4, 1), (4, 4))]


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
    config: TrainConfig, world: World, shard_size: int, precision: Any = "fp32", compiled: bool = False
) -> dict[str, Any]:
    """Return losses and gradient norms of a few steps, a validation loss, and all rows of the weights after them."""
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=500).astype(np.uint16)
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
    keys = partial(dropout_keys, model.settings, seed=3)
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
            flags=lambda: [world.rank, 1.0],
        )
        for step in range(NUM_STEPS)
    ]
    share = {"rank": world.rank, "world_size": world.world_size}
    batches = list(sequential_batches(tokens, batch_size=4, context_length=CONTEXT, max_windows=38, **share))
    evaluated = evaluate(
        model, batches, token_bytes=torch.ones(VOCAB_SIZE, dtype=torch.int64), autocast=context, world=world
    )
    shards.settle()
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
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


@pytest.mark.parametrize(("world_size", "shard_size"), [*WORLDS, *MORE_WORLDS])
def test_ranks_make_the_steps_of_one_process(world_size, shard_size, alone):
    """Losses, norms, validation and weights are those of one process; 8 windows on 3 ranks too."""
    found = run_ranks(_train_all, world_size, shard_size, list(SETTINGS), "fp32")
    for name, expected in alone.items():
        for rank, results in enumerate(found):
            result = results[name]
            assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6), (name, rank)
            assert result["norm"] == pytest.approx(expected["norm"], rel=2e-6), (name, rank)
            assert result["valid"] == pytest.approx(expected["valid"], rel=1e-6), (name, rank)
            assert result["flags"] == (sum(range(world_size)), world_size)
            assert result["batches"] == -(-expected["batches"] // world_size)
            for key, (first, rows) in result["rows"].items():
                whole = expected["rows"][key][1]
                np.testing.assert_allclose(rows, whole[first : first + len(rows)], rtol=2e-4, atol=2e-5, err_msg=name)


def _train_in_fp64(world: World, shard_size: int, names: list[str]) -> dict[str, dict[str, Any]]:
    torch.set_default_dtype(torch.float64)
    try:
        return _train_all(world, shard_size, names, "fp32")
    finally:
        torch.set_default_dtype(torch.float32)


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
