"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from transformerlm.serving.engine import EngineStatus, StepReport

PREFIX = "transformerlm"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server; `status` says how the engine does when somebody asks."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StatusMetrics(status))
        self._requests = self._counter("requests", "Texts that ended, by the reason", ("finish",))
        self._rejected = self._counter("requests_rejected", "Requests that were refused, by the reason", ("reason",))
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were read")
        self._generated = self._counter("generated_tokens", "Tokens that were drawn")
        self._reused = self._counter("reused_tokens", "Tokens of prompts that the prefix cache had")
        self._queue = self._histogram("queue_seconds", "From a request to a slot of the engine, of texts that began")
        self._first = self._histogram("time_to_first_token_seconds", "From a request to its first token")
        self._between = self._histogram("inter_token_seconds", "Between two tokens of a text")
        self._request = self._histogram("request_seconds", "From a request to the end of its text")
        self._step = self._histogram("step_seconds", "One step of the engine")
        self._choice = self._histogram("choice_seconds", "Choosing the tokens in one step of the engine")

    def _counter(self, name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, words, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, words: str) -> _Seconds:
        seconds = _Seconds(f"{PREFIX}_{name}", words)
        self.registry.register(seconds)
        return seconds

    def engine_stepped(self, report: StepReport) -> None:
        """Count one step of the engine."""
        self._step.observe(report.seconds)
        self._choice.observe(report.choice_seconds)
        self._generated.inc(report.generated_tokens)
        if report.prompt_tokens:
            self._prompt.inc(report.prompt_tokens)
        if report.reused_tokens:
            self._reused.inc(report.reused_tokens)

    def text_began(self, *, queue_seconds: float) -> None:
        """Count a text that has a slot, for which it waited some seconds."""
        self._queue.observe(queue_seconds)

    def first_token(self, seconds: float) -> None:
        """Count the first token of a text, `seconds` after its request."""
        self._first.observe(seconds)

    def text_went_on(self, seconds: float) -> None:
        """Count a later token of a text, `seconds` after the one before it."""
        self._between.observe(seconds)

    def text_ended(self, finish: str, seconds: float) -> None:
        """Count a text that ended, `seconds` after its request."""
        self._requests.labels(finish).inc()
        self._request.observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused."""
        self._rejected.labels(reason).inc()

    def text(self) -> bytes:
        """Return what /metrics answers."""
        return generate_latest(self.registry)


class _Seconds:
    """A histogram of seconds; several are counted for each token, and prometheus_client's own take longer for that."""

    def __init__(self, name: str, words: str) -> None:
        self._name, self._words = name, words
        self._counts, self._sum = [0] * (len(_SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count one time."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield how many times were at most as long as each bound."""
        bounds = [*map(str, _SECONDS), "+Inf"]
        buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(self._counts), strict=True)]
        yield HistogramMetricFamily(self._name, self._words, buckets=buckets, sum_value=self._sum)


class _StatusMetrics:
    """The numbers that the engine's status holds, read at the moment somebody asks."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers."""
        status = self._status()
        gauges = {
            "requests_running": ("Texts that are being generated", status.running),
            "requests_waiting": ("Texts that wait for a slot", status.waiting),
            "slots": ("Texts that can be generated at the same time", status.slots),
            "slots_used": ("Slots that hold a text", status.running),
            "up": ("Whether the engine makes tokens", int(status.state == "ok")),
        }
        if status.facts is not None:
            gauges["model_step"] = ("Training step of the checkpoint that is served", status.facts.step)
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", words, value=value)
        counters = {
            "reloads": ("Checkpoints that were taken over from the run", status.reloads),
            "engine_restarts": ("Starts of the engine after it died or hung", status.restarts),
        }
        for name, (words, value) in counters.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", words, value=value)
