"""The whole model: causality, caching, every ablation, and the same numbers as another library's LLaMA."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from transformerlm.models.layers import FEED_FORWARDS
from transformerlm.models.transformer import TransformerBlock, TransformerLM

SMALL = {"vocab_size": 50, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4}
VARIANTS = [
    {"norm_position": norm, "position": position, "num_kv_heads": kv, "ffn": ffn, "tie_embeddings": tied, "qk_norm": qk}
    for (norm, position, kv), (ffn, tied, qk) in zip(
        itertools.product(("pre", "post", "none"), ("rope", "none"), (4, 2, 1)),
        itertools.cycle(
            [("swiglu", False, False), ("silu", True, False), ("swiglu", True, True), ("silu", False, True)]
        ),
        strict=False,
    )
]

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(str(value) for value in variant.values())


def make_model(**changes: Any) -> TransformerLM:
    return TransformerLM(**{**SMALL, **changes}).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_cached_equals_full_forward(variant: dict[str, Any]) -> None:
    """A sequence fed in uneven pieces through the cache has the logits of the whole, to the very last position."""
    model, ids = make_model(**variant), random_ids(2, 16)
    cache = model.make_cache(2)
    pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 7, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_fused_equals_reference(variant: dict[str, Any]) -> None:
    """The choice of attention changes no logit."""
    fused, ids = make_model(**variant), random_ids(2, 11)
    reference = make_model(**variant, attention="reference")
    reference.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(ids), reference(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_later_tokens_change_no_earlier_logits(variant: dict[str, Any]) -> None:
    """Causality: only the logits from the changed token on differ."""
    model, ids = make_model(**variant), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % SMALL["vocab_size"]
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_soft_cap_bounds_the_logits(tied: bool) -> None:
    """The logits become cap * tanh(logits / cap), with a cache as well, and keep their dtype."""
    free, capped = make_model(tie_embeddings=tied), make_model(tie_embeddings=tied, logit_soft_cap=1.5)
    capped.load_state_dict(free.state_dict())
    ids = random_ids(2, 6)
    expected = 1.5 * torch.tanh(free(ids) / 1.5)
    torch.testing.assert_close(capped(ids), expected)
    torch.testing.assert_close(capped(ids, cache=capped.make_cache(2)), expected, rtol=1e-4, atol=1e-4)
    assert free(ids).abs().max() > 1.5 > capped(ids).abs().max()
    assert capped.to(torch.bfloat16)(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("ffn", ["swiglu", "silu"])
def test_zero_init_makes_every_block_begin_as_the_identity(ffn: str) -> None:
    """output_proj and w2 are zero, every other weight is as usual, and a block returns its input."""
    torch.manual_seed(0)
    usual = make_model(ffn=ffn)
    torch.manual_seed(0)
    zeroed = make_model(ffn=ffn, zero_init_outputs=True)
    x = torch.randn(2, 5, SMALL["d_model"])
    assert torch.equal(zeroed.layers[0](x), x)
    for (name, theirs), ours in zip(usual.named_parameters(), zeroed.parameters(), strict=True):
        is_output = name.endswith(("output_proj.weight", "w2.weight"))
        assert torch.equal(ours, torch.zeros_like(theirs) if is_output else theirs), name


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    """A sequence has the same logits alone and beside others."""
    model, ids = make_model(), random_ids(3, 10)
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), rtol=1e-5, atol=1e-5)


def test_without_positions_earlier_tokens_are_a_set() -> None:
    """position="none" in one layer cannot tell the order of earlier tokens; rope can."""
    ids = random_ids(1, 8)
    shuffled = torch.cat((ids[:, :7].flip(1), ids[:, 7:]), dim=1)
    blind, sighted = make_model(position="none", num_layers=1), make_model(num_layers=1)
    torch.testing.assert_close(blind(ids)[:, -1], blind(shuffled)[:, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sighted(ids)[:, -1], sighted(shuffled)[:, -1], atol=1e-3)


@pytest.mark.parametrize("norm_position", ["pre", "post", "none"])
def test_block_puts_its_norms_where_it_says(norm_position: str) -> None:
    """pre is x + f(norm(x)), post is norm(x + f(x)), none is x + f(x)."""
    block = TransformerBlock(8, 2, 16, norm_position=norm_position)
    x = torch.randn(2, 3, 8)
    if norm_position == "pre":
        middle = x + block.attn(block.ln1(x))
        expected = middle + block.ffn(block.ln2(middle))
    elif norm_position == "post":
        middle = block.ln1(x + block.attn(x))
        expected = block.ln2(middle + block.ffn(middle))
    else:
        middle = x + block.attn(x)
        expected = middle + block.ffn(middle)
    torch.testing.assert_close(block(x), expected)


def test_norms_exist_only_where_they_are_used() -> None:
    """Only a pre-norm model has a final norm, and a model without norms has no weight of one."""
    names = {position: make_model(norm_position=position).state_dict().keys() for position in ("pre", "post", "none")}
    assert "ln_final.weight" in names["pre"]
    assert "ln_final.weight" not in names["post"]
    assert "layers.1.ln2.weight" in names["post"]
    assert not any("ln" in name for name in names["none"])


def llama_pair() -> tuple[TransformerLM, Any]:
    """Our model with random weights, and transformers' LLaMA with the same ones."""
    transformers = pytest.importorskip("transformers")
    ours = make_model(num_kv_heads=2, d_ff=48, rope_theta=500.0)
    for name, parameter in ours.named_parameters():
        if "ln" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict({llama_name(name): llama_weight(name, weight) for name, weight in ours.state_dict().items()})
    return ours, theirs


def llama_name(name: str) -> str:
    renames = {
        "token_embeddings": "model.embed_tokens",
        "layers.": "model.layers.",
        "output_proj": "o_proj",
        ".attn.": ".self_attn.",
        "ffn.w1": "mlp.gate_proj",
        "ffn.w2": "mlp.down_proj",
        "ffn.w3": "mlp.up_proj",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "ln_final": "model.norm",
    }
    for ours, theirs in renames.items():
        name = name.replace(ours, theirs)
    return name


def llama_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Order each head's query and key features as halves: theirs turns (i, i + d/2), ours (2i, 2i + 1)."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    d_head = SMALL["d_model"] // SMALL["num_heads"]
    return weight.view(-1, d_head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_logits_equal_those_of_transformers_llama() -> None:
    """The architecture is LLaMA's: the same weights give the same logits, grouped queries included."""
    ours, theirs = llama_pair()
    ids = random_ids(2, 16)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    """Recomputing activations gives the same loss and gradients bit for bit."""
    plain, recomputing = make_model().train(), make_model(activation_checkpointing=True).train()
    recomputing.load_state_dict(plain.state_dict())
    ids = random_ids(2, 9)
    for model in (plain, recomputing):
        model(ids).square().mean().backward()
    for ours, theirs in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_bf16_autocast_is_near_fp32_and_keeps_a_wide_residual() -> None:
    """Under autocast the logits are bfloat16 and close; the gradients of the fp32 weights are fp32."""
    model, ids = make_model(), random_ids(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids), rtol=0.05, atol=0.05)
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_bf16_weights_decode_with_a_bf16_cache() -> None:
    """A model cast to bfloat16 makes a cache of its dtype, and cached and full logits stay close."""
    model, ids = make_model().to(torch.bfloat16), random_ids(1, 8)
    cache = model.make_cache(1)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    pieces = torch.cat([model(piece, cache=cache) for piece in ids.split(3, dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(ids), rtol=0.1, atol=0.1)


def test_last_only_gives_the_last_position() -> None:
    """The last logits alone are the same numbers."""
    model, ids = make_model(), random_ids(2, 7)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], rtol=1e-5, atol=1e-5)


def test_hparams_build_the_same_model_again() -> None:
    """hparams() holds every keyword, defaults included, and a model that is built from it takes the weights."""
    model = make_model(ffn="silu", norm_position="post")
    again = TransformerLM(**model.hparams())
    again.load_state_dict(model.state_dict())
    assert again.hparams() == model.hparams()
    assert (model.hparams()["d_ff"], model.hparams()["num_kv_heads"]) == (128, 4)


def test_tied_head_is_the_embedding_and_starts_sane() -> None:
    """The tied model has no lm_head, and its first logits have a deviation near 1, not sqrt(d_model)."""
    model = TransformerLM(**{**SMALL, "d_model": 256, "vocab_size": 500}, tie_embeddings=True).eval()
    assert "lm_head.weight" not in model.state_dict()
    logits = model(torch.randint(0, 500, (4, 16)))
    assert 0.5 < logits.std().item() < 2.0
    assert make_model(tie_embeddings=True).num_parameters() == make_model().num_parameters() - 50 * 32


def test_model_from_the_meta_device_computes_the_same() -> None:
    """Built on meta, emptied onto the CPU and loaded, a model gives the same logits."""
    model, ids = make_model(), random_ids(1, 5)
    other = TransformerLM(**SMALL, device="meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"d_model \(32\) is not divisible by num_heads \(5\)"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) is not divisible by num_kv_heads \(3\)"),
        ({"num_heads": 32}, "position = rope needs an even d_head, got 1"),
        ({"d_head": 7}, "position = rope needs an even d_head, got 7"),
        ({"d_head": 0}, "model.d_head: expected at least 1, got 0"),
        ({"ffn": "relu"}, f"model.ffn: expected one of {', '.join(FEED_FORWARDS)}, got 'relu'"),
        ({"norm_position": "both"}, "model.norm_position: expected one of pre, post, none, got 'both'"),
        ({"num_layers": 0}, "model.num_layers: expected at least 1, got 0"),
        ({"d_ff": -4}, "model.d_ff: expected at least 1, got -4"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: expected factor, low_freq_factor, .*, got factor"),
        ({"rope_scaling": {**SCALING, "low_freq_factor": 4.0}}, "0 < low_freq_factor < high_freq_factor .*, got"),
        ({"rope_scaling": SCALING, "position": "none"}, "rope_scaling: expected none with position = none, got"),
    ],
)
def test_impossible_sizes_and_choices_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each error says what was expected and what was found."""
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_sequences_that_do_not_fit_are_refused() -> None:
    """The error names both numbers, for a text longer than the context or the cache, and for a longer cache."""
    model = make_model()
    with pytest.raises(ValueError, match="17 tokens exceed context_length 16"):
        model(random_ids(1, 17))
    cache = model.make_cache(1, 8)
    model(random_ids(1, 6), cache=cache)
    with pytest.raises(ValueError, match=r"6 \+ 3 positions exceed its max_length of 8"):
        model(random_ids(1, 3), cache=cache)
    assert cache.length == 6
    with pytest.raises(ValueError, match="max_length 17 exceeds the model's context_length 16"):
        model.make_cache(1, 17)


@pytest.mark.slow
def test_compiled_model_equals_the_eager_one() -> None:
    """torch.compile traces the model without a graph break and changes neither logits nor gradients."""
    torch._dynamo.reset()  # other tests have compiled models of other shapes, and there is a limit
    model, ids = make_model().train(), random_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True)
    expected = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    found = torch.autograd.grad(compiled(ids).square().mean(), list(model.parameters()))
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# Each norm, with rotary positions and without, both feed-forward layers, tied and not, with norms of queries or not.
TRACED = [(0, torch.float32), (5, torch.float32), (7, torch.bfloat16), (14, torch.bfloat16)]


@pytest.mark.parametrize(("number", "precision"), TRACED, ids=str)
def test_what_a_compiler_traces_has_the_same_gradients(number: int, precision: torch.dtype) -> None:
    """Traced as torch.compile traces it (without making machine code), loss and gradients are those of eager code."""
    ids, grads = random_ids(2, 16), []
    model = make_model(**VARIANTS[number], num_layers=1).train()
    for forward in (model, torch.compile(model, backend="aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = forward(ids, head=False).float().square().mean()
        grads.append(torch.autograd.grad(loss, list(model.layers.parameters())))
    tolerance = 1e-5 if precision == torch.float32 else 0.05
    torch.testing.assert_close(grads[1], grads[0], rtol=tolerance, atol=tolerance)


def test_its_repr_shows_sizes() -> None:
    """`print(model)` says what it is made of and how large each part is."""
    sizes = {"vocab_size": 50, "context_length": 8, "d_model": 12, "num_layers": 1, "num_heads": 2, "d_ff": 20}
    model = TransformerLM(**sizes)
    shown = repr(model)
    assert shown.startswith(f"TransformerLM(\n  {model.num_parameters():,} parameters, vocab_size=50, context_length=8")
    for part in (
        "Embedding(50, 12)",
        "(w2): Linear(20, 12)",
        "(ln1): RMSNorm(12, eps=1e-05)",
        "RotaryEmbedding(theta=10000.0, d_k=6, max_seq_len=8)",
        "(lm_head): Linear(12, 50)",
    ):
        assert part in shown, part


@pytest.mark.parametrize("d_model", [64, 512])
@pytest.mark.parametrize("norm_position", ["pre", "post", "none"])
@pytest.mark.parametrize("zero_init_outputs", [True, False])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_training_begins_with_about_the_loss_of_guessing(d_model, norm_position, zero_init_outputs, tie_embeddings):
    """The loss is about ln(vocab_size) for every combination: no logit is large at random, not even a token's own."""
    torch.manual_seed(0)
    model = TransformerLM(
        vocab_size=1000,
        context_length=32,
        d_model=d_model,
        num_layers=2,
        num_heads=4,
        norm_position=norm_position,
        zero_init_outputs=zero_init_outputs,
        tie_embeddings=tie_embeddings,
    )
    ids = torch.randint(1000, (4, 33))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(1000)) < 1.0
