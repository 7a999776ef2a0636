"""Every value of every setting of the model, through all that computes it or writes it: none gives another text.

The settings and their values are read from the schema, so that a new value is tried by itself. Where a new one fails
here, what fails does not know it yet.
"""

from __future__ import annotations

from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from torch.testing import assert_close

from config.schemas import ModelConfig
from tests.interop.models import make_checkpoint
from tests.training.tiny_run import write_tiny_files
from transformerlm.checkpoints.load import load_model
from transformerlm.inference.fast.decoder import Decoder, check_known
from transformerlm.inference.generate import generate
from transformerlm.interop.gguf import write_gguf
from transformerlm.interop.hf_export import write_hf
from transformerlm.interop.llama import REQUIRED
from transformerlm.interop.verify import verify_model
from transformerlm.models.estimates import count_parameters, estimate_training_memory, flops_per_token
from transformerlm.models.layers import FEED_FORWARDS
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM

# Of settings that are numbers, what is tried.
NUMBERS: dict[str, list[Any]] = {
    "vocab_size": [300],
    "context_length": [64],
    "d_model": [48],
    "num_layers": [1, 3],
    "num_heads": [2, 8],
    "num_kv_heads": [None, 1, 2],
    "d_head": [None, 6, 32],
    "d_ff": [None, 40],
    "rope_theta": [500.0],
    "rope_scaling": [{"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0, "original_context_length": 16}],
    "norm_eps": [1e-2],
    "logit_soft_cap": [None, 0.5],
    "dropout": [{"embedding": 0.1, "attention": 0.2, "residual": 0.3}],
}


def values_of(name: str, annotation: Any) -> list[Any]:
    """Return the values of a setting that are tried: all there are, or those of `NUMBERS`."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [False, True]
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and name not in NUMBERS and len(parts) == 1:
        return [None, *values_of(name, parts[0])]
    assert name in NUMBERS, f"model.{name}: say in NUMBERS which values to try"
    return NUMBERS[name]


EVERY = [
    {name: value}
    for name, field in ModelConfig.model_fields.items()
    for value in values_of(name, field.annotation)
    if name != "attention" or value != "fused"  # the default, as each of the others has it
]
TOGETHER = [
    {"qk_norm": True, "tie_embeddings": True, "num_kv_heads": 2, "d_head": 16, "ffn": ffn, "norm_position": position}
    for ffn in FEED_FORWARDS
    for position in ("pre", "post")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a tiny text with its tokenizer."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("changes", EVERY + TOGETHER, ids=str)
def test_all_that_computes_a_model_computes_the_same(changes, files, tmp_path):
    """Decoder, arithmetic and exports give what the model gives, or refuse the setting by its name."""
    checkpoint = make_checkpoint(tmp_path, files, **{"d_ff": None, **changes})
    model = load_model(checkpoint)
    ids = torch.randint(290, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids)
        decoders = [Decoder(model), Decoder(model, compiled=False)]
        for decoder in decoders:
            cache = decoder.make_cache(2)
            found = torch.cat([decoder(part, cache=cache) for part in ids.split([1, 7, 1, 15], dim=1)], dim=1)
            assert_close(found, expected, rtol=1e-4, atol=1e-4)
        compiled = Decoder(model, reproducible=True)  # where the step of such a model is compiled
        cache = compiled.make_slots(2)
        steps = [compiled.step_slots(column.tolist(), cache=cache, slots=[0, 1]) for column in ids.unbind(1)]
    assert_close(torch.stack(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 80, "temperature": 0.0}
    for decoder in decoders:
        assert generate(decoder, ids[0], **settings) == generate(model, ids[0], **settings)
    assert count_parameters(model.settings) == sum(parameter.numel() for parameter in model.parameters())
    assert flops_per_token(model.settings, 8) > 0
    assert estimate_training_memory(model.settings, micro_batch_size=1)["total"] > 0
    for write, name in ((write_hf, "hf"), (write_gguf, "m.gguf")):
        if {key: value for key, value in changes.items() if key in REQUIRED and value != REQUIRED[key][0]}:
            with pytest.raises(ValueError, match=f"model.({'|'.join(changes)}): expected"):
                write(checkpoint, tmp_path / name, verify=False)
            assert not (tmp_path / name).exists()
        else:
            write(checkpoint, tmp_path / name, verify=False)
            assert name != "hf" or "logits differ by" in verify_model(model, None, tmp_path / "hf")


def test_the_schema_has_every_setting_of_the_model():
    """The keys of the schema are the model's keywords, and its feed-forward layers those of the table."""
    assert set(ModelConfig.model_fields) == {field.name for field in fields(ModelSettings)}
    assert list(get_args(ModelConfig.model_fields["ffn"].annotation)) == list(FEED_FORWARDS)


def test_a_setting_that_the_decoder_has_not_been_taught_is_refused():
    """A new keyword, or a new value of an old one, is named before a text comes of it."""
    sizes = {"vocab_size": 300, "context_length": 8, "d_model": 16, "num_layers": 1, "num_heads": 2}
    hparams = TransformerLM(**sizes, device="meta").hparams()
    check_known(hparams)
    with pytest.raises(ValueError, match=r"model\.window, model\.norm_position = 'sandwich' is not computed here yet"):
        check_known({**hparams, "window": 4, "norm_position": "sandwich"})


def test_a_new_layer_is_decoded_as_it_is_trained(monkeypatch):
    """Whoever adds one to the table has added it everywhere: three matrices, another function of their products."""

    class Bilinear(FEED_FORWARDS["swiglu"]):
        """`w2(w1 x * relu(w3 x)^2)`."""

        @staticmethod
        def activate(gate, x):
            """Return `gate * relu(x)^2`."""
            return gate * torch.relu(x).square()

    monkeypatch.setitem(FEED_FORWARDS, "bilinear", Bilinear)
    sizes = {"vocab_size": 300, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 2}
    model, ids = TransformerLM(**sizes, ffn="bilinear").eval(), torch.randint(300, (1, 12))
    decoder = Decoder(model)
    with torch.inference_mode():
        assert_close(decoder(ids, cache=decoder.make_cache(1)), model(ids), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(ids), TransformerLM(**sizes).eval()(ids))
    assert count_parameters(model.settings) == sum(parameter.numel() for parameter in model.parameters())
