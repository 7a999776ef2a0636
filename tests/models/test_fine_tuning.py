"""Which weights a training changes, by patterns of their names."""

from __future__ import annotations

import pytest

from transformerlm.models.estimates import parameter_shapes
from transformerlm.models.fine_tuning import FineTuning, LoRA, matching
from transformerlm.models.settings import ModelSettings

SETTINGS = ModelSettings(vocab_size=30, context_length=8, d_model=16, num_layers=12, num_heads=2, d_ff=24)
SHAPES = parameter_shapes(SETTINGS)
NAMES = list(SHAPES)


def lora(*targets: str, **changes: object) -> FineTuning:
    return FineTuning.of({"lora": {"rank": 4, "alpha": 8.0, "targets": targets or ("layers.*",), **changes}})


def test_without_patterns_all_weights_are_trained() -> None:
    """Nothing is frozen by default, and `bool` says so."""
    assert FineTuning().trained(NAMES) == set(NAMES)
    assert not FineTuning()
    assert not FineTuning.of({"freeze": [], "lora": None})
    assert FineTuning.of({"freeze": ["lm_head"]})


def test_a_layer_stands_for_the_weights_in_it() -> None:
    """A pattern is a weight's name or a layer's, whole: `layers.1` is no `layers.11`."""
    left = FineTuning(freeze=("token_embeddings", "layers.1", "layers.*.ln?", "*w2.weight")).trained(NAMES)
    frozen = set(NAMES) - left
    assert {"token_embeddings.weight", "layers.1.attn.q_proj.weight", "layers.11.ln2.weight"} <= frozen
    assert "layers.7.ffn.w2.weight" in frozen
    assert {"layers.11.attn.q_proj.weight", "layers.10.ffn.w1.weight", "lm_head.weight", "ln_final.weight"} <= left


def test_a_pattern_that_means_nothing_is_answered_with_near_names() -> None:
    """The error has the key, the pattern and what is most like it; without a likeness, all kinds of names."""
    with pytest.raises(ValueError, match=r"fine_tuning.freeze: 'token_embedding' is no weight .*token_embeddings"):
        FineTuning(freeze=("lm_head", "token_embedding")).trained(NAMES)
    with pytest.raises(ValueError, match=r"'layers.0.attn.k_prj' is no weight .* near it: layers\.\*\.attn\.k_proj"):
        FineTuning(freeze=("layers.0.attn.k_prj",)).trained(NAMES)
    with pytest.raises(ValueError, match=r"'zzz' is no thing of this model; there are token_embeddings.weight, layers"):
        matching(["zzz"], NAMES, key="key", what="thing")


def test_a_list_in_one_word_is_answered_with_how_to_write_it() -> None:
    """`--fine_tuning.freeze='["layers.0"]'` is one pattern, as any word of a list of texts; the error says so."""
    for pattern in ('["layers.0"]', "[]"):
        with pytest.raises(ValueError, match=r"on a command line patterns are words: PATTERN PATTERN, not a list$"):
            matching([pattern], ["layers.0.ln1.weight"], key="fine_tuning.freeze", what="weight")


def test_a_training_of_nothing_is_refused() -> None:
    """Whatever the patterns are that freeze all of it."""
    for patterns in (("*",), ("layers", "token_embeddings", "lm_head", "ln_final")):
        with pytest.raises(ValueError, match="freezes all 111 weights of the model, and there is nothing to train"):
            FineTuning(freeze=patterns).trained(NAMES)


def test_lora_gives_its_targets_two_matrices_and_trains_those_alone() -> None:
    """A and B are beside their weight; embedding, norms, head and all weights of the plain model are frozen."""
    found = lora("layers.*.attn.[qv]_proj", "layers.3.ffn.w1")
    shapes = found.extended(SHAPES)
    added = {name: shape for name, shape in shapes.items() if name not in SHAPES}
    assert len(added) == 2 * (2 * 12 + 1)
    assert added["layers.3.ffn.w1.lora_a"] == (4, 16)
    assert added["layers.3.ffn.w1.lora_b"] == (24, 4)
    assert {name: shapes[name] for name in SHAPES} == SHAPES
    assert found.trained(shapes) == set(added)


def test_lora_may_train_whole_weights_besides() -> None:
    """`train` names them, for example an embedding with new tokens."""
    found = lora(train=("token_embeddings", "lm_head"))
    shapes = found.extended(SHAPES)
    whole = {name for name in found.trained(shapes) if name in SHAPES}
    assert whole == {"token_embeddings.weight", "lm_head.weight"}


@pytest.mark.parametrize("target", ["lm_head", "token_embeddings", "layers.0.ln1", "layers.12", "layers.*.attn.q"])
def test_what_is_no_linear_layer_of_a_block_is_no_target(target: str) -> None:
    """The error says what LoRA is for."""
    with pytest.raises(ValueError, match=r"fine_tuning\.lora\.targets: .* is no linear layer of the blocks"):
        lora(target).extended(SHAPES)


def test_a_rank_above_a_side_of_a_layer_is_refused() -> None:
    """B A has no higher rank than W; the message says which layer it was."""
    shapes = {"layers.0.attn.k_proj.weight": (4, 16), "layers.0.attn.q_proj.weight": (16, 16)}
    with pytest.raises(ValueError, match=r"lora\.rank: expected at most 4, the smaller side of .*k_proj, found 5"):
        LoRA(rank=5, alpha=8.0, targets=("layers.*.attn",)).layers(shapes)
    assert len(LoRA(rank=4, alpha=8.0, targets=("layers.*.attn",)).layers(shapes)) == 2
    assert LoRA(rank=5, alpha=8.0, targets=("layers.*.attn.q_proj",)).layers(shapes)


def test_the_scale_is_alpha_over_rank() -> None:
    """So another rank needs no other learning rate."""
    assert LoRA(rank=16, alpha=8.0, targets=()).scale == 0.5
