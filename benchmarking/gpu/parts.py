"""The parts of the suite, the most valuable first. Standard library only, so that a plan needs nothing installed.

`seconds` is the expected time of a part on one H100; it is stopped after `limit`, and does not start if less than
`least` is left. All are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

CORE = ("torch", "numpy")
COMMANDS = (*CORE, "pydantic", "tomli_w", "safetensors", "regex")
"""What the commands need; `numba` makes the tokenizer fast."""

PACKAGES = {"tomli_w": "tomli-w"}
"""What pip calls a module, if the names differ."""

BESIDES = {"pydantic": ("pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")}
"""What a wheel needs besides itself when somebody copies it by hand."""


@dataclass(frozen=True)
class Part:
    """One part: `module` has a function `run(task)`, or the one named after a colon, and needs the modules `needs`."""

    name: str
    module: str
    what: str
    seconds: int
    limit: int
    least: int = 20
    needs: tuple[str, ...] = CORE


ENVIRONMENT = Part("environment", "benchmarking.gpu.environment", "card, versions, products, copies", 15, 60, least=5)

PARTS = (
    Part("tests", "benchmarking.gpu.tests", "the tests marked gpu", 100, 180, needs=(*COMMANDS, "pytest")),
    Part("training", "benchmarking.gpu.training", "22.7 M parameters: losses, speed, memory, peers", 100, 160),
    Part("gpt2", "benchmarking.gpu.gpt2", "124 M parameters: speed, utilisation, kernels", 80, 130),
    Part("generation", "benchmarking.gpu.generation", "batches of 1, 8, 64: eager, CUDA graph, peers", 50, 90),
    Part("memory", "benchmarking.gpu.memory", "micro-batch, estimates, recompilation", 45, 80, needs=COMMANDS),
    Part("resume", "benchmarking.gpu.resume", "kill and resume; NVTX; memory history", 45, 90, needs=COMMANDS),
    Part("recipe", "benchmarking.gpu.recipe", "TinyStories' recipe in the time left", 90, 86400, 60, needs=COMMANDS),
)
