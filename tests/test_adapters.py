"""The course's adapters, each called as the course calls it, against torch and plain formulas."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import adapters

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
D_MODEL, NUM_HEADS, D_FF, THETA = 16, 4, 40, 10000.0


def test_linear_and_embedding() -> None:
    """Weights are (d_out, d_in) and (vocab_size, d_model)."""
    weight, x = torch.randn(5, 3), torch.randn(2, 7, 3)
    torch.testing.assert_close(adapters.run_linear(d_in=3, d_out=5, weights=weight, in_features=x), x @ weight.T)
    table, ids = torch.randn(11, 4), torch.randint(0, 11, (2, 6))
    assert torch.equal(adapters.run_embedding(vocab_size=11, d_model=4, weights=table, token_ids=ids), table[ids])


def test_swiglu_silu_rmsnorm_softmax() -> None:
    """The elementwise and normalising parts equal torch's."""
    x = torch.randn(2, 5, D_MODEL)
    w1, w2, w3 = torch.randn(D_FF, D_MODEL), torch.randn(D_MODEL, D_FF), torch.randn(D_FF, D_MODEL)
    found = adapters.run_swiglu(d_model=D_MODEL, d_ff=D_FF, w1_weight=w1, w2_weight=w2, w3_weight=w3, in_features=x)
    torch.testing.assert_close(found, (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapters.run_silu(x), F.silu(x), **CLOSE)
    weight = torch.rand(D_MODEL) + 0.5
    found = adapters.run_rmsnorm(d_model=D_MODEL, eps=1e-5, weights=weight, in_features=x)
    torch.testing.assert_close(found, F.rms_norm(x, (D_MODEL,), weight, 1e-5), **CLOSE)
    torch.testing.assert_close(adapters.run_softmax(x + 100, dim=1), F.softmax(x, dim=1), **CLOSE)


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_scaled_dot_product_attention(leading: tuple[int, ...]) -> None:
    """Called with keywords, with any leading dimensions, a mask, and another number of keys than queries."""
    query, key, value = torch.randn(*leading, 6, 8), torch.randn(*leading, 9, 8), torch.randn(*leading, 9, 5)
    mask = torch.rand(*leading, 6, 9) > 0.5
    mask[..., 0] = True
    found = adapters.run_scaled_dot_product_attention(K=key, Q=query, V=value, mask=mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, attn_mask=mask), **CLOSE)
    found = adapters.run_scaled_dot_product_attention(Q=query, K=key, V=value)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value), **CLOSE)


def rope_by_loops(x: Tensor, positions: list[int]) -> Tensor:
    """Rotate each pair (2i, 2i+1) of `x` (..., seq, d) by hand."""
    result = x.clone()
    for j, position in enumerate(positions):
        for i in range(x.shape[-1] // 2):
            angle = position / THETA ** (2 * i / x.shape[-1])
            even, odd = x[..., j, 2 * i], x[..., j, 2 * i + 1]
            result[..., j, 2 * i] = even * math.cos(angle) - odd * math.sin(angle)
            result[..., j, 2 * i + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return result


def attention_by_heads(x: Tensor, weights: dict[str, Tensor], positions: list[int] | None) -> Tensor:
    """Causal multi-head self-attention, one head at a time, with torch's kernel."""
    d_head, heads = D_MODEL // NUM_HEADS, []
    for h in range(NUM_HEADS):
        rows = slice(h * d_head, (h + 1) * d_head)
        query, key, value = (x @ weights[f"{name}_proj.weight"][rows].T for name in "qkv")
        if positions is not None:
            query, key = rope_by_loops(query, positions), rope_by_loops(key, positions)
        heads.append(F.scaled_dot_product_attention(query, key, value, is_causal=True))
    return torch.cat(heads, dim=-1) @ weights["output_proj.weight"].T


def random_attention() -> dict[str, Tensor]:
    return {f"{name}_proj.weight": torch.randn(D_MODEL, D_MODEL) / 4 for name in ("q", "k", "v", "output")}


def test_rope_takes_positions_with_and_without_a_batch() -> None:
    """Interleaved pairs; positions (seq) or (batch, seq), in any order."""
    x, positions = torch.randn(3, 5, 8), [4, 0, 11, 3, 7]
    expected = rope_by_loops(x, positions)
    for given in (torch.tensor(positions), torch.tensor([positions] * 3)):
        found = adapters.run_rope(d_k=8, theta=THETA, max_seq_len=12, in_query_or_key=x, token_positions=given)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_multihead_self_attention_without_and_with_rope() -> None:
    """Causal; with RoPE at given positions, or at 0, 1, 2, ... by default."""
    weights, x, positions = random_attention(), torch.randn(2, 6, D_MODEL), [0, 2, 3, 7, 8, 9]
    common = {
        "d_model": D_MODEL,
        "num_heads": NUM_HEADS,
        "q_proj_weight": weights["q_proj.weight"],
        "k_proj_weight": weights["k_proj.weight"],
        "v_proj_weight": weights["v_proj.weight"],
        "o_proj_weight": weights["output_proj.weight"],
        "in_features": x,
    }
    found = adapters.run_multihead_self_attention(**common)
    torch.testing.assert_close(found, attention_by_heads(x, weights, None), **CLOSE)
    with_rope = {**common, "max_seq_len": 10, "theta": THETA}
    for given in (torch.tensor(positions), torch.tensor([positions])):
        found = adapters.run_multihead_self_attention_with_rope(**with_rope, token_positions=given)
        torch.testing.assert_close(found, attention_by_heads(x, weights, positions), **CLOSE)
    found = adapters.run_multihead_self_attention_with_rope(**with_rope)
    torch.testing.assert_close(found, attention_by_heads(x, weights, list(range(6))), **CLOSE)


def random_block() -> dict[str, Tensor]:
    return {
        **{f"attn.{name}": weight for name, weight in random_attention().items()},
        "ln1.weight": torch.rand(D_MODEL) + 0.5,
        "ln2.weight": torch.rand(D_MODEL) + 0.5,
        "ffn.w1.weight": torch.randn(D_FF, D_MODEL) / 4,
        "ffn.w2.weight": torch.randn(D_MODEL, D_FF) / 6,
        "ffn.w3.weight": torch.randn(D_FF, D_MODEL) / 4,
    }


def block_by_formula(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """x + attention(norm(x)), then x + swiglu(norm(x))."""
    attention = {name.removeprefix("attn."): weight for name, weight in weights.items() if name.startswith("attn.")}
    normed = F.rms_norm(x, (D_MODEL,), weights["ln1.weight"], 1e-5)
    x = x + attention_by_heads(normed, attention, list(range(x.shape[1])))
    normed = F.rms_norm(x, (D_MODEL,), weights["ln2.weight"], 1e-5)
    hidden = F.silu(normed @ weights["ffn.w1.weight"].T) * (normed @ weights["ffn.w3.weight"].T)
    return x + hidden @ weights["ffn.w2.weight"].T


def test_transformer_block() -> None:
    """A pre-norm block from a dict of weights with the course's keys."""
    weights, x = random_block(), torch.randn(2, 6, D_MODEL)
    found = adapters.run_transformer_block(
        d_model=D_MODEL,
        num_heads=NUM_HEADS,
        d_ff=D_FF,
        max_seq_len=8,
        theta=THETA,
        weights=weights,
        in_features=x,
    )
    torch.testing.assert_close(found, block_by_formula(x, weights), **CLOSE)


@pytest.mark.parametrize("seq_len", [8, 3])
def test_transformer_lm(seq_len: int) -> None:
    """The whole model from the course's keys, on full and shorter inputs."""
    blocks = [random_block() for _ in range(2)]
    weights = {f"layers.{i}.{name}": weight for i, block in enumerate(blocks) for name, weight in block.items()}
    weights["token_embeddings.weight"] = torch.randn(30, D_MODEL)
    weights["ln_final.weight"] = torch.rand(D_MODEL) + 0.5
    weights["lm_head.weight"] = torch.randn(30, D_MODEL)
    ids = torch.randint(0, 30, (2, seq_len))
    found = adapters.run_transformer_lm(
        vocab_size=30,
        context_length=8,
        d_model=D_MODEL,
        num_layers=2,
        num_heads=NUM_HEADS,
        d_ff=D_FF,
        rope_theta=THETA,
        weights=weights,
        in_indices=ids,
    )
    x = weights["token_embeddings.weight"][ids]
    for block in blocks:
        x = block_by_formula(x, block)
    x = F.rms_norm(x, (D_MODEL,), weights["ln_final.weight"], 1e-5)
    torch.testing.assert_close(found, x @ weights["lm_head.weight"].T, rtol=1e-4, atol=1e-4)


def test_get_batch_is_uniform_shifted_and_checks_its_device() -> None:
    """Every start occurs about equally often, targets are shifted, and an impossible device raises as torch does."""
    dataset = np.arange(100)
    counts = np.zeros(93)
    for _ in range(300):
        x, y = adapters.run_get_batch(dataset=dataset, batch_size=32, context_length=7, device="cpu")
        assert x.shape == y.shape == (32, 7)
        assert torch.equal(y, x + 1)
        counts += np.bincount(x[:, 0].numpy(), minlength=93)
    expected = 300 * 32 / 93
    assert abs(counts - expected).max() < 5 * math.sqrt(expected)
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA error|Torch not compiled with CUDA enabled|NVIDIA"):
        adapters.run_get_batch(dataset=dataset, batch_size=32, context_length=7, device="cuda:99")


def test_cross_entropy_and_gradient_clipping() -> None:
    """Both as torch's, large logits and a missing gradient included."""
    logits, targets = torch.randn(8, 5), torch.tensor([1, 0, 2, 2, 4, 1, 4, 0])
    for inputs in (logits, 1000.0 * logits):
        torch.testing.assert_close(adapters.run_cross_entropy(inputs, targets), F.cross_entropy(inputs, targets))
    ours, theirs = ([nn.Parameter(torch.ones(3, 3) * i) for i in range(4)] for _ in range(2))
    for parameters in (ours, theirs):
        parameters[-1].requires_grad_(False)
        torch.cat([p.flatten() for p in parameters[:-1]]).square().sum().backward()
    assert adapters.run_gradient_clipping(ours, max_l2_norm=1e-2) is None
    nn.utils.clip_grad_norm_(theirs, 1e-2)
    torch.testing.assert_close([p.grad for p in ours[:-1]], [p.grad for p in theirs[:-1]])
    assert ours[-1].grad is None


def train_toy(optimizer_class: Any, steps: int = 200) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(42)
    model = nn.Linear(3, 2, bias=False)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.rand(3)
        ((model(x) - torch.tensor([x[0] + x[1], -x[2]])) ** 2).sum().backward()
        optimizer.step()
    return model, optimizer


def test_adamw_class() -> None:
    """Built and driven as the course does, it ends where torch's does."""
    assert issubclass(adapters.get_adamw_cls(), torch.optim.Optimizer)
    ours, theirs = train_toy(adapters.get_adamw_cls())[0], train_toy(torch.optim.AdamW)[0]
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_cosine_schedule() -> None:
    """Zero, the maximum, the mean and the minimum where they belong."""
    rates = [
        adapters.run_get_lr_cosine_schedule(
            it=it, max_learning_rate=1.0, min_learning_rate=0.1, warmup_iters=7, cosine_cycle_iters=21
        )
        for it in range(25)
    ]
    assert [rates[i] for i in (0, 1, 7, 14, 21, 24)] == pytest.approx([0.0, 1 / 7, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize("optimizer_class", [adapters.get_adamw_cls(), torch.optim.AdamW])
@pytest.mark.parametrize("to_file_object", [False, True])
def test_checkpoint_round_trip(optimizer_class: Any, to_file_object: bool, tmp_path: Path) -> None:
    """Model, optimizer and iteration come back through a path or a binary file, for any torch optimizer."""
    model, optimizer = train_toy(optimizer_class, steps=10)
    place = io.BytesIO() if to_file_object else tmp_path / "checkpoint.pt"
    adapters.run_save_checkpoint(model, optimizer, iteration=10, out=place)
    if to_file_object:
        place.seek(0)
    other, other_optimizer = train_toy(optimizer_class, steps=0)
    assert adapters.run_load_checkpoint(src=place, model=other, optimizer=other_optimizer) == 10
    assert torch.equal(other.weight, model.weight)
    found, expected = other_optimizer.state_dict(), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


BYTES = {i: bytes([i]) for i in range(256)}


def test_tokenizer_round_trip_specials_and_laziness() -> None:
    """A special token absent from the vocabulary is appended, the longest wins, and encode_iterable is lazy."""
    merges = [(b"t", b"h"), (b"th", b"e")]
    vocab = {**BYTES, 256: b"th", 257: b"the"}
    tokenizer = adapters.get_tokenizer(vocab, merges, special_tokens=["<|s|>", "<|s|><|s|>"])
    text = "the thing<|s|><|s|> thé 🙃<|s|>"
    ids = tokenizer.encode(text)
    assert ids[:2] == [257, 32]
    assert ids.count(258) + ids.count(259) == 2
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"

    def endless() -> Iterator[str]:
        while True:
            yield "the cat\n"

    lazy = tokenizer.encode_iterable(endless())
    assert [next(lazy) for _ in range(3)] == [257, 32, ord("c")]
    assert list(tokenizer.encode_iterable([text[:9], text[9:]])) == ids


def test_train_bpe_counts_ties_and_specials(tmp_path: Path) -> None:
    """The worked example of Sennrich et al. with ties to the greater pair; special tokens neither merge nor count."""
    corpus = tmp_path / "corpus.txt"
    words = ["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6
    corpus.write_text("<|endoftext|>".join(words))
    vocab, merges = adapters.run_train_bpe(input_path=corpus, vocab_size=256 + 1 + 6, special_tokens=["<|endoftext|>"])
    assert merges == [
        (b"s", b"t"),
        (b"e", b"st"),
        (b"o", b"w"),
        (b"l", b"ow"),
        (b"w", b"est"),
        (b"n", b"e"),
    ]
    assert set(vocab) == set(range(263))
    assert set(vocab.values()) == {*BYTES.values(), b"<|endoftext|>", *(a + b for a, b in merges)}
