"""Serving against peers: tokens per second, time to the first token and between tokens, at several numbers of clients.

    python -m benchmarking.bench_serve --config config/resources/bench_serve.toml

The servers, the clients and the predictor that makes one text after the other are processes of their own. A round asks
every candidate for the same texts, one candidate after the other.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.bench_serve")

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.harness import OURS, Quantity, Report, Sample, run_rounds
from benchmarking.machine import describe, is_installed
from benchmarking.serving.servers import Server, llama_command, our_command, started
from cli.terminal import note
from cli.utils import Command
from cli.utils import main as run_command
from config.bench_serve import BenchServeConfig
from config.extras import how_to_install

if TYPE_CHECKING:
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.tokenizer.tokenizer import Tokenizer

TOKENS = Quantity("tokens_per_second")
LATENCIES = ("time_to_first_token_ms", "time_between_tokens_ms")
QUANTITIES = (
    TOKENS,
    *(Quantity(f"{name}.{part}", higher_is_better=False) for name in LATENCIES for part in ("p50", "p99")),
    Quantity("time_between_tokens_p99_over_p50", higher_is_better=False),
    Quantity("cpu_ms_per_token", higher_is_better=False),
    Quantity("client_cpu_ms_per_token", higher_is_better=None),
    Quantity("choice_share_of_step", higher_is_better=None),
    Quantity("retries", higher_is_better=None),
)
_CLOCK_TICK = 0.01  # seconds; the CPU time of a process is told in whole ones, so a short run may have none
_GGUF_DTYPES = {"fp32": "fp32", "bf16": "bf16", "int8": "q8_0"}
_SHORTEST_PROMPT = 8
_LONGEST_OF_A_BURST = 120
_ALONE = 16  # texts of a client that asks alone
_APART = 0.025  # seconds between the beginnings of two clients
_MOST_SEQUENTIAL = 8  # texts one after the other; more have the same speed and take long
_Answers = dict[str, Any]
_SendAll = Callable[[list[dict[str, Any]], int, float], tuple[_Answers, float | None]]
"""From bodies of requests, a number of clients and the seconds between two of their beginnings to what `load.Answers`
holds, and the CPU seconds that it took."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    name = "python -m benchmarking.bench_serve"
    run_command(Command(name, BenchServeConfig, bench_serve, default_config="bench_serve.toml"), argv)


def bench_serve(config: BenchServeConfig) -> None:
    """Measure as the configuration says; JSON lines on stdout, a table on stderr."""
    from transformerlm.checkpoints.directory import resolve
    from transformerlm.checkpoints.load import load_model, load_tokenizer

    checkpoint = resolve(config.checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    context_length, ids = model.context_length, _plain_ids(tokenizer)
    if config.prompt_length + config.max_new_tokens > context_length:
        raise ValueError(
            f"prompt_length + max_new_tokens: expected at most the context_length of {checkpoint}, {context_length}, "
            f"found {config.prompt_length + config.max_new_tokens}"
        )
    environment = describe(threads=config.threads, packages=["starlette", "uvicorn", "xllamacpp"])
    report = Report("serve", environment | {"clock": "wall", "parameters": model.num_parameters()})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gguf = folder / "model.gguf"
        if "llama_cpp" in config.peers and _is_llama_usable(model):
            from transformerlm.interop.gguf import write_model

            write_model(model, tokenizer, gguf, dtype=_GGUF_DTYPES[config.precision], verify=False)  # type: ignore[arg-type]
        del model
        candidates = _candidates(config, checkpoint, gguf, context_length, stack)
        for streams in config.streams:
            _bench_case(config, candidates, report, streams, _Texts(config, ids, None))
        most = max(config.streams)
        if config.mixed:
            _bench_case(config, candidates, report, most, _Texts(config, ids, context_length))
        if config.burst:
            short = _Texts(config, ids, context_length, longest=_LONGEST_OF_A_BURST)
            _bench_case(config, candidates, report, 1, short, count=_ALONE)
            _bench_case(config, candidates, report, most, short, count=most)  # all at the same instant
            several = most * (config.texts_per_stream + 1)
            _bench_case(config, candidates, report, most, short, count=several)
            _bench_case(config, candidates, report, most, short, count=several, apart=_APART)
    note(report.table())


def _plain_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of whole characters, without special tokens: after halves of characters few events would come."""
    special = set(tokenizer.special_tokens)
    texts = {one: tokenizer.decode([one]) for one in range(tokenizer.vocab_size)}
    return [one for one, text in texts.items() if "\ufffd" not in text and text not in special]


def _is_llama_usable(model: TransformerLM) -> bool:
    from benchmarking.peers import llama_cpp as llama_cpp_peer
    from benchmarking.peers.llama import why_not

    choice = why_not(model.hparams())
    reason = f"its Llama has no {choice}" if choice else llama_cpp_peer.why_not(model)
    if reason is None and not (is_installed("xllamacpp") and is_installed("gguf")):
        reason = f"not installed ({how_to_install('serve-test')}, {how_to_install('gguf')})"
    if reason is not None:
        note(f"llama_cpp is skipped: {reason}")
    return reason is None


def _candidates(
    config: BenchServeConfig, checkpoint: Path, gguf: Path, context_length: int, stack: ExitStack
) -> dict[str, _SendAll]:
    """Start all candidates, which end with `stack`; ours is first."""
    from benchmarking.fresh_process import object_in_fresh_process
    from benchmarking.serving import sequential

    slots = max(config.streams)
    settings = {
        "threads": config.threads,
        "device": "cpu",
        "precision": config.precision,
        "engine.slots": slots,
        "engine.reproducible": config.reproducible,
    }
    clients = stack.enter_context(_clients())
    commands = {OURS: our_command(checkpoint, settings)}
    if gguf.exists():
        commands["llama_cpp"] = llama_command(gguf, slots=slots, threads=config.threads, context_length=context_length)
    candidates: dict[str, _SendAll] = {}
    for name, command in commands.items():
        server = stack.enter_context(started(command, gguf.parent, name=name))
        candidates[name] = _of_server(server, clients, tells_steps=name == OURS)
    if "sequential" in config.peers:
        call = stack.enter_context(
            object_in_fresh_process(sequential.build, checkpoint, config.precision, config.threads)
        )

        def one_by_one(requests: list[dict[str, Any]], streams: int, apart: float) -> tuple[_Answers, float | None]:
            answers = call("send_all", requests[:_MOST_SEQUENTIAL])
            return answers, answers["cpu_seconds"]

        candidates["sequential"] = one_by_one
    return candidates


@contextmanager
def _clients() -> Iterator[Callable[[dict[str, Any]], _Answers]]:
    """Give the function that sends an order to the process of the clients, and returns what they saw."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "benchmarking.serving.load"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def send(order: dict[str, Any]) -> _Answers:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            if not (line := stdout.readline()):
                raise ValueError("the clients ended; stderr says why")
            answers: _Answers = json.loads(line)
            return answers

        yield send


def _of_server(server: Server, clients: Callable[[dict[str, Any]], _Answers], *, tells_steps: bool) -> _SendAll:
    """Return the candidate that a server is; ours also tells how its steps' time divides."""

    def send_all(requests: list[dict[str, Any]], streams: int, apart: float) -> tuple[_Answers, float | None]:
        before, metrics = server.cpu_seconds(), server.metrics() if tells_steps else {}
        answers = clients({"url": server.url, "streams": streams, "requests": requests, "apart": apart})
        after = server.cpu_seconds()
        answers["client_cpu_seconds"] = answers["cpu_seconds"]
        if tells_steps:
            answers["share"] = _choice_share(metrics, server.metrics())
        return answers, None if before is None or after is None else max(after - before, _CLOCK_TICK)

    return send_all


def _choice_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return which part of the engine's steps the choice of ids has taken."""
    names = ("transformerlm_choice_seconds_sum", "transformerlm_step_seconds_sum")
    choice, step = (after[name] - before[name] for name in names)
    return choice / step


class _Texts:
    """The bodies of requests, new ones for each round.

    With a `context_length` their lengths are mixed, up to `longest` or nearly the context, and texts are cut to fit.
    """

    def __init__(
        self, config: BenchServeConfig, ids: Sequence[int], context_length: int | None, *, longest: int | None = None
    ) -> None:
        self._config, self._ids, self._context_length = config, ids, context_length
        self.name = "equal" if context_length is None else "mixed"
        if context_length is not None:
            most = context_length - _SHORTEST_PROMPT
            self._longest = most if longest is None else max(_SHORTEST_PROMPT, min(most, longest))
            self.name += "" if longest is None else f" to {longest}"

    def bodies(self, count: int, seed: str) -> list[dict[str, Any]]:
        """Return the bodies of `count` requests."""
        rng, config = random.Random(seed), self._config
        bodies = []
        for number in range(count):
            length, tokens = config.prompt_length, config.max_new_tokens
            if self._context_length is not None:
                length = rng.randint(_SHORTEST_PROMPT, self._longest)
                tokens = min(tokens, self._context_length - length)
            prompt = rng.choices(self._ids, k=length)
            bodies.append(
                {"prompt": prompt, "max_tokens": tokens, "seed": number, "temperature": config.temperature}
                | {"top_p": config.top_p, "stream": True, "stream_options": {"include_usage": True}}
                | {"ignore_eos": True}
            )
        return bodies


def _bench_case(
    config: BenchServeConfig,
    candidates: Mapping[str, _SendAll],
    report: Report,
    streams: int,
    texts: _Texts,
    *,
    count: int | None = None,
    apart: float = 0.0,
) -> None:
    """Measure `count` texts of so many clients, by default `texts_per_stream` of each, begun `apart` seconds apart.

    One text after the other has no use for mixed lengths, so that candidate has a case without.
    """
    note(f"{streams} clients, lengths {texts.name}{f', {1e3 * apart:g} ms apart' if apart else ''}")
    count = streams * config.texts_per_stream if count is None else count
    if texts.name != "equal":
        candidates = {name: send for name, send in candidates.items() if name != "sequential"}
    rounds = dict.fromkeys(candidates, 0)

    def measured(name: str) -> Callable[[], Sample]:
        def measure() -> Sample:
            rounds[name] += 1
            # Prompts that a case before had would be in the prefix cache, and not read.
            bodies = texts.bodies(count, f"{texts.name} {streams} {count} {apart} {rounds[name]}")
            extra: dict[str, Any] = {}
            if name == "llama_cpp":  # else it takes defaults of its own
                extra = {"top_k": 0, "min_p": 0.0}
            elif name == OURS and apart:  # an event for each token, also for one that ends within a character
                extra = {"return_token_ids": True}
            return _sample(*candidates[name]([body | extra for body in bodies], streams, apart))

        return measure

    measure = config.measure
    series = run_rounds({name: measured(name) for name in candidates}, warmup=measure.warmup, repeats=measure.repeats)
    params = {"streams": streams, "lengths": texts.name, "precision": config.precision, "texts": count}
    params |= {"apart_ms": 1e3 * apart} if apart else {}
    params |= {"prompt_length": config.prompt_length, "max_new_tokens": config.max_new_tokens}
    params |= {"temperature": config.temperature, "top_p": config.top_p, "reproducible": config.reproducible}
    for quantity in QUANTITIES:
        report.add(quantity, series, params=params, warmup=measure.warmup)


def _sample(answers: _Answers, cpu_seconds: float | None) -> Sample:
    """Return the quantities of one run."""
    tokens = answers["tokens"]
    sample = {TOKENS.name: tokens / answers["seconds"], "retries": answers["retries"]}
    for name, seconds in zip(LATENCIES, (answers["first"], answers["between"]), strict=True):
        hundredths = statistics.quantiles(seconds * 2, n=100, method="inclusive")  # twice: one text is enough
        sample |= {f"{name}.p50": 1e3 * hundredths[49], f"{name}.p99": 1e3 * hundredths[98]}
    sample["time_between_tokens_p99_over_p50"] = sample[f"{LATENCIES[1]}.p99"] / sample[f"{LATENCIES[1]}.p50"]
    if cpu_seconds is not None:
        sample["cpu_ms_per_token"] = 1e3 * cpu_seconds / tokens
    if "share" in answers:
        sample["choice_share_of_step"] = answers["share"]
    if "client_cpu_seconds" in answers:
        sample["client_cpu_ms_per_token"] = 1e3 * answers["client_cpu_seconds"] / tokens
    return sample
