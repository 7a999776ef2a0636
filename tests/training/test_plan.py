"""The arithmetic of a run against the parts it is made of."""

from __future__ import annotations

import pytest
import torch

from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.models.transformer import TransformerLM
from transformerlm.training import checkpoint, plan
from transformerlm.training.build import build_optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


def facts_of(config, tmp_path):
    """The facts of a run on the CPU in fp32."""
    return plan.arithmetic(config, run_dir=tmp_path / "not" / "yet", device=CPU, precision="fp32")


def test_the_numbers_are_those_of_the_model(files, tmp_path):
    """Parameters, FLOPs and tokens multiply out."""
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
    """The tensors of a saved checkpoint take the bytes of the plan, and headers."""
    config = tiny_config(files, tmp_path)
    model = TransformerLM(**config.model.model_dump())
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tokenizer = checkpoint.Tokenizer.from_directory(files.tokenizer)
    snapshot = checkpoint.Snapshot(model, optimizer, tokenizer, "", {})
    saved = checkpoint.save_checkpoint(tmp_path / "checkpoints", 1, snapshot)
    found = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    facts = facts_of(config, tmp_path)
    assert facts["checkpoint.bytes"] == pytest.approx(found, rel=0.05)
    assert facts["disk.needed_bytes"] == facts["checkpoint.bytes"] * (config.checkpoint.keep + 2)


def test_remedies_end_where_the_run_fits(files, tmp_path, monkeypatch):
    """A smaller micro-batch comes first, then checkpointing, then bf16; each total counts those before it."""
    config = tiny_config(files, tmp_path, {"model.num_layers": 8, "training.batch_size": 64})

    def advice(room):
        monkeypatch.setattr(plan, "device_memory_bytes", lambda device: room)
        return plan.remedies(config, device=CPU, precision="fp32")

    none_fits = advice(1)
    names = ["training.micro_batch_size = 1", "model.activation_checkpointing = true", 'training.precision = "bf16"']
    assert [name for name, _ in none_fits] == names
    assert none_fits[0][1] > none_fits[1][1]
    ((name, total),) = advice(none_fits[0][1])
    assert (name, total) == none_fits[0]
    ((name, total),) = advice(facts_of(config, tmp_path)["memory.total_bytes"] - 1)
    assert name == "training.micro_batch_size = 32"
    assert len(advice(none_fits[1][1])) == 2
