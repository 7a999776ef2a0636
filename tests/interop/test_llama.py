"""The two names of one architecture: settings, weights, and the rows of q and k."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch.testing import assert_close

from tests.interop.models import LLAMA3, SCALING
from transformerlm.checkpoints.document_ids import DocumentIds
from transformerlm.interop import llama
from transformerlm.models.functional import rotate
from transformerlm.models.settings import ModelSettings

MODEL = ModelSettings(vocab_size=300, context_length=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2)
CONFIG = llama.to_config(MODEL, dtype="fp32", ids=llama.to_ids(DocumentIds()))


def test_a_config_describes_the_model_that_it_was_made_from():
    """After conversion and back, the settings of the model are the same."""
    for settings in (MODEL, replace(MODEL, qk_norm=True), replace(MODEL, rope_scaling=SCALING)):
        config = llama.to_config(settings, dtype="fp32", ids=llama.to_ids(DocumentIds()))
        assert ModelSettings(**llama.from_config(config)) == settings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_position", "post"),
        ("norm_position", "none"),
        ("position", "none"),
        ("ffn", "silu"),
        ("logit_soft_cap", 30.0),
    ],
)
def test_what_is_no_llama_is_refused_by_name(key, value):
    """The error names the setting that makes it another architecture, and its value."""
    with pytest.raises(ValueError, match=rf"no Llama.*model\.{key}: expected .*, found \"?{str(value).lower()}"):
        llama.architecture_of(replace(MODEL, **{key: value}))


def test_a_llama_with_tied_embeddings_is_one():
    """Settings that both sides have are no reason to refuse."""
    assert llama.architecture_of(replace(MODEL, tie_embeddings=True, num_kv_heads=1)) == "llama"


def test_a_model_with_norms_of_queries_and_keys_is_a_qwen3():
    """The setting decides which of the two architectures is written."""
    assert llama.architecture_of(replace(MODEL, qk_norm=True)) == "qwen3"


def test_a_setting_that_nobody_has_thought_of_is_refused():
    """A new keyword of the model is never silently missing from a file."""

    @dataclass(frozen=True, kw_only=True)
    class Windowed(ModelSettings):
        window: int = 128

    with pytest.raises(ValueError, match=r"model\.window: expected none, as no file has a place for it"):
        llama.architecture_of(Windowed(**asdict(MODEL)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, 'rope_scaling.rope_type: expected "default", found "linear"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.factor: expected none"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters.rope_type: expected "default", found "yarn"'),
        ({"rope_scaling": {"rope_type": "llama3", "type": "dynamic"}}, 'expected "llama3", found "dynamic"'),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor: expected a number, found none"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "rope_scaling.attention_factor: expected none"),
        ({"rope_scaling": LLAMA3}, "rope_scaling: expected null, found {"),  # beside that of rope_parameters
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}, "embeddings: expected 32, found 16"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "rope_parameters.factor: expected none"),
        ({"rope_theta": 5e5}, "rope_theta: expected 10000.0, found 500000.0"),  # beside that of rope_parameters
        ({"rope_parameters": [1]}, "rope_parameters: expected {}"),
        ({"attention_bias": True}, "attention_bias: expected false, found true"),
        ({"mlp_bias": True}, "mlp_bias: expected false"),
        ({"hidden_act": "gelu"}, 'hidden_act: expected "silu", found "gelu"'),
        ({"sliding_window": 4096}, "sliding_window: expected null"),
        ({"use_sliding_window": True}, "use_sliding_window: expected false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 'layer_types: expected "full_attention" for each'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ({"model_type": "mistral"}, 'model_type: expected "llama", found "mistral"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected"),
        ({"model_type": "qwen3"}, 'architectures: expected ["Qwen3ForCausalLM"], found ["LlamaForCausalLM"]'),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected null"),
        ({"hidden_size": None}, "hidden_size: expected a number, found none"),
    ],
)
def test_another_architecture_is_refused_by_name(change, message):
    """The key of the config.json is named with what was expected of it."""
    with pytest.raises(ValueError, match=re.escape(message)):
        llama.from_config({**CONFIG, **change})


def test_an_old_config_has_the_defaults_of_llama():
    """Keys that the first files did not have get the values that transformers gives them."""
    sizes = {key: CONFIG[key] for key in llama._SIZES}
    found = llama.from_config({"model_type": "llama", **sizes})
    model = {
        "num_kv_heads": None,
        "d_head": None,
        "context_length": 2048,
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_embeddings": False,
    }
    assert {key: found[key] for key in model} == model


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": LLAMA3, "rope_parameters": None},
        {"rope_scaling": {**LLAMA3, "rope_theta": 1e4}, "rope_parameters": None, "rope_theta": None},
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}, "original_max_position_embeddings": 32},
    ],
    ids=str,
)
def test_a_scaling_is_read_wherever_it_stands(change):
    """Files of transformers 4 hold the scaling in rope_scaling, those of 5 in rope_parameters, some in both."""
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    found = llama.from_config(config)
    assert (found["rope_theta"], found["rope_scaling"]) == (1e4, SCALING)


def test_a_scaling_is_written_for_both_versions():
    """A model without scaling has no such key, as before."""
    config = llama.to_config(replace(MODEL, rope_scaling=SCALING), dtype="fp32", ids=llama.to_ids(DocumentIds()))
    assert (config["rope_scaling"], config["rope_parameters"]) == (LLAMA3, {**LLAMA3, "rope_theta": 1e4})
    assert "rope_scaling" not in CONFIG


def test_rows_are_put_in_order_and_back():
    """Only q and k change, and undoing it gives the same weights."""
    weight = torch.randn(24, 5)
    for name in ("layers.0.attn.q_proj.weight", "layers.0.attn.k_proj.weight"):
        theirs = llama.halves_from_pairs(name, weight, 8)
        assert not torch.equal(theirs, weight)
        assert torch.equal(llama.pairs_from_halves(name, theirs, 8), weight)
    assert llama.halves_from_pairs("layers.0.attn.v_proj.weight", weight, 8) is weight
    assert llama.pairs_from_halves("lm_head.weight", weight, 8) is weight


def test_turning_halves_of_the_new_order_is_turning_pairs_of_the_old():
    """Queries from the permuted weight, rotated as in Llama, are ours, rotated our way, in the new order."""
    d_head = 8
    weight, x = torch.randn(d_head, 5), torch.randn(3, 5)
    cos, sin = torch.rand(3, d_head // 2), torch.rand(3, d_head // 2)
    ours = rotate(x @ weight.T, cos, sin)
    first, second = (x @ llama.halves_from_pairs("q_proj.weight", weight, d_head).T).chunk(2, dim=-1)
    theirs = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    assert_close(theirs, torch.cat((ours[:, 0::2], ours[:, 1::2]), dim=-1))


def test_a_qwen3_that_names_no_head_size_has_the_default_of_transformers():
    """In Qwen3 it is 128, whatever the width; a window that is named but not used changes nothing."""
    sizes = {key: CONFIG[key] for key in llama._SIZES}
    assert llama.from_config({"model_type": "qwen3", **sizes})["d_head"] == 128
    found = llama.from_config({"model_type": "qwen3", **sizes, "head_dim": 8, "sliding_window": 4096})
    assert (found["qk_norm"], found["num_kv_heads"], found["context_length"]) == (True, 32, 32768)
    assert found["d_head"] is None  # as wide as usual, 32 / 4
