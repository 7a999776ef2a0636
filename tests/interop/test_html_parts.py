"""A page's arrays are what the decoder multiplies with at int8, and no setting is left out in silence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import regex
import torch

from tests.interop.models import SCALING, make_checkpoint
from transformerlm.checkpoints.load import load_model
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.interop.html_parts import check_known, model_parts, tokenizer_parts
from transformerlm.models.layers import RotaryEmbedding
from transformerlm.models.settings import ModelSettings
from transformerlm.tokenizer import Tokenizer

SIZES = {"vocab_size": 8, "context_length": 4, "d_model": 4, "num_layers": 1, "num_heads": 1}
VARIANTS = [
    {"qk_norm": True, "num_kv_heads": 2},
    {"qk_norm": True, "num_kv_heads": 2, "d_head": 12},
    {"norm_position": "post", "tie_embeddings": True, "ffn": "silu"},
    {"norm_position": "none", "position": "none", "d_ff": 600},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_matrices_are_those_of_the_decoder(variant, files, tmp_path):
    """Levels and scales of each matrix are, bit for bit, those that infer multiplies with at precision int8."""
    model = load_model(make_checkpoint(tmp_path, files, **variant))
    decoder, parts = Decoder(model, int8=True), model_parts(model, vocab_size=290)
    places = [("qkv", "_qkv"), ("output", "_output"), ("up", "_up"), ("down", "_down")]
    theirs = {f"{n}.{name}": getattr(each, own) for n, each in enumerate(decoder._layers) for name, own in places}
    for name, matrix in {**theirs, "head": decoder._head}.items():
        levels, scales = parts[f"{name}.levels"], parts[f"{name}.scales"]
        rows = levels.shape[1]
        np.testing.assert_array_equal(levels, matrix.levels[:, :rows].numpy())
        np.testing.assert_array_equal(scales, matrix.scales[:, :rows].float().numpy())
    np.testing.assert_array_equal(parts["embedding"], model.token_embeddings.weight[:290].detach().numpy())


def test_the_frequencies_are_those_of_the_rotary_embedding():
    """Position times frequency has the embedding's cosine, with and without a scaling."""
    for scaling in (None, SCALING):
        model = torch.nn.Module()
        settings = ModelSettings(**SIZES | {"d_model": 16}, rope_theta=500.0, rope_scaling=scaling)
        model.settings, model.state_dict = settings, _random_weights(settings).state_dict
        angles = np.outer(np.arange(64), model_parts(model, vocab_size=8)["frequencies"])
        table = RotaryEmbedding(500.0, 16, 64, scaling=scaling).cos
        np.testing.assert_array_equal(np.cos(angles).astype(np.float32), table.numpy())


def _random_weights(settings):
    from transformerlm.models.transformer import TransformerLM

    return TransformerLM(settings)


def test_a_setting_that_the_page_does_not_compute_is_refused_by_name():
    """A new setting of the model, and a new value of one that is known."""

    @dataclass(frozen=True, kw_only=True)
    class Later(ModelSettings):
        sliding_window: int = 8

    check_known(ModelSettings(**SIZES, logit_soft_cap=3.0, dropout={"residual": 0.1}, qk_norm=True))
    with pytest.raises(ValueError, match=r"model\.sliding_window is not computed by the page"):
        check_known(Later(**SIZES))
    settings = ModelSettings(**SIZES)
    object.__setattr__(settings, "ffn", "relu")
    with pytest.raises(ValueError, match=r"model\.ffn = 'relu' is not computed by the page"):
        check_known(settings)


def test_a_page_knows_the_tokens_and_the_kinds_of_characters(files):
    """The bytes of each token, merges as ids, and for each code point whether it is a letter, a number or a space."""
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    parts = tokenizer_parts(tokenizer)
    ends = parts["token_ends"].tolist()
    whole = parts["tokens"].tobytes()
    assert [whole[a:b] for a, b in zip([0, *ends], ends, strict=False)] == [tokenizer.vocab[i] for i in range(290)]
    for left, right, made in parts["merges"].reshape(-1, 3).tolist():
        assert tokenizer.vocab[left] + tokenizer.vocab[right] == tokenizer.vocab[made]
    assert parts["special"].tolist() == list(tokenizer.special_token_ids.values())
    for name, kind in {"letters": r"\p{L}", "numbers": r"\p{N}", "spaces": r"\s"}.items():
        found = np.zeros(0x110000, bool)
        for first, last in parts[name].reshape(-1, 2):
            found[first : last + 1] = True
        for code in [*range(0x3000), 0xFEFF, 0xD800, 0x1D400, 0x20000, 0x10FFFF]:
            assert found[code] == bool(regex.match(kind, chr(code))), (name, hex(code))
