"""One text after the other by `transformerlm-infer`'s predictor, without a server, as a candidate of the benchmark."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any


class Sequential:
    """Lives in a process of its own (`fresh_process`), with its own number of threads."""

    def __init__(self, checkpoint: Path, *, precision: str, threads: int) -> None:
        import torch

        from transformerlm.inference.predictor import Predictor

        torch.set_num_threads(threads)
        self._predictor = Predictor.from_checkpoint(checkpoint, device="cpu", precision=precision)
        self._predictor.prepare()

    def send_all(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Make the texts of requests for completions; return what `load.Answers` holds.

        Time to the first token counts from the beginning of each text, not of all.
        """
        answers: dict[str, Any] = {"tokens": 0, "first": [], "between": [], "retries": 0}
        began, cpu = time.perf_counter(), time.process_time()
        for request in requests:
            times = [time.perf_counter(), *self._times(request)]
            seconds = [after - before for before, after in pairwise(times)]
            answers["tokens"] += len(seconds)
            answers["first"] += seconds[:1]
            answers["between"] += seconds[1:]
        return answers | {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}

    def _times(self, request: dict[str, Any]) -> list[float]:
        import torch

        from transformerlm.inference.generate import Decoder, stream

        decoder = self._predictor._decoder
        assert isinstance(decoder, Decoder)
        ids = stream(
            decoder,
            request["prompt"],
            max_new_tokens=request["max_tokens"],
            temperature=request["temperature"],
            top_p=request["top_p"],
            vocab_size=self._predictor.tokenizer.vocab_size,
            generator=torch.Generator().manual_seed(request["seed"]),
        )
        return [time.perf_counter() for _ in ids]


def build(checkpoint: Path, precision: str, threads: int) -> Sequential:
    """Return a `Sequential`; a function of this module, which a new process can import."""
    return Sequential(checkpoint, precision=precision, threads=threads)
