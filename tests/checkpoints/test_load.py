"""What is loaded is what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.io import dump_toml
from tests.checkpoints.helpers import make_snapshot, make_training, take_step
from transformerlm.checkpoints import validation
from transformerlm.checkpoints.directory import resolve_verified
from transformerlm.checkpoints.load import (
    load_config_of,
    load_model,
    load_optimizer,
    load_tokenizer,
    load_weights,
    weights_of,
)
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import FORMAT, CheckpointError, verify
from transformerlm.utils.files import file_sha256

ABLATIONS = {
    "default": {},
    "tied": {"model.tie_embeddings": True},
    "post-norm": {"model.norm_position": "post"},
    "no-norm": {"model.norm_position": "none"},
    "nope": {"model.position": "none"},
    "silu": {"model.ffn": "silu"},
    "grouped": {"model.num_kv_heads": 1},
    "qk-norm": {"model.qk_norm": True},
    "soft-cap": {"model.logit_soft_cap": 20.0},
    "reference": {"model.attention": "reference"},
    "recompute": {"model.activation_checkpointing": True},
    "all": {"model.tie_embeddings": True, "model.num_kv_heads": 1, "model.qk_norm": True, "model.ffn": "silu"},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_model_and_optimizer_come_back_bit_for_bit(name, files, tmp_path):
    """A loaded model gives the saved one's logits, and its next optimizer step is the same, for every kind of model."""
    *saved, snapshot = make_training(files, ABLATIONS[name])
    directory = save_checkpoint(tmp_path, 2, snapshot)
    model = load_model(directory)
    ids = torch.arange(16).unsqueeze(0)
    assert not model.training
    torch.testing.assert_close(model(ids), saved[0].eval()(ids), rtol=0, atol=0)

    *fresh, _ = make_training(files, ABLATIONS[name], steps=0)
    load_weights(weights_of(fresh[0]), directory)
    load_optimizer(fresh[1], directory, verify(directory))
    for model, optimizer in (saved, fresh):
        model.train()
        take_step(model, optimizer)
    torch.testing.assert_close(fresh[0].state_dict(), saved[0].state_dict(), rtol=0, atol=0)


def test_state_config_and_tokenizer_come_back(files, tmp_path):
    """The state's values, the configuration and the tokenizer are those that were saved."""
    snapshot = make_snapshot(files)
    directory = save_checkpoint(tmp_path, 2, snapshot)
    state = verify(directory)
    assert (state["step"], state["tokens"], state["format"]) == (2, 7, FORMAT)
    assert dump_toml(load_config_of(directory)) == snapshot.config_toml
    assert load_tokenizer(directory).fingerprint() == snapshot.tokenizer.fingerprint()


def test_dtype_and_tying_survive_loading(files, tmp_path):
    """`dtype` casts the weights, and a tied head is stored once."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files, ABLATIONS["tied"]))
    model = load_model(directory, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head is None


def test_weights_of_another_model_are_refused(files, tmp_path):
    """Weights whose names or shapes are not the model's are refused by name, and nothing is loaded."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn"):
        load_weights(make_snapshot(files, {"model.num_layers": 3}, steps=0).weights, directory)
    with pytest.raises(CheckpointError, match=r"expected shape \(128, 32\), found \(64, 32\)"):
        load_weights(make_snapshot(files, {"model.d_ff": 128}, steps=0).weights, directory)


def test_each_file_that_is_used_is_hashed_once(files, tmp_path, monkeypatch):
    """Finding the newest whole checkpoint and loading its model hashes each file once, and the optimizer's never."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    hashed: list[str] = []

    def count(path):
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(validation, "file_sha256", count)
    found, state = resolve_verified(tmp_path)
    model = load_model(found, is_verified=True)
    assert sorted(hashed) == sorted(Path(name).name for name in state["sha256"] if name != "optimizer.safetensors")
    monkeypatch.undo()
    torch.testing.assert_close(model.state_dict(), load_model(directory).state_dict(), rtol=0, atol=0)
