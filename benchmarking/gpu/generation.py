"""Generation by a model of 124 M parameters: one launch a step or many, beside transformers and a plain cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarking.gpu.gpt2 import GPT2
from benchmarking.gpu.shapes import TINY
from benchmarking.gpu.task import Task
from benchmarking.harness import OURS, Sample, paired_ratios, run_rounds, summarise, timed
from benchmarking.limits import CopyBandwidth
from benchmarking.machine import is_installed
from benchmarking.peers.inference import (
    DECODE,
    FIRST_TOKEN,
    GENERATE,
    TOKENS,
    Generate,
    llama_of,
    measure_generation,
    prompts_of,
    weight_bytes,
)
from benchmarking.peers.nanochat_style import NanochatStyle
from transformerlm.inference.generate import Decoder, generate
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.device import synchronize

GRAPH, EAGER = f"{OURS}, CUDA graph", f"{OURS}, eager"
_TINY = {**TINY.model(), "context_length": 32}
_PROMPT_LENGTH, _NEW_TOKENS = 64, 64
_REPEATS = 3
_LIMIT = "limit"


def run(task: Task) -> None:
    """Measure each batch size."""
    torch.manual_seed(0)
    model = TransformerLM(**(_TINY if task.tiny else GPT2)).to(task.device, torch.bfloat16).eval()
    models: dict[str, tuple[str, Any]] = {
        GRAPH: (OURS, Decoder(model)),
        EAGER: (OURS, Decoder(model, cuda_graph=False)),
    }
    _check_ids(task, model)
    models["nanochat_style, eager"] = "nanochat_style", NanochatStyle(model.state_dict(), model.hparams())
    if is_installed("transformers"):
        try:
            models["huggingface, eager"] = "huggingface", llama_of(model)
        except Exception:  # a peer's new version must not cost our own numbers
            task.failed("transformers builds a model of these weights")
    for batch_size in (1, 2) if task.tiny else (1, 8, 64):
        _measure(task, models, batch_size, weight_bytes(model, "bf16"))


def _prompts(task: Task, vocab_size: int, batch_size: int) -> list[list[int]]:
    return prompts_of(vocab_size, batch_size, 4 if task.tiny else _PROMPT_LENGTH)


def _check_ids(task: Task, model: TransformerLM) -> None:
    """Whether a graph and eager steps choose the ids of the model itself: in fp32, since bf16 rounds logits to ties."""
    prompts, count = _prompts(task, model.vocab_size, 2), 8 if task.tiny else _NEW_TOKENS
    wide = copy.deepcopy(model).float()
    graph, eager = (GENERATE[OURS](each, prompts, count) for each in (Decoder(wide), Decoder(wide, cuda_graph=False)))
    # `generate_prompts` would make a decoder of the model; this is the plain loop over the model itself.
    plain = [generate(wide, prompt, max_new_tokens=count, temperature=0.0) for prompt in prompts]
    task.check("in fp32 a CUDA graph's steps give the ids of the model", graph == plain)
    task.check("in fp32 eager steps give the ids of the model", eager == plain)


def _measure(task: Task, models: dict[str, tuple[str, Any]], batch_size: int, num_bytes: int) -> None:
    device, count = torch.device(task.device), 4 if task.tiny else _NEW_TOKENS
    prompts = _prompts(task, models[GRAPH][1].vocab_size, batch_size)
    timer = partial(timed, synchronize=partial(synchronize, device))
    calls: dict[str, Generate] = {
        name: partial(GENERATE[kind], model, prompts) for name, (kind, model) in models.items()
    }
    # Each of its calls captures the step: two long ones, whose caches are equally long, differ by steps alone.
    between = {GRAPH: (count // 2, count)}
    runs: dict[str, Callable[[], Sample]] = {
        name: partial(measure_generation, call, batch_size, count, timer, step_between=between.get(name))
        for name, call in calls.items()
    }
    repeats = 1 if task.tiny else _REPEATS
    series = run_rounds({**runs, _LIMIT: CopyBandwidth(device)}, warmup=1, repeats=repeats)
    bandwidth = series.pop(_LIMIT)["bytes_per_second"]
    ours = series[GRAPH][TOKENS.name]
    for name, found in series.items():
        ratio = summarise(paired_ratios(ours, found[TOKENS.name]))
        step = summarise(found[DECODE.name]).median
        task.row(
            f"Generation, 124 M parameters, bf16, prompt of {_PROMPT_LENGTH}, {_NEW_TOKENS} new tokens",
            batch=batch_size,
            candidate=name,
            tokens_per_second=summarise(found[TOKENS.name]).median,
            first_token_ms=summarise(found[FIRST_TOKEN.name]).median,
            step_ms=step,
            share_of_bandwidth=1e3 * num_bytes / summarise(bandwidth).median / step,
            ours_over_it="" if name == GRAPH else f"{ratio.median:.2f}x ({ratio.min:.2f} .. {ratio.max:.2f})",
        )
