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
SIZES = (
    *((64, 2, 2), (96, 3, 3), (128, 3, 4), (160, 3, 4), (192, 3, 4), (192, 4, 4), (256, 3, 4), (256, 4, 4)),
    *((320, 5, 5), (384, 6, 6), (512, 8, 8), (640, 10, 10), (768, 12, 12)),
)
# The first of these is timed, and one more, so that the cost of the others follows: the last, which has more layers,
# where that should take no more than this share of the time.
TIMED = (2, 6, 10)
TIMING_SHARE = 0.02
# A size is worth its time if this many tokens are left for each weight of its matrices, head included (docs/LOG.md).
TOKENS_PER_WEIGHT = 1.4
# Tokens that are read again are worth less: reading a text for ever is worth reading 1 + 15.4 texts of its size once
# (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", equation 5).
REPETITION = 15.4
# Dropout and weight decay up to so many passes over the text (docs/LOG.md). After the last, more time gave nothing.
AGAINST_OVERFITTING = ((4.0, 0.0, 0.1), (5.0, 0.1, 0.2), (12.0, 0.2, 0.5), (math.inf, 0.2, 1.0))
MAX_PASSES = 20.0
CONTEXT_LENGTH, MIN_CONTEXT_LENGTH = 256, 16
MIN_TRAIN_WINDOWS, MIN_VALID_WINDOWS = 50, 2  # of the context
TOKENS_PER_STEP, MIN_STEPS_PER_PASS = 2048, 50
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 512, 4096
BYTES_PER_TOKEN_OF_VOCAB = 500
VALID_FRACTION = 0.05
# Divided by the width: twice the width wants about half the rate (docs/LOG.md; Yang et al. 2022, "Tensor Programs V").
# Smaller steps than `TOKENS_PER_STEP`, of a short text, want a lower one in proportion (Goyal et al. 2017).
LEARNING_RATE_TIMES_WIDTH = 3.0
VALIDATION_SHARE = 0.08  # of the time, for all validations together
NUM_VALIDATIONS = 10
NUM_SAMPLES = 6
NUM_LOG_LINES = 100
VALIDATIONS_PER_CHECKPOINT, SECONDS_PER_CHECKPOINT = 3, 600.0  # whichever comes first
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 2**10, 2**15
# The time ends the run and its schedule; the number of steps is a little more than should fit.
STEPS_MARGIN = 1.15
CALIBRATION_STEPS = 8
MIN_PROBE_STEPS = 4
PROBE_AT_MOST = 1 / 8  # of the steps of the run
BYTES_PER_TOKEN = 3.0  # before there is a tokenizer; a guess on the small side
SPARE_TEXT = 4.0  # so many times what the fastest size could read is worth encoding
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
    """What is known of an encoded text.

    `gzip_bits_per_byte` is that of its validation part, and `share_seen` how much of that the training part has, too.
    """

    num_bytes: int
    train_tokens: int
    valid_tokens: int
    valid_bytes: int
    vocab_size: int
    gzip_bits_per_byte: float
    share_seen: float


@dataclass(frozen=True)
class Speed:
    """The speed measured with a model whose tokens cost `flops_per_token`.

    `overhead` is the part of `seconds_per_token` that a model of any size takes.
    """

    flops_per_token: float
    seconds_per_token: float
    seconds_per_validation_token: float
    overhead: float = 0.0

    def beside(self, smaller: Speed) -> Speed:
        """Return this speed with the overhead that a smaller model shows: time is a line over FLOPs."""
        more = max(1.0, self.flops_per_token - smaller.flops_per_token)
        slope = (self.seconds_per_token - smaller.seconds_per_token) / more
        overhead = self.seconds_per_token - max(0.0, slope) * self.flops_per_token
        return replace(self, overhead=max(0.0, min(overhead, smaller.seconds_per_token)))

    def ratio(self, flops: float) -> float:
        """Return how many times as long a token of `flops` takes."""
        growing = (self.seconds_per_token - self.overhead) * flops / self.flops_per_token
        return (self.overhead + growing) / self.seconds_per_token

    def tokens_in(self, seconds: float, flops: float) -> float:
        """Return how many tokens of `flops` each fit into a time of training."""
        return seconds / (self.seconds_per_token * self.ratio(flops))


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


def gains_by_more_time(passes: float) -> bool:
    """Return whether more steps would make a run better: it does not read the text so often already."""
    return passes < MAX_PASSES - 0.5


# --- before the text is encoded ----------------------------------------------------------------------------------


def timed_settings(num_bytes: int, seconds: float, *, size: int, most_context: int = CONTEXT_LENGTH) -> dict[str, Any]:
    """Return the settings of a model whose steps are timed, one of `TIMED`, by dotted keys of transformerlm-plan."""
    vocab_size, context_length = _first_sizes(num_bytes, seconds, most_context).values()
    return {
        "calibration_steps": CALIBRATION_STEPS,
        "model.vocab_size": vocab_size,
        "model.context_length": context_length,
        **_shape_keys(SIZES[size]),
        "training.batch_size": _batch_size(num_bytes / BYTES_PER_TOKEN, context_length),
        "training.eval_tokens": MAX_EVAL_TOKENS,
    }


def second_timed(num_bytes: int, seconds: float, speed: Speed, *, most_context: int = CONTEXT_LENGTH) -> int:
    """Return which of `SIZES` to time beside the first of `TIMED`, whose speed is known."""
    flops, _ = _costs(SIZES[TIMED[-1]], **_first_sizes(num_bytes, seconds, most_context))
    steps = (CALIBRATION_STEPS + 1) * TOKENS_PER_STEP * speed.seconds_per_token
    expected = speed.ratio(flops) * (steps + MAX_EVAL_TOKENS * speed.seconds_per_validation_token)
    return TIMED[-1] if expected <= TIMING_SHARE * seconds else TIMED[1]


def choose_bytes(num_bytes: int, speed: Speed, seconds: float, *, most_context: int = CONTEXT_LENGTH) -> Chosen:
    """Return how much of a text is worth encoding: what no run in this time could read is not."""
    smallest, _ = _costs(SIZES[0], **_first_sizes(num_bytes, seconds, most_context))
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


def choose(
    text: Text, speed: Speed, *, seconds: float, probe_seconds: float, most_context: int = CONTEXT_LENGTH
) -> Plan:
    """Return the settings of a run of `seconds`, before which a short one takes `probe_seconds` at most."""
    context_length = _context_length(text.train_tokens, text.valid_tokens, most=most_context)
    sizes = {"vocab_size": text.vocab_size, "context_length": context_length}
    shape = _largest_shape(text, speed, (1 - VALIDATION_SHARE) * seconds, sizes=sizes)
    flops, parameters = _costs(shape, **sizes)
    batch_size = _batch_size(text.train_tokens, context_length)
    tokens_per_step = batch_size * context_length
    step_seconds = tokens_per_step / speed.tokens_in(1.0, flops)
    validation_token = speed.seconds_per_validation_token * speed.ratio(flops)
    eval_tokens = _eval_tokens(VALIDATION_SHARE * seconds / validation_token)
    probe_steps = round((probe_seconds - eval_tokens * validation_token) / step_seconds)
    plan = Plan(
        settings={
            "model.vocab_size": Chosen(text.vocab_size, "what the tokenizer has"),
            "model.context_length": _why_context(context_length, text, most=most_context),
            **{key: Chosen(value, "") for key, value in _shape_keys(shape).items()},
            **_fixed(),
            "data.order": Chosen("epoch", "each window once before any is read again"),
            "training.batch_size": Chosen(batch_size, f"{tokens_per_step:,} tokens a step"),
            "optimizer.learning_rate": _learning_rate(shape[0], tokens_per_step),
            "training.eval_tokens": Chosen(eval_tokens, f"of the {text.valid_tokens:,} tokens kept for validation"),
        },
        steps=0,
        probe_steps=probe_steps,
        parameters=parameters,
        tokens_per_step=tokens_per_step,
        train_tokens=text.train_tokens,
        seconds_per_step=step_seconds,
    )
    affordable = VALIDATION_SHARE * seconds / (eval_tokens * validation_token)
    plan = _with_length(plan, seconds=seconds, num_validations=max(1, min(NUM_VALIDATIONS, int(affordable))))
    return replace(
        plan,
        settings={**plan.settings, **_against_overfitting(plan.passes)},
        probe_steps=max(
            1, min(plan.steps // 2, MIN_PROBE_STEPS), min(round(PROBE_AT_MOST * plan.steps), plan.probe_steps)
        ),
    )


def keep_time(plan: Plan, *, seconds_per_step: float, seconds: float) -> Plan:
    """Return the plan with the steps that fit into `seconds`, now that its own steps have been timed."""
    num_validations = max(1, round(plan.steps / plan.settings["training.eval_interval"].value))
    plan = replace(plan, seconds_per_step=seconds_per_step)
    return _with_length(plan, seconds=seconds, num_validations=num_validations)


# --- the rules ---------------------------------------------------------------------------------------------------


def _first_sizes(num_bytes: int, seconds: float, most_context: int) -> dict[str, int]:
    """Return the vocabulary and the context of a text that has not been encoded yet."""
    train_tokens = num_bytes / BYTES_PER_TOKEN
    return {
        "vocab_size": choose_vocab_size(num_bytes, seconds).value,
        "context_length": _context_length(train_tokens, VALID_FRACTION * train_tokens, most=most_context),
    }


def _context_length(train_tokens: float, valid_tokens: float, *, most: int) -> int:
    """Return the largest power of two up to `most` of which both parts of the text hold enough windows."""
    longest = int(min(train_tokens / MIN_TRAIN_WINDOWS, valid_tokens / MIN_VALID_WINDOWS))
    return min(most, max(MIN_CONTEXT_LENGTH, 1 << max(0, longest.bit_length() - 1)))


def _why_context(context_length: int, text: Text, *, most: int) -> Chosen:
    windows = f"{text.train_tokens // context_length:,} windows of the {text.train_tokens:,} training tokens"
    is_longest = context_length == most
    return Chosen(context_length, f"the longest used here; {windows}" if is_longest else f"short, for {windows}")


def _batch_size(train_tokens: float, context_length: int) -> int:
    """Return the number of windows in a step; a short text is still read in some steps."""
    return max(1, int(min(TOKENS_PER_STEP, train_tokens / MIN_STEPS_PER_PASS)) // context_length)


def _largest_shape(text: Text, speed: Speed, seconds: float, *, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the largest of `SIZES` that sees enough tokens in the time, or the smallest."""
    found = SIZES[0]
    for shape in SIZES[1:]:
        flops, _ = _costs(shape, **sizes)
        tokens = min(speed.tokens_in(seconds, flops), MAX_PASSES * text.train_tokens)
        if _worth(tokens, text.train_tokens) >= TOKENS_PER_WEIGHT * _weights(shape, sizes["vocab_size"]):
            found = shape
    return found


def _worth(tokens: float, train_tokens: int) -> float:
    """Return how many new tokens are worth as much as reading a text again and again until `tokens` are read."""
    repeats = max(0.0, tokens / train_tokens - 1)
    return min(tokens, train_tokens) + train_tokens * REPETITION * -math.expm1(-repeats / REPETITION)


def _weights(shape: tuple[int, int, int], vocab_size: int) -> int:
    """Return about how many weights the matrices have that each token goes through: those of blocks and head."""
    d_model, num_layers, _ = shape
    return 12 * num_layers * d_model**2 + vocab_size * d_model


def _learning_rate(width: int, tokens_per_step: int) -> Chosen:
    """Return the learning rate, to two digits."""
    share = tokens_per_step / TOKENS_PER_STEP
    why = f"{LEARNING_RATE_TIMES_WIDTH:g} over the width; a wider model wants a lower one"
    if share < 1:
        why = f"{share:.2g} times {why}, and so do steps of few tokens"
    return Chosen(float(f"{share * LEARNING_RATE_TIMES_WIDTH / width:.2g}"), why)


def _against_overfitting(passes: float) -> dict[str, Chosen]:
    """Return dropout and weight decay for so many passes over the text."""
    place = next(place for place, (most, _, _) in enumerate(AGAINST_OVERFITTING) if passes <= most)
    most, rate, decay = AGAINST_OVERFITTING[place]
    least = AGAINST_OVERFITTING[place - 1][0] if place else 0.0
    number = f"{least:g} to {most:g}" if math.isfinite(most) else f"more than {least:g}"
    why = f"for {number} passes over the text, as first estimated"
    values = {"model.dropout.embedding": rate, "model.dropout.residual": rate, "optimizer.weight_decay": decay}
    return {key: Chosen(value, why) for key, value in values.items()}


def _why_shape(plan: Plan, steps: int, seconds: float) -> dict[str, Chosen]:
    tokens = steps * plan.tokens_per_step
    shape = tuple(plan.settings[key].value for key in _shape_keys(SIZES[0]))
    weights = _weights(shape, plan.settings["model.vocab_size"].value)
    why = (
        f"{plan.parameters / 1e6:.2g} million parameters, {weights / 1e6:.2g} of them in the matrices of blocks and "
        f"head: of {len(SIZES)} sizes the largest for which the first timing promised {TOKENS_PER_WEIGHT:g} tokens for "
        f"each, where those read again count less, or the smallest; in {seconds:.0f} s it sees {tokens / 1e6:.3g} "
        "million tokens on this machine"
    )
    return {key: Chosen(plan.settings[key].value, why) for key in _shape_keys(SIZES[0])}


def _eval_tokens(affordable: float) -> int:
    return round(max(MIN_EVAL_TOKENS, min(MAX_EVAL_TOKENS, affordable / NUM_VALIDATIONS)))


def _with_length(plan: Plan, *, seconds: float, num_validations: int) -> Plan:
    """Return the plan with the steps that fit into the time, and with all settings and reasons that follow."""
    fitting = max(2, round((1 - VALIDATION_SHARE) * seconds / plan.seconds_per_step))
    useful = max(2, round(MAX_PASSES * plan.train_tokens / plan.tokens_per_step))
    steps = min(fitting, useful)
    eval_interval = math.ceil(steps / num_validations)
    checkpoint_steps = max(1, int(SECONDS_PER_CHECKPOINT / plan.seconds_per_step))
    by_validations = VALIDATIONS_PER_CHECKPOINT * eval_interval
    length = f"{STEPS_MARGIN:g} times the {steps:,} that should fit: the time ends the run"
    if useful < fitting:
        length = f"{MAX_PASSES:g} times through the text; the {fitting:,} that would fit make it no better"
    why = f"{num_validations} validation{'s' * (num_validations > 1)} in {steps:,} steps"
    counted = {
        "training.max_steps": Chosen(useful if useful < fitting else round(STEPS_MARGIN * steps), length),
        "training.log_interval": Chosen(max(1, steps // NUM_LOG_LINES), f"about {NUM_LOG_LINES} lines"),
        "training.eval_interval": Chosen(eval_interval, why),
        "checkpoint.interval": Chosen(by_validations, f"after every {VALIDATIONS_PER_CHECKPOINT} validations")
        if by_validations <= checkpoint_steps
        else Chosen(checkpoint_steps, f"about every {SECONDS_PER_CHECKPOINT / 60:g} minutes"),
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
