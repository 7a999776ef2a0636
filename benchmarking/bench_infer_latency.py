"""Generation against peers: time to the first token, tokens per second, and what memory bandwidth would allow.

    python -m benchmarking.bench_infer_latency --config config/resources/bench_infer.toml

Greedy, with a fixed number of new tokens and no end-of-text, so that all candidates do the same work. Each step of
decoding reads every weight once, hence the bound: bytes of weights over the speed at which memory is read.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.bench_infer_latency")

import copy
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarking.harness import OURS, Clock, Report, clock_of, run_rounds, timed
from benchmarking.machine import describe, is_installed
from cli.terminal import note
from cli.utils import Command
from cli.utils import main as run_command
from config.bench_infer import BenchInferConfig

if TYPE_CHECKING:
    import torch

    from transformerlm.models.transformer import TransformerLM

_LIMIT = "limit"
# What a peer imports, and what installs it.
_NEEDS = {
    "huggingface": {"transformers": "transformers"},
    "llama_cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    name = "python -m benchmarking.bench_infer_latency"
    run_command(Command(name, BenchInferConfig, bench_infer, default_config="bench_infer.toml"), argv)


def bench_infer(config: BenchInferConfig) -> None:
    """Measure as the configuration says; JSON lines on stdout, a table on stderr."""
    import torch

    from benchmarking.peers.inference import weight_bytes
    from transformerlm.utils.device import resolve_device

    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    clock = clock_of(config.measure.clock, threads=torch.get_num_threads(), device=device.type)
    model = _load(config, device)
    peers = [peer for peer in config.peers if _is_usable(peer, model)]
    environment = describe(threads=torch.get_num_threads(), device=str(device), packages=["transformers"])
    report = Report("infer_latency", environment | {"clock": config.measure.clock})
    for precision in config.precision:
        candidates, seconds = _candidates(model, peers, precision, clock)
        same = {"parameters": model.num_parameters(), "prepare_seconds": seconds}
        facts = {name: same | {"weight_bytes_per_step": weight_bytes(model, precision, name)} for name in candidates}
        for batch_size, prompt_length in product(config.batch_size, config.prompt_length):
            note(f"{precision}, batch {batch_size}, prompt of {prompt_length} on {device}")
            params = {"precision": precision, "batch_size": batch_size, "prompt_length": prompt_length}
            chosen = {name: model for name, model in candidates.items() if batch_size == 1 or name != "llama_cpp"}
            _bench_case(config, chosen, params=params, facts=facts, report=report, clock=clock)
    note(report.table())


def _candidates(
    model: TransformerLM, peers: Sequence[str], precision: str, clock: Clock
) -> tuple[dict[str, Any], float]:
    """Return whom to measure, and the seconds it took to prepare our model."""
    import torch

    from benchmarking.peers.inference import llama_of
    from benchmarking.peers.llama_cpp import LlamaCpp
    from benchmarking.peers.nanochat_style import NanochatStyle
    from transformerlm.inference.generate import Decoder

    # Peers of torch have no 8 bits here: they stay in bfloat16.
    cast = copy.deepcopy(model).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    start = clock()
    candidates: dict[str, Any] = {OURS: Decoder(model if precision == "int8" else cast, int8=precision == "int8")}
    seconds = clock() - start
    for peer in peers:
        if peer == "huggingface":
            candidates[peer] = llama_of(cast)
        elif peer == "nanochat_style":
            candidates[peer] = NanochatStyle(cast.state_dict(), cast.hparams())
        else:
            candidates[peer] = LlamaCpp(model, precision=precision, num_threads=torch.get_num_threads())
    return candidates, seconds


def _load(config: BenchInferConfig, device: torch.device) -> TransformerLM:
    """Return the model to measure; raise ValueError when a generation would not fit its context."""
    import torch

    from transformerlm.models.transformer import TransformerLM

    if config.checkpoint is not None:
        from transformerlm.checkpoints.directory import resolve
        from transformerlm.checkpoints.load import load_model

        model = load_model(resolve(config.checkpoint), device=device)
    else:
        assert config.model is not None, "the schema asks for one of both"
        torch.manual_seed(0)
        model = TransformerLM(**config.model.model_dump()).to(device).eval()
    longest = max(config.prompt_length) + config.max_new_tokens
    if longest > model.context_length:
        raise ValueError(
            f"prompt_length + max_new_tokens: expected at most the context_length of {config.checkpoint}, "
            f"{model.context_length}, found {longest}"
        )
    return model


def _is_usable(peer: str, model: TransformerLM) -> bool:
    from benchmarking.peers import llama_cpp as llama_cpp_peer
    from benchmarking.peers.llama import why_not

    choice = why_not(model.hparams())
    reason = f"its Llama has no {choice}" if choice else None
    if peer == "llama_cpp" and reason is None:
        reason = llama_cpp_peer.why_not(model)
    missing = [package for module, package in _NEEDS.get(peer, {}).items() if not is_installed(module)]
    if reason is None and missing:
        reason = f"not installed (pip install {' '.join(missing)})"
    if reason is not None:
        note(f"{peer} is skipped: {reason}")
    return reason is None


def _bench_case(
    config: BenchInferConfig,
    models: dict[str, Any],
    *,
    params: dict[str, Any],
    facts: dict[str, dict[str, Any]],
    report: Report,
    clock: Clock,
) -> None:
    from benchmarking.limits import CopyBandwidth
    from benchmarking.peers.inference import DECODE, FIRST_TOKEN, GENERATE, TOKENS, measure_generation, prompts_of
    from transformerlm.utils.device import synchronize

    ours, batch_size, prompt_length = models[OURS], params["batch_size"], params["prompt_length"]
    device = ours.device
    prompts = prompts_of(ours.vocab_size, batch_size, prompt_length)
    calls = {name: partial(GENERATE[name], model, prompts) for name, model in models.items()}
    timer = partial(timed, synchronize=partial(synchronize, device), clock=clock)
    half = config.max_new_tokens // 2
    # On a GPU each of our calls captures the step.
    between = {OURS: (half, config.max_new_tokens)} if device.type == "cuda" and half > 1 else {}
    runs = {
        name: partial(
            measure_generation, call, batch_size, config.max_new_tokens, timer, step_between=between.get(name)
        )
        for name, call in calls.items()
    }
    series = run_rounds(
        {**runs, _LIMIT: CopyBandwidth(device, clock=clock)},
        warmup=config.measure.warmup,
        repeats=config.measure.repeats,
    )
    bandwidth = series.pop(_LIMIT)["bytes_per_second"]
    expected = calls[OURS](config.max_new_tokens)
    of_candidates: dict[str, dict[str, Any]] = {
        name: _bound(series[name][DECODE.name], bandwidth, facts[name]["weight_bytes_per_step"])
        | facts[name]
        | ({} if name == OURS else {"ids_equal": call(config.max_new_tokens) == expected})
        for name, call in calls.items()
    }
    params = params | {"max_new_tokens": config.max_new_tokens}
    for quantity in (FIRST_TOKEN, TOKENS, DECODE):
        report.add(quantity, series, params=params, warmup=config.measure.warmup, facts=of_candidates)


def _bound(step_ms: list[float], bandwidth: list[float], num_bytes: int) -> dict[str, float]:
    bounds = [1e3 * num_bytes / rate for rate in bandwidth]
    shares = [bound / step for bound, step in zip(bounds, step_ms, strict=True)]
    return {
        "bandwidth_bound_step_ms": statistics.median(bounds),
        "bandwidth_utilisation": statistics.median(shares),
        "copy_gb_per_second": statistics.median(bandwidth) / 1e9,
    }
