"""The settings of a model: what follows from them, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest

from transformerlm.models.layers import FEED_FORWARDS
from transformerlm.models.settings import ModelSettings, default_d_ff
from transformerlm.models.transformer import TransformerLM

SMALL = {"vocab_size": 50, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}


def test_sizes_that_are_not_given_follow_from_the_others() -> None:
    """As many key-value heads as heads, the default width of the layer, and the sizes of one head and of all keys."""
    settings = ModelSettings(**SMALL)
    assert (settings.num_kv_heads, settings.d_ff) == (4, default_d_ff(32))
    assert (settings.d_head, settings.d_kv) == (8, 32)
    assert replace(settings, num_kv_heads=2).d_kv == 16


def test_settings_that_are_written_out_are_the_same_settings() -> None:
    """A size that was not given, and the same size given, make equal settings; nothing can change them later."""
    settings = ModelSettings(**SMALL)
    assert ModelSettings(**asdict(settings)) == settings == ModelSettings(**SMALL, num_kv_heads=None, d_ff=None)
    with pytest.raises(FrozenInstanceError):
        settings.d_model = 64


def test_a_model_takes_settings_or_keywords() -> None:
    """Both ways build the same model; both at once are refused."""
    settings = ModelSettings(**SMALL, qk_norm=True)
    assert TransformerLM(settings, device="meta").settings == settings
    assert TransformerLM(**SMALL, qk_norm=True, device="meta").settings == settings
    with pytest.raises(ValueError, match="expected settings or keywords, got settings and d_ff"):
        TransformerLM(settings, d_ff=8)
    with pytest.raises(TypeError, match="window"):
        TransformerLM(**SMALL, window=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "model.d_model: expected at least 1, got 0"),
        ({"position": "alibi"}, "model.position: expected one of rope, none, got 'alibi'"),
        ({"attention": "flash"}, "model.attention: expected one of reference, fused, got 'flash'"),
        ({"logit_soft_cap": 0.0}, "model.logit_soft_cap: expected a positive number or none, got 0.0"),
        ({"rope_scaling": {**SCALING, "factor": 0.5}}, "rope_scaling: expected factor >= 1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each error says what was expected and what was found."""
    with pytest.raises(ValueError, match=message):
        ModelSettings(**{**SMALL, **changes})


def test_a_layer_of_the_table_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of layers is the only list of their names."""
    monkeypatch.setitem(FEED_FORWARDS, "mine", FEED_FORWARDS["silu"])
    assert ModelSettings(**SMALL, ffn="mine").d_ff == 128


@pytest.mark.parametrize(
    ("d_model", "ffn", "expected"),
    [(512, "swiglu", 1344), (768, "swiglu", 2048), (8, "swiglu", 64), (512, "silu", 2048)],
)
def test_default_width_of_the_feed_forward_layer(d_model: int, ffn: str, expected: int) -> None:
    """Gated: 8/3 d_model at the nearest multiple of 64, never 0; plain: 4 d_model."""
    assert default_d_ff(d_model, ffn) == expected
