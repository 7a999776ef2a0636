"""One training step of each candidate through the same call: ours, transformers' Llama, litgpt, a plain torch.nn GPT.

The peers use what torch offers: `F.cross_entropy`, `clip_grad_norm_`, and the fused `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarking.harness import OURS, clock_of, old_objects_set_aside, timed
from benchmarking.machine import is_installed
from benchmarking.peers import litgpt, llama, plain_gpt
from profiling.memory import peak_rss_bytes
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.loop import train_step
from transformerlm.training.optim import AdamW, parameter_groups
from transformerlm.utils.allocator import keep_freed_memory
from transformerlm.utils.device import resolve_device, synchronize
from transformerlm.utils.dtypes import Precision, autocast

LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0

Step = Callable[[], float]
"""Makes one training step and returns its loss."""


@dataclass(frozen=True)
class TrainCase:
    """What all candidates train: the sizes of `TransformerLM.hparams()`, one batch, and the device.

    With `threads` None, torch chooses their number; `backend` is that of `torch.compile`.
    """

    hparams: dict[str, Any]
    batch_size: int
    device: str = "cpu"
    threads: int | None = None
    clock: str = "wall"
    backend: str = "inductor"


# Peer -> the library that it needs, by the name that pip knows.
LIBRARIES = {"huggingface": "transformers", "litgpt": "litgpt"}
_WHY_NOT = {"huggingface": llama.why_not, "litgpt": litgpt.why_not, "nanogpt_style": plain_gpt.why_not}


def is_available(peer: str) -> bool:
    """Return whether a peer's library is installed."""
    return peer not in LIBRARIES or is_installed(LIBRARIES[peer])


def why_not(peer: str, hparams: Mapping[str, Any]) -> str | None:
    """Return a choice of our model with which a peer would make other steps, such as `ffn = 'silu'`, or None."""
    return llama.other_choice(hparams, {"activation_checkpointing": False}) or _WHY_NOT[peer](hparams)


def load_library(candidate: str, hparams: Mapping[str, Any]) -> None:
    """Import what a candidate's model is made of: no first step pays for that, and ours has been imported here."""
    if candidate == "huggingface":
        llama.load_library(hparams)
    elif candidate == "litgpt":
        import_module("litgpt.model")


def make_step(case: TrainCase, candidate: str, *, precision: Precision, compiled: bool) -> Step:
    """Build a candidate's model and optimizer, and return its training step on one batch of random ids."""
    device = resolve_device(case.device)
    torch.manual_seed(0)
    shape = (case.batch_size, case.hparams["context_length"])
    inputs, targets = (torch.randint(case.hparams["vocab_size"], shape, device=device) for _ in range(2))
    model = _build(candidate, case.hparams).to(device)
    groups = parameter_groups(model, weight_decay=WEIGHT_DECAY)
    context = partial(autocast, device, precision)
    if candidate == OURS:
        forward = torch.compile(model, backend=case.backend) if compiled else model
        optimizer = AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
        settings: dict[str, Any] = {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
        batches = [(inputs, targets)]
        return lambda: train_step(cast(TransformerLM, forward), optimizer, batches, autocast=context, **settings).loss
    fused = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=device.type != "mps")
    arguments = {"use_cache": False} if candidate == "huggingface" else {}

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        output = model(inputs, **arguments)
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    # With the loss, which nanoGPT's model and transformers' compute within, too.
    forward = torch.compile(loss_of, backend=case.backend) if compiled else loss_of
    return partial(_torch_step, forward, model, fused, (inputs, targets), context)


class TrainingSteps:
    """A candidate's steps, in a process of its own that is set up as its users have it.

    With `default_allocator`, ours leaves the C library's allocator as it is, like the others.
    """

    def __init__(
        self,
        case: TrainCase,
        candidate: str,
        precision: Precision,
        compiled: bool,
        *,
        default_allocator: bool = False,
    ) -> None:
        if case.threads:
            torch.set_num_threads(case.threads)
        self._device = resolve_device(case.device)
        self._load = partial(load_library, candidate, case.hparams)
        self._make = partial(make_step, case, candidate, precision=precision, compiled=compiled)
        clock = clock_of(case.clock, threads=torch.get_num_threads(), device=self._device.type)
        self._timed = partial(timed, synchronize=partial(synchronize, self._device), clock=clock)
        self._keeps_memory = candidate == OURS and not default_allocator and keep_freed_memory(self._device)

    def keeps_memory(self) -> bool:
        """Return whether the C library's allocator has our settings here."""
        return self._keeps_memory

    def first(self) -> tuple[float, int | None]:
        """Build everything and make a step; return the seconds that took, and the peak memory in bytes where known.

        The seconds are elapsed ones, whatever the clock of the case is: compilers work in other processes.
        """

        def start() -> None:
            self._step = self._make()
            self._step()

        self._load()
        seconds = timed(start, synchronize=partial(synchronize, self._device))
        self._step()  # the optimizer's states exist now, so this one has the peak
        on_gpu = self._device.type == "cuda"
        return seconds, torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_rss_bytes()

    def seconds(self, count: int) -> float:
        """Return the seconds that `count` more steps take."""
        with old_objects_set_aside():
            return self._timed(lambda: [self._step() for _ in range(count)])


def _build(candidate: str, hparams: dict[str, Any]) -> nn.Module:
    if candidate == OURS:
        return TransformerLM(**hparams)
    if candidate == "huggingface":
        return llama.build_llama(hparams).train()
    if candidate == "litgpt":
        return litgpt.build_litgpt(hparams)
    sizes = ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff")
    return plain_gpt.PlainGPT(**{name: hparams[name] for name in sizes})


def _torch_step(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    context: Callable[[], Any],
) -> float:
    optimizer.zero_grad(set_to_none=True)
    with context():
        loss = loss_of(*batch)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return loss.item()
