"""The arithmetic of a run, compared with its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from config.plan import MachineConfig, PlanConfig
from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.build import build_optimizer
from transformerlm.training.planning import plan
from transformerlm.training.planning.machine import Machine
from transformerlm.training.planning.micro_batch import memory_by_part

HERE = Machine.here(torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


def facts_of(config, tmp_path):
    """The facts of a run on the CPU in fp32."""
    return plan.arithmetic(config, run_dir=tmp_path / "not" / "yet", machine=HERE, precision="fp32")


def test_the_numbers_are_those_of_the_model(files, tmp_path):
    """The products of parameters, FLOPs and tokens are right."""
    config = tiny_config(files, tmp_path, {"training.micro_batch_size": 2})
    model, facts = TransformerLM(**config.model.model_dump()), facts_of(config, tmp_path)
    parts = {name: count for name, count in facts.items() if name.startswith("parameters.")}
    assert parts.pop("parameters.total") == sum(parts.values()) == model.num_parameters()
    assert facts["tokens.total"] == 12 * 8 * 16
    assert facts["flops.total"] == 12 * 8 * 16 * model.num_flops_per_token()
    assert facts["tokens.per_parameter"] == facts["tokens.total"] / model.num_parameters()
    assert (facts["micro_batch_size"], facts["batch_size"]) == (2, 8)
    assert facts["memory.fits"]
    assert 0 < facts["memory.available_bytes"] <= facts["memory.device_bytes"]


def test_the_checkpoint_is_as_large_as_said(files, tmp_path):
    """The tensors of a saved checkpoint take the bytes of the plan, plus headers."""
    config = tiny_config(files, tmp_path)
    model = TransformerLM(**config.model.model_dump())
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    snapshot = Snapshot.of(model, optimizer, tokenizer, config_toml="", state={})
    saved = save_checkpoint(tmp_path / "checkpoints", 1, snapshot)
    found = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    facts = facts_of(config, tmp_path)
    assert facts["checkpoint.files"] == len(list(saved.glob("*.safetensors")))
    assert facts["checkpoint.bytes"] == pytest.approx(found, rel=0.05)
    assert facts["disk.needed_bytes"] == facts["checkpoint.bytes"] * (config.checkpoint.keep + 2)


def test_remedies_end_where_the_run_fits(files, tmp_path):
    """A smaller micro-batch comes first, then checkpointing, then bf16; each total counts those before it."""
    config = tiny_config(files, tmp_path, {"model.num_layers": 8, "training.batch_size": 64})

    def advice(room):
        return plan.remedies(config, machine=replace(HERE, memory_bytes=room), precision="fp32")

    none_fits = advice(1)
    names = ["training.micro_batch_size = 1", "model.activation_checkpointing = true", 'training.precision = "bf16"']
    assert [name for name, _ in none_fits] == names
    assert none_fits[0][1] > none_fits[1][1]
    ((name, total),) = advice(none_fits[0][1])
    assert (name, total) == none_fits[0]
    ((name, total),) = advice(facts_of(config, tmp_path)["memory.total_bytes"] - 1)
    assert name == "training.micro_batch_size = 32"
    assert len(advice(none_fits[1][1])) == 2


def test_another_machine_is_as_fast_as_it_is_assumed_to_be(files, tmp_path):
    """Tokens per second are a share of all peaks over the FLOPs of a token, or given; max_time limits the run."""
    run = tiny_config(files, tmp_path).model_dump()

    def plan_on(machine, **training):
        config = PlanConfig(
            **{**run, "training": run["training"] | {"precision": "auto"} | training}, machine=MachineConfig(**machine)
        )
        there = Machine.of(config.machine)
        facts = plan.arithmetic(config, run_dir=tmp_path, machine=there, precision="bf16")
        return facts | plan.expected(config, there, plan=facts)

    facts = plan_on({"gpu": "H100", "num_gpus": 4, "mfu": 0.25})
    assert (facts["device"], facts["num_processes"], facts["micro_batch_size"]) == ("4 x H100", 4, 2)
    assert facts["assumed.tokens_per_second"] == pytest.approx(0.25 * 4 * 989e12 / facts["flops.per_token"])
    assert facts["assumed.flops_utilisation"] == pytest.approx(0.25)
    assert facts["assumed.eta_seconds"] * facts["assumed.tokens_per_second"] == pytest.approx(facts["tokens.total"])
    assert facts["memory.device_bytes"] == 80e9
    assert "disk.free_bytes" not in facts  # unknown for another machine
    assert not [name for name in plan_on({"num_gpus": 2}) if name.startswith("assumed")]  # no speed is known
    facts = plan_on({"memory_gb": 24.0, "tokens_per_second": 100}, max_time="2s")
    assert (facts["assumed.tokens_per_second"], facts["assumed.eta_seconds"]) == (100, 2)
    assert "assumed.flops_utilisation" not in facts
    assert plan_on({"gpu": "L4", "num_gpus": 3}, micro_batch_size=1)["accumulation_steps"] == 3


def wide(files, tmp_path, **sections):
    """A plan of a model whose weights are most of its memory, for 32 GPUs in machines of 8."""
    changes = {"model.d_model": 1024, "model.num_layers": 24, "model.num_heads": 16, "model.d_ff": 4096}
    run = tiny_config(files, tmp_path, changes).model_dump()
    run["training"] |= {"precision": "auto", "batch_size": 64}
    return PlanConfig(**{**run, **sections})


def test_memory_is_planned_for_each_number_that_can_share(files, tmp_path):
    """A copy is in a machine or on whole machines; each number comes with its own micro-batch and its own verdict."""
    config = wide(files, tmp_path, machine=MachineConfig(num_gpus=32, memory_gb=1.7))
    machine = Machine.of(config.machine)
    rows = plan.by_shard_size(config, machine, precision="bf16")
    assert [row["shard_size"] for row in rows] == [1, 2, 4, 8, 16, 32]
    for row in rows:
        parts = {name.removesuffix("_bytes"): size for name, size in row.items() if name.endswith("_bytes")}
        size = {"micro_batch_size": row["micro_batch_size"], "shard_size": row["shard_size"], "num_ranks": 32}
        assert parts == memory_by_part(config, precision="bf16", device=machine.device, **size)
        assert row["fits"] == (row["total_bytes"] <= 1.7e9)
    totals = [row["total_bytes"] for row in rows]
    assert totals == sorted(totals, reverse=True)
    assert [row["fits"] for row in rows] == [False, False, False, True, True, True]
    assert [row["shard_size"] for row in rows if row["is_auto"]] == [8]  # the whole machine, not a part of it


def test_the_shard_size_is_that_of_the_run(files, tmp_path):
    """The plan's memory is for the number that the file says, whether it fits or not; a wrong number is refused."""
    for shard, expected in {2: 2, "all": 32, "node": 8, "auto": 8}.items():
        config = wide(files, tmp_path, machine=MachineConfig(num_gpus=32, memory_gb=1.7), parallel={"shard": shard})
        machine = Machine.of(config.machine)
        assert plan.shard_size_for(config, machine, precision="bf16") == expected
        rows = plan.by_shard_size(config, machine, precision="bf16")
        assert [row["shard_size"] for row in rows if row["is_used"]] == [expected]
    config = wide(files, tmp_path, machine=MachineConfig(num_gpus=32), parallel={"shard": 5})
    with pytest.raises(ValueError, match=r"parallel\.shard = 5: expected a number that divides the 32 processes"):
        plan.shard_size_for(config, Machine.of(config.machine), precision="bf16")


def test_a_checkpoint_is_as_large_and_as_long_to_write_from_any_number_of_gpus(files, tmp_path):
    """Its size does not depend on who shares it, and its time follows from the storage."""
    found = set()
    for num_gpus in (1, 32):
        config = wide(files, tmp_path, machine=MachineConfig(num_gpus=num_gpus, storage_gb_per_second=0.5))
        where = {"run_dir": tmp_path, "machine": Machine.of(config.machine), "precision": "bf16"}
        facts = plan.arithmetic(config, shard_size=num_gpus, **where)
        facts |= plan.on_storage(config, plan=facts)
        assert facts["checkpoint.write_seconds"] == facts["checkpoint.bytes"] / 0.5e9
        found.add(facts["checkpoint.bytes"])
    assert found == {12 * TransformerLM(**config.model.model_dump(), device="meta").num_parameters()}


@pytest.mark.parametrize(("optimizer", "expected"), [("adamw", 2 + 3), ("muon", 2 + 2), ("sgd", 2 + 1)])
def test_a_large_checkpoint_is_in_several_files(optimizer, expected, files, tmp_path):
    """They are counted on a model without numbers: its 5.8 GB are two files, and AdamW's state is twice as large."""
    sizes = {"d_model": 2048, "num_layers": 24, "num_heads": 16, "d_ff": 7168}
    changes = {f"model.{name}": size for name, size in sizes.items()} | {"optimizer.name": optimizer}
    facts = facts_of(tiny_config(files, tmp_path, changes), tmp_path)
    assert facts["checkpoint.files"] == expected
