"""A decoder-only Transformer on one page: ids in, logits out (the block of LLaMA, Touvron et al. 2023).

    python docs/tour/transformer.py

`transformerlm/models` computes the same logits from the same weights, which have the same names there. It adds a cache
of keys and values, other choices of norm, positions and heads, and fast forms of the parts.
"""

import torch
from torch import Tensor, nn


class Linear(nn.Module):  # x W^T, (..., d_in) to (..., d_out), the weight drawn from N(0, std^2) cut at 3 std
    def __init__(self, d_in: int, d_out: int, std: float | None = None) -> None:
        super().__init__()
        std = (2 / (d_in + d_out)) ** 0.5 if std is None else std
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(d_out, d_in), 0.0, std, -3 * std, 3 * std))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Embedding(Linear):  # a matrix of the same form, of which each id takes a row, (...) to (..., d_model)
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class RMSNorm(nn.Module):  # x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Turn each pair of features of `x` (..., seq, d_head) by position * theta^(-2i / d_head) (Su et al. 2021)."""
    seq, d_head = x.shape[-2:]
    speeds = theta ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(seq), speeds)  # (seq, d_head / 2)
    cos, sin, even, odd = angles.cos().float(), angles.sin().float(), x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):  # softmax(q k^T / sqrt(d_head)) v (Vaswani et al. 2017)
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = Linear(d_model, d_model), Linear(d_model, d_model)
        self.v_proj, self.output_proj = Linear(d_model, d_model), Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.stack((self.q_proj(x), self.k_proj(x), self.v_proj(x)))  # (3, batch, seq, d_model)
        q, k, v = projected.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)  # each (batch, heads, seq, d_head)
        scores = rotate(q) @ rotate(k).mT / q.shape[-1] ** 0.5  # (batch, heads, queries, keys)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # a token does not see those after it
        heads = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v
        return self.output_proj(heads.transpose(1, 2).flatten(-2))  # (batch, seq, d_model)


class SwiGLU(nn.Module):  # w2(silu(w1 x) * w3 x), silu(z) = z sigmoid(z) (Shazeer 2020)
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(d_model, d_ff), Linear(d_ff, d_model), Linear(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


class Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        self.attn, self.ffn = Attention(d_model, num_heads), SwiGLU(d_model, d_ff)
        self.ln1, self.ln2 = RMSNorm(d_model), RMSNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class Transformer(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, num_layers: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        self.token_embeddings = Embedding(d_model, vocab_size, std=1.0)
        self.layers = nn.Sequential(*(Block(d_model, num_heads, d_ff) for _ in range(num_layers)))
        self.ln_final, self.lm_head = RMSNorm(d_model), Linear(d_model, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.ln_final(self.layers(self.token_embeddings(ids))))  # (batch, seq, vocab_size)


if __name__ == "__main__":
    torch.manual_seed(0)
    tour = Transformer(vocab_size=276, d_model=32, num_layers=2, num_heads=2, d_ff=64)
    print(*(f"{name:32} {tuple(weight.shape)}" for name, weight in tour.named_parameters()), sep="\n")
    logits = tour(torch.tensor([[262, 265, 268, 272, 259, 273, 261, 46]]))  # "The fox sat in the box."
    print("logits", tuple(logits.shape), "of the first id for the second:", round(logits[0, 0, 265].item(), 4))
