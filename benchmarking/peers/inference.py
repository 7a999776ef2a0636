"""Generation by each candidate through the same call: ours, transformers' Llama, a cache like nanochat's, llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarking.harness import OURS, Quantity, Sample
from benchmarking.peers.llama import build_llama, copy_weights
from benchmarking.peers.nanochat_style import NanochatStyle
from transformerlm.inference.generate import Decoder, generate_prompts
from transformerlm.models.transformer import TransformerLM

if TYPE_CHECKING:
    from benchmarking.peers.llama_cpp import LlamaCpp

FIRST_TOKEN = Quantity("time_to_first_token_ms", higher_is_better=False)
TOKENS = Quantity("tokens_per_second")
DECODE = Quantity("decode_step_ms", higher_is_better=False)
_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "q8_0": 34 / 32}  # of a number; q8_0: 32 of them and a scale in fp16

Generate = Callable[[int], list[list[int]]]
"""Generates that many new ids in each row, and returns them."""


def llama_of(model: TransformerLM) -> Any:
    """Return a LlamaForCausalLM with our model's weights, on its device and in its dtype."""
    weights = model.state_dict()
    embeddings = weights["token_embeddings.weight"]
    llama = build_llama(model.hparams()).to(device=embeddings.device, dtype=embeddings.dtype).eval()
    copy_weights(llama, weights, model.hparams())
    return llama


def weight_bytes(model: TransformerLM, precision: str, candidate: str = OURS) -> int:
    """Return the bytes that one step of decoding reads: all weights, but of an untied embedding only a row.

    With "int8", the peers of torch have no 8 bits here and stay in bf16, and llama.cpp has q8_0.
    """
    looked_up = 0 if model.hparams()["tie_embeddings"] else model.token_embeddings.weight.numel()
    if precision == "int8" and candidate != OURS:
        precision = "q8_0" if candidate == "llama_cpp" else "bf16"
    return round((model.num_parameters() - looked_up) * _BYTES[precision])


def measure_generation(
    generate: Generate,
    batch_size: int,
    max_new_tokens: int,
    timer: Callable[..., float],
    *,
    step_between: tuple[int, int] | None = None,
) -> Sample:
    """Time the generation of one token, which is the prompt's work, and of all.

    A step is what a token more takes, between one token and all, or between two other numbers of them: a call that
    captures a CUDA graph does so before its second token, so both numbers must be larger than one there.
    """
    low, high = step_between or (1, max_new_tokens)
    seconds = {count: timer(partial(generate, count)) for count in sorted({1, max_new_tokens, low, high})}
    # On a busy machine the longer run can be the shorter one; such a pair says nothing about a step, but must not be 0.
    step = max(seconds[high] - seconds[low], 1e-9) / (high - low)
    rate = batch_size * max_new_tokens / seconds[max_new_tokens]
    return {FIRST_TOKEN.name: seconds[1] * 1e3, TOKENS.name: rate, DECODE.name: step * 1e3}


def prompts_of(vocab_size: int, batch_size: int, length: int) -> list[list[int]]:
    """Return a prompt of random ids for each row: of equal ones our batches would read one."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = torch.randint(vocab_size, (batch_size, length), generator=generator).tolist()
    return rows


def _generate_ours(decoder: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    return generate_prompts(decoder, prompts, max_new_tokens=count, temperature=0.0)


def _generate_llama(llama: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    ids = torch.tensor(prompts, device=llama.device)
    output = llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True
    )
    new_ids: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return new_ids


def _generate_by_itself(peer: NanochatStyle | LlamaCpp, prompts: list[list[int]], count: int) -> list[list[int]]:
    return peer.generate(prompts, count)


GENERATE: dict[str, Callable[..., list[list[int]]]] = {
    OURS: _generate_ours,
    "huggingface": _generate_llama,
    "nanochat_style": _generate_by_itself,
    "llama_cpp": _generate_by_itself,
}
