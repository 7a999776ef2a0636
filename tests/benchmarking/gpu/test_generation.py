"""The suite's part about generation: what it compares with what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarking.gpu import generation
from benchmarking.gpu.results import read
from benchmarking.gpu.task import Task
from benchmarking.harness import OURS
from transformerlm.models.transformer import TransformerLM


def tiny_task(folder: Path) -> Task:
    return Task("generation", "cpu", True, folder, folder, seconds=60.0)


@pytest.mark.parametrize("broken", [False, True])
def test_the_ids_are_compared_with_the_models_own(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself generates what decoders are held to, so one that is wrong in all its forms is found."""
    torch.manual_seed(0)
    model = TransformerLM(**generation._TINY)
    if broken:
        right = generation.GENERATE[OURS]
        monkeypatch.setitem(
            generation.GENERATE, OURS, lambda *call: [[63 - token_id for token_id in row] for row in right(*call)]
        )
    generation._check_ids(tiny_task(tmp_path), model)
    assert [line["held"] for line in read(tmp_path)] == [not broken] * 2


def test_a_step_of_a_graph_is_timed_without_its_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each call captures before its second token takes time from the tokens/s of whole calls, and from no step."""
    clock = [0.0]

    def generate(model: SimpleNamespace, prompts: list[list[int]], count: int) -> None:
        clock[0] += 1.0 + (count - 1) * 0.25 + (model.capture_seconds if count > 1 else 0.0)

    def timed(call: Callable[[], None], **_: object) -> float:
        before = clock[0]
        call()
        return clock[0] - before

    monkeypatch.setattr(generation, "timed", timed)
    monkeypatch.setattr(generation, "CopyBandwidth", lambda device: lambda: {"bytes_per_second": 1.0})
    monkeypatch.setitem(generation.GENERATE, OURS, generate)
    captures = {generation.GRAPH: 100.0, generation.EAGER: 0.0}
    models = {
        name: (OURS, SimpleNamespace(vocab_size=7, capture_seconds=seconds)) for name, seconds in captures.items()
    }
    generation._measure(tiny_task(tmp_path), models, 2, 1000)
    graph, eager = (line["cells"] for line in read(tmp_path))
    assert (graph["candidate"], eager["candidate"]) == (generation.GRAPH, generation.EAGER)
    assert graph["step_ms"] == pytest.approx(eager["step_ms"]) == pytest.approx(250.0)
    assert graph["first_token_ms"] == pytest.approx(eager["first_token_ms"]) == pytest.approx(1000.0)
    assert graph["tokens_per_second"] < 0.1 * eager["tokens_per_second"]
