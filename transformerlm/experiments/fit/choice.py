"""Which settings suit a text, a machine and a time: a few rules with named numbers, and a reason for each choice.

`choose_bytes`, `choose_vocab_size` and `choose_valid_fraction` come before the text is encoded. `choose` makes the
settings of the run, and `keep_time` sets its length anew once its own steps have been timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformerlm.models.estimates import count_parameters, flops_per_token
from transformerlm.models.settings import ModelSettings

# --- the numbers -------------------------------------------------------------------------------------------------

# d_model, num_layers, num_heads, in ascending order; one of them is timed.
SIZES = ((96, 3, 4), (128, 3, 4), (192, 3, 4), (256, 3, 4), (256, 4, 4), (384, 6, 6), (512, 8, 8), (768, 12, 12))
TIMED = 3
# A size is worth its time if this many tokens are left for each of its parameters (docs/LOG.md).
TOKENS_PER_PARAMETER = 0.15
CONTEXT_LENGTH, MIN_CONTEXT_LENGTH = 512, 16
MIN_TRAIN_WINDOWS, MIN_VALID_WINDOWS = 50, 2  # of the context
BATCH_SIZE = 4
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 512, 4096
BYTES_PER_TOKEN_OF_VOCAB = 200
VALID_FRACTION = 0.05
LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.1
VALIDATION_SHARE = 0.08  # of the time, for all validations together
NUM_VALIDATIONS = 10
NUM_SAMPLES = 6
NUM_LOG_LINES = 100
VALIDATIONS_PER_CHECKPOINT = 3
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 2**10, 2**15
# The time ends the run and its schedule; the number of steps is a little more than should fit.
STEPS_MARGIN = 1.15
CALIBRATION_STEPS = 6
MIN_PROBE_STEPS = 4
BYTES_PER_TOKEN = 3.0  # before there is a tokenizer; a guess on the small side
SPARE_TEXT = 2.0  # so many times what the fastest size could read is worth encoding
MIN_BYTES = 1_000_000  # a text of this size is never cut
WORTH_CUTTING = 1.5  # a text that is not so many times as long as what is wanted is taken whole


# --- what is known and what is chosen ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A setting's value, and in a sentence why."""

    value: Any
    why: str


@dataclass(frozen=True)
class Text:
    """What is known of an encoded text; `gzip_bits_per_byte` is that of its validation part."""

    num_bytes: int
    train_tokens: int
    valid_tokens: int
    valid_bytes: int
    vocab_size: int
    gzip_bits_per_byte: float


@dataclass(frozen=True)
class Speed:
    """The speed measured with a model whose tokens cost `flops_per_token`."""

    flops_per_token: float
    seconds_per_token: float
    seconds_per_validation_token: float

    def tokens_in(self, seconds: float, flops: float) -> float:
        """Return how many tokens of `flops` each fit into a time of training."""
        return seconds / (self.seconds_per_token * flops / self.flops_per_token)


@dataclass(frozen=True)
class Plan:
    """The settings of a run by their dotted keys, and what follows from them.

    `steps` should fit into the time, those between which it validates included; `probe_steps` is the length of the
    short run before it. `seconds_per_step` is what was measured, or follows from another size.
    """

    settings: Mapping[str, Chosen]
    steps: int
    probe_steps: int
    parameters: int
    tokens_per_step: int
    train_tokens: int
    seconds_per_step: float

    @property
    def values(self) -> dict[str, Any]:
        """The settings without their reasons."""
        return {key: chosen.value for key, chosen in self.settings.items()}

    @property
    def passes(self) -> float:
        """How often the run reads the training text."""
        return self.steps * self.tokens_per_step / self.train_tokens


# --- before the text is encoded ----------------------------------------------------------------------------------


def timed_settings(num_bytes: int, seconds: float) -> dict[str, Any]:
    """Return the settings of the model whose steps are timed, by dotted keys of transformerlm-plan."""
    vocab_size = choose_vocab_size(num_bytes, seconds).value
    context_length = _context_length(num_bytes / BYTES_PER_TOKEN, VALID_FRACTION * num_bytes / BYTES_PER_TOKEN)
    return {
        "calibration_steps": CALIBRATION_STEPS,
        "model.vocab_size": vocab_size,
        "model.context_length": context_length,
        **_shape_keys(SIZES[TIMED]),
        "training.batch_size": BATCH_SIZE,
        "training.eval_tokens": MAX_EVAL_TOKENS,
    }


def choose_bytes(num_bytes: int, speed: Speed, seconds: float) -> Chosen:
    """Return how much of a text is worth encoding: what no run in this time could read is not."""
    sizes = {"vocab_size": choose_vocab_size(num_bytes, seconds).value, "context_length": CONTEXT_LENGTH}
    smallest, _ = _costs(SIZES[0], **sizes)
    readable = BYTES_PER_TOKEN * speed.tokens_in(seconds, smallest)
    wanted = max(MIN_BYTES, round(SPARE_TEXT * readable))
    if num_bytes <= WORTH_CUTTING * wanted:
        return Chosen(num_bytes, "all of the text")
    return Chosen(
        wanted,
        f"{wanted / 1e6:.3g} of {num_bytes / 1e6:.3g} MB, whole documents, evenly spread over the text: in "
        f"{seconds:.0f} s the smallest model would read {readable / 1e6:.3g} MB on this machine",
    )


def choose_vocab_size(num_bytes: int, seconds: float) -> Chosen:
    """Return the number of tokens to learn."""
    value = max(MIN_VOCAB_SIZE, min(MAX_VOCAB_SIZE, num_bytes // BYTES_PER_TOKEN_OF_VOCAB))
    return Chosen(value, f"{num_bytes / 1e6:.3g} MB of text: about {num_bytes / value:,.0f} bytes for each token")


def choose_valid_fraction(num_bytes: int) -> Chosen:
    """Return the share of the documents that is kept for validation."""
    return Chosen(VALID_FRACTION, f"{VALID_FRACTION:.0%} of {num_bytes / 1e6:.3g} MB measures the model, unseen by it")


# --- the run -----------------------------------------------------------------------------------------------------


def choose(text: Text, speed: Speed, *, seconds: float, probe_seconds: float) -> Plan:
    """Return the settings of a run of `seconds`, before which a short one takes `probe_seconds` at most."""
    context_length = _context_length(text.train_tokens, text.valid_tokens)
    sizes = {"vocab_size": text.vocab_size, "context_length": context_length}
    shape = _largest_shape(speed, seconds, sizes=sizes)
    flops, parameters = _costs(shape, **sizes)
    tokens_per_step = BATCH_SIZE * context_length
    step_seconds = tokens_per_step / speed.tokens_in(1.0, flops)
    steps = max(2, round((1 - VALIDATION_SHARE) * seconds / step_seconds))
    validation_token = speed.seconds_per_validation_token * flops / speed.flops_per_token
    eval_tokens = _eval_tokens(VALIDATION_SHARE * seconds / validation_token)
    probe_steps = round((probe_seconds - eval_tokens * validation_token) / step_seconds)
    plan = Plan(
        settings={
            "model.vocab_size": Chosen(text.vocab_size, "what the tokenizer has"),
            "model.context_length": _why_context(context_length, text),
            **{key: Chosen(value, "") for key, value in _shape_keys(shape).items()},
            **_fixed(),
            "training.batch_size": Chosen(BATCH_SIZE, f"{tokens_per_step:,} tokens a step"),
            "optimizer.learning_rate": Chosen(LEARNING_RATE, "suits Muon at these sizes"),
            "optimizer.weight_decay": Chosen(WEIGHT_DECAY, "of the matrices"),
            "training.eval_tokens": Chosen(eval_tokens, f"of the {text.valid_tokens:,} tokens kept for validation"),
        },
        steps=steps,
        probe_steps=max(1, min(steps // 2, max(MIN_PROBE_STEPS, probe_steps))),
        parameters=parameters,
        tokens_per_step=tokens_per_step,
        train_tokens=text.train_tokens,
        seconds_per_step=step_seconds,
    )
    affordable = VALIDATION_SHARE * seconds / (eval_tokens * validation_token)
    num_validations = max(1, min(NUM_VALIDATIONS, int(affordable)))
    return _with_length(plan, steps, seconds=seconds, num_validations=num_validations)


def keep_time(plan: Plan, *, seconds_per_step: float, seconds: float) -> Plan:
    """Return the plan with the steps that fit into `seconds`, now that its own steps have been timed."""
    steps = max(2, round((1 - VALIDATION_SHARE) * seconds / seconds_per_step))
    num_validations = max(1, round(plan.steps / plan.settings["training.eval_interval"].value))
    plan = replace(plan, seconds_per_step=seconds_per_step)
    return _with_length(plan, steps, seconds=seconds, num_validations=num_validations)


# --- the rules ---------------------------------------------------------------------------------------------------


def _context_length(train_tokens: float, valid_tokens: float) -> int:
    """Return the largest power of two of which both parts of the text hold enough windows."""
    longest = int(min(train_tokens / MIN_TRAIN_WINDOWS, valid_tokens / MIN_VALID_WINDOWS))
    return min(CONTEXT_LENGTH, max(MIN_CONTEXT_LENGTH, 1 << max(0, longest.bit_length() - 1)))


def _why_context(context_length: int, text: Text) -> Chosen:
    windows = f"{text.train_tokens // context_length:,} windows of the {text.train_tokens:,} training tokens"
    is_longest = context_length == CONTEXT_LENGTH
    return Chosen(context_length, f"the longest used here; {windows}" if is_longest else f"short, for {windows}")


def _largest_shape(speed: Speed, seconds: float, *, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the largest of `SIZES` that sees enough tokens in the time, or the smallest."""
    found = SIZES[0]
    for shape in SIZES[1:]:
        flops, parameters = _costs(shape, **sizes)
        if speed.tokens_in((1 - VALIDATION_SHARE) * seconds, flops) >= TOKENS_PER_PARAMETER * parameters:
            found = shape
    return found


def _why_shape(plan: Plan, steps: int, seconds: float) -> dict[str, Chosen]:
    tokens = steps * plan.tokens_per_step
    why = (
        f"{plan.parameters / 1e6:.2g} million parameters: of {len(SIZES)} sizes the largest that sees "
        f"{TOKENS_PER_PARAMETER:g} tokens for each of them, or the smallest; in {seconds:.0f} s it sees "
        f"{tokens / 1e6:.3g} million tokens on this machine"
    )
    return {key: Chosen(plan.settings[key].value, why) for key in _shape_keys(SIZES[0])}


def _eval_tokens(affordable: float) -> int:
    return round(max(MIN_EVAL_TOKENS, min(MAX_EVAL_TOKENS, affordable / NUM_VALIDATIONS)))


def _with_length(plan: Plan, steps: int, *, seconds: float, num_validations: int) -> Plan:
    """Return the plan with `steps`, and with all settings and reasons that count in steps or seconds."""
    eval_interval = math.ceil(steps / num_validations)
    why = f"{num_validations} validation{'s' * (num_validations > 1)} in {steps:,} steps"
    counted = {
        "training.max_steps": Chosen(
            round(STEPS_MARGIN * steps), f"{STEPS_MARGIN:g} times the {steps:,} that should fit: the time ends the run"
        ),
        "training.log_interval": Chosen(max(1, steps // NUM_LOG_LINES), f"about {NUM_LOG_LINES} lines"),
        "training.eval_interval": Chosen(eval_interval, why),
        "checkpoint.interval": Chosen(
            VALIDATIONS_PER_CHECKPOINT * eval_interval, f"after every {VALIDATIONS_PER_CHECKPOINT} validations"
        ),
        "samples.interval": Chosen(max(1, steps // NUM_SAMPLES), f"about {NUM_SAMPLES} samples"),
    }
    return replace(plan, steps=steps, settings={**plan.settings, **_why_shape(plan, steps, seconds), **counted})


def _fixed() -> dict[str, Chosen]:
    """Return what is the same for all texts."""
    recipe = "of the recipe fast.toml (docs/ablations.md)"
    return {
        "model.qk_norm": Chosen(True, recipe),
        "model.zero_init_outputs": Chosen(True, recipe),
        "optimizer.name": Chosen("muon", recipe),
        "optimizer.momentum": Chosen(0.9, recipe),
        "schedule.name": Chosen("wsd", "a short warm-up, then straight down to zero where the run ends"),
        "schedule.warmup_steps": Chosen("3.33%", "of the run, then straight down to zero"),
        "schedule.decay_steps": Chosen("96.67%", "of the run, then straight down to zero"),
    }


def _shape_keys(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("model.d_model", "model.num_layers", "model.num_heads"), shape, strict=True))


def _costs(shape: tuple[int, int, int], *, vocab_size: int, context_length: int) -> tuple[int, int]:
    """Return the FLOPs of a token in training, and the number of parameters."""
    d_model, num_layers, num_heads = shape
    model = ModelSettings(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        qk_norm=True,
    )
    return flops_per_token(model, context_length), count_parameters(model)
