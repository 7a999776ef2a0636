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
    facts = plan_on({"memory_gb": 24.0, "tokens_per_second": 100}, max_time="2s")
    assert (facts["assumed.tokens_per_second"], facts["assumed.eta_seconds"]) == (100, 2)
    assert "assumed.flops_utilisation" not in facts
    with pytest.raises(ValueError, match=r"batch_size \(8\) is not divisible by micro_batch_size x processes"):
        plan_on({"gpu": "L4", "num_gpus": 3})
