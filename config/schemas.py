"""The sections that several commands share, and the strict base that every section is built on.

This room knows pydantic and the standard library only, so that `--help`, `--print-config` and every error answer at
once. Types and ranges are in the fields. Relations between fields are in a validator of the smallest section that holds
them. The commands check facts of the world: files, devices, sizes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from config.backends import Backends, TrainBackends
from config.paths import MAX_PATH_CHARS, checked_path, is_utf8, not_utf8, to_path, written_name, written_path


class Section(BaseModel):
    """A table of a TOML file that never changes; it refuses unknown keys, wrong types and non-finite numbers."""

    # What checks a section is built when the first one comes: a command uses few of those that it imports.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)

    def is_changed(self, key: str) -> bool:
        """Return whether a key has another value than its default."""
        value, default = getattr(self, key), type(self).model_fields[key].default
        return bool(value != (Path(default) if isinstance(value, Path) and isinstance(default, str) else default))


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected text without NUL bytes")
    return _check_prompt(text)


def _check_prompt(text: str) -> str:
    if not is_utf8(text):
        raise ValueError(not_utf8(text))
    return text


def _check_special_token(text: str) -> str:
    if text.startswith('["') and text.endswith('"]'):
        raise ValueError("expected a token, found a list as one word; on a command line tokens are words: TOKEN TOKEN")
    return text


FilePath = Annotated[
    Path, BeforeValidator(to_path), PlainSerializer(written_path), Field(json_schema_extra={"format": "path"})
]
"""A path, a string in TOML; ~ and $NAME are replaced, and a relative path starts at the working directory."""

Text = Annotated[str, AfterValidator(_check_text)]
Prompt = Annotated[str, AfterValidator(_check_prompt)]
InputName = Annotated[
    str, Field(min_length=1, max_length=MAX_PATH_CHARS), AfterValidator(checked_path), PlainSerializer(written_name)
]
TextField = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_check_text)]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration_seconds(text: str) -> float:
    """Return the seconds in a duration such as `90s`, `2m`, `1.5h` or `3d`.

    Raises:
        ValueError: the text is not a positive number followed by s, m, h or d.
    """
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0 or len(text) > 12:
        raise ValueError(f'expected a duration such as "90s", "2m" or "1.5h", found "{text}"')
    return float(match[1]) * _SECONDS[match[2]]


def _check_duration(text: str) -> str:
    duration_seconds(text)
    return text


Duration = Annotated[str, AfterValidator(_check_duration), Field(json_schema_extra={"format": "duration"})]
"""A length of time with its unit: 90s, 2m, 1.5h, 3d."""

Share = Annotated[
    str, Field(pattern=r"^(100|\d{1,2})(\.\d{1,9})?%$", max_length=13, json_schema_extra={"format": "share"})
]
"""A part of the whole run, in percent: 5%, 2.5%."""


ShareOf = Annotated[
    str,
    Field(
        pattern=r"^[1-9]\d{0,5}/[1-9]\d{0,5}$",
        json_schema_extra={"takes": 'a number and how many there are, such as "3/100"'},
    ),
]


def steps_of(length: int | str, max_steps: int) -> int:
    """Return a number of steps unchanged, and a share such as "5%" as the nearest number of `max_steps`."""
    return length if isinstance(length, int) else round(float(length.removesuffix("%")) / 100 * max_steps)


Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Workers = Annotated[int, Field(ge=0, le=1024)]
PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
# "takes" describes a pattern in words, for --help, errors and the reference.
Device = Annotated[
    str,
    Field(
        pattern=r"^(auto|cpu|mps|cuda(:\d{1,4})?)$",
        description="where to compute; auto: the first available of cuda, mps and cpu",
        json_schema_extra={"takes": "auto, cpu, mps, cuda or cuda:N", "examples": ["auto", "cpu", "mps", "cuda"]},
    ),
]
Precision = Literal["auto", "fp32", "bf16"]
Engine = Literal["auto", "reference", "compiled"]
MAX_ANGLES = 2**27  # a million positions of 128 features; as a table of fp64, half a gigabyte
InvalidUtf8 = Literal["replace", "refuse"]
Pattern = Literal["gpt2", "cl100k", "llama3", "qwen2", "smollm"]
SpecialToken = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_special_token)]
WeightNames = Annotated[list[TextField], Field(max_length=1000)]
"""Patterns of the names of weights or layers, as of a file system: * and ? stand for any characters."""
TextFiles = Annotated[
    list[InputName],
    Field(description="text files, folders or globs: .txt, .jsonl, .parquet, .gz, .zst (another name is read as text)"),
]


class TextInput(Section):
    """The text that a command reads; schemas that inherit it begin with these keys."""

    input: TextFiles = Field(min_length=1)
    text_field: TextField = Field("text", description=".jsonl, .parquet: the field that holds a document's text")
    allow_special: bool = Field(
        False, description=".jsonl, .parquet: read special tokens in a document's text as tokens, not as plain text"
    )
    invalid_utf8: InvalidUtf8 = Field(
        "replace", description="what to do with invalid UTF-8: replace (read as U+FFFD, counted) or refuse"
    )


class ChatStrings(Section):
    """The strings around messages; the defaults are ChatML."""

    system: Prompt = Field("<|im_start|>system\n", max_length=1000, description="before what the system says")
    user: Prompt = Field("<|im_start|>user\n", max_length=1000, description="before what the user says")
    assistant: Prompt = Field(
        "<|im_start|>assistant\n", max_length=1000, description="before what the assistant says, which is learnt"
    )
    end: Prompt = Field(
        "<|im_end|>", min_length=1, max_length=1000, description="after each message; learnt after the assistant's"
    )
    after: Prompt = Field("\n", max_length=1000, description="after that, never learnt")
    special_tokens: list[SpecialToken] = Field(
        ["<|im_start|>", "<|im_end|>"],
        max_length=100,
        description="those of these strings that are special tokens of the tokenizer; []: all are plain text",
    )


class ChatConfig(ChatStrings):
    """Rows of .jsonl are conversations; these strings are around their messages, and the defaults are ChatML."""

    messages_field: TextField = Field("messages", description="the field that holds a row's list of messages")


class RopeScaling(Section):
    """Llama 3.1's scaling of the rotary embedding, for a context longer than that of the first training."""

    factor: float = Field(
        8.0, ge=1, le=1e6, description="what the frequencies of slow pairs are divided by; without this table, none are"
    )
    low_freq_factor: float = Field(
        1.0, gt=0, le=1e6, description="pairs that turn fewer times than this within original_context_length are slow"
    )
    high_freq_factor: float = Field(
        4.0,
        gt=0,
        le=1e6,
        description="pairs that turn more often than this are unchanged; those between get a weighted mean",
    )
    original_context_length: int = Field(
        8192, ge=1, le=2**24, description="context_length of the first training, in tokens"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            found = f"{self.low_freq_factor:g} and {self.high_freq_factor:g}"
            raise ValueError(f"low_freq_factor: expected less than high_freq_factor, found {found}")
        return self


class DropoutConfig(Section):
    """Numbers that training sets to zero by chance, against overfitting (Srivastava et al. 2014); by place."""

    embedding: float = Field(0.0, ge=0, lt=1, description="probability of each number of the embedded tokens")
    attention: float = Field(
        0.0, ge=0, lt=1, description="of each of attention's probabilities, which are then written out, not fused"
    )
    residual: float = Field(
        0.0, ge=0, lt=1, description="of each number that attention or a feed-forward layer adds to the stream"
    )


class ModelConfig(Section):
    """The decoder-only Transformer; each key is a keyword of `transformerlm.models.transformer.TransformerLM`."""

    vocab_size: int = Field(ge=1, le=2**31 - 1, description="number of token ids; at least the tokenizer's")
    context_length: int = Field(ge=1, le=2**24, description="longest sequence, in tokens")
    d_model: int = Field(ge=1, le=2**20, description="width of the residual stream")
    num_layers: int = Field(ge=1, le=4096, description="number of Transformer blocks")
    num_heads: int = Field(ge=1, le=2**16, description="number of query heads; divides d_model, unless d_head is set")
    num_kv_heads: int | None = Field(
        None, ge=1, le=2**16, description="number of key-value heads (grouped queries); none: num_heads"
    )
    d_head: int | None = Field(None, ge=1, le=2**16, description="features of a head; none: d_model / num_heads")
    d_ff: int | None = Field(
        None,
        ge=1,
        le=2**22,
        description="width of the feed-forward layer; none: 8/3 d_model (gated) or 4 d_model (plain)",
    )
    rope_theta: float = Field(10000.0, gt=0, le=1e12, description="base of the rotary embedding's wavelengths")
    rope_scaling: RopeScaling | None = None
    norm_position: Literal["pre", "post", "none"] = Field("pre", description="where RMSNorm is in a block")
    position: Literal["rope", "none"] = Field("rope", description="position encoding; none is NoPE")
    ffn: Literal["swiglu", "silu"] = Field("swiglu", description="feed-forward layer: gated (swiglu) or plain (silu)")
    tie_embeddings: bool = Field(False, description="share the token embedding with the output head")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys, before the rotary embedding")
    attention: Literal["fused", "reference"] = Field(
        "fused", description="PyTorch's fused attention, or the one written out in steps"
    )
    document_mask: bool = Field(
        False,
        description="in training, attention never crosses from one document into another, and positions restart",
    )
    norm_eps: float = Field(1e-5, gt=0, le=1, description="epsilon of RMSNorm")
    activation_checkpointing: bool = Field(
        False, description="recompute each block's activations in the backward pass to save memory"
    )
    logit_soft_cap: float | None = Field(
        None, gt=0, le=1e6, description="bound the logits, cap * tanh(logits / cap) as in Gemma 2; none: unbounded"
    )
    zero_init_outputs: bool = Field(
        False, description="initialise each sub-layer's last matrix (output_proj, w2) to zero"
    )
    dropout: DropoutConfig | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        problems = []
        d_head, name = self.d_head or self.d_model // self.num_heads, "d_head" if self.d_head else "d_model / num_heads"
        if self.d_head is None and self.d_model % self.num_heads:
            problems.append(f"d_model ({self.d_model}) is not divisible by num_heads ({self.num_heads})")
        elif self.position == "rope" and d_head % 2:
            problems.append(f'position = "rope" needs an even head size, found {name} = {d_head}')
        if self.position == "rope" and (angles := self.context_length * d_head) > MAX_ANGLES:
            problems.append(
                f'position = "rope" keeps a table of angles: expected at most {MAX_ANGLES:,}, found context_length * '
                f"{name} = {angles:,}"
            )
        if self.position != "rope" and self.rope_scaling is not None:
            problems.append(f'rope_scaling does nothing with position = "{self.position}"')
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads ({self.num_heads}) is not divisible by num_kv_heads ({self.num_kv_heads})")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class OptimizerConfig(Section):
    """The optimizer; its learning rate is scaled by the schedule."""

    name: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="AdamW; Muon for the blocks' matrices with AdamW for the rest; or SGD with momentum"
    )
    learning_rate: float = Field(1e-3, gt=0, le=1e3, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW, also Muon's: decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW, also Muon's: decay of the second moment")
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW, also Muon's: added to the denominator")
    momentum: float | None = Field(None, ge=0, lt=1, description="Muon (none: 0.95) and SGD (none: 0): momentum")
    weight_decay: float = Field(0.1, ge=0, le=1e3, description="decay of the matrices; vectors are never decayed")
    max_grad_norm: float = Field(1.0, ge=0, le=1e9, description="clip the gradient's L2 norm to this; 0: never clip")

    @model_validator(mode="after")
    def _check_idle_keys(self) -> Self:
        """Refuse keys of another optimizer; `momentum = 0.0` is in all checkpoints of versions before Muon."""
        idle = {"adamw": ("momentum",), "muon": (), "sgd": ("beta1", "beta2", "eps")}[self.name]
        problems = [
            f'{key} = {getattr(self, key)} does nothing with name = "{self.name}"'
            for key in idle
            if self.is_changed(key) and (key, getattr(self, key)) != ("momentum", 0)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ScheduleConfig(Section):
    """The learning rate over the steps: a linear warm-up, then one of three shapes."""

    name: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="cosine decay, warmup-stable-decay, or constant"
    )
    warmup_steps: Count | Share = Field(0, description="linear warm-up: steps, or a share of training.max_steps")
    min_learning_rate: float = Field(
        0.0, ge=0, le=1e3, description="learning rate that the decay would reach one step after the last (cosine, wsd)"
    )
    decay_steps: Count | Share = Field(
        0, description="wsd: linear decay at the end: steps, or a share of training.max_steps"
    )

    def in_steps(self, max_steps: int) -> dict[str, Any]:
        """Return the section with each share as a number of steps, for a run of `max_steps`.

        A decay given as a share has at least one step. Rounding never makes two shares longer than the run.
        """
        warmup, decay = (steps_of(length, max_steps) for length in (self.warmup_steps, self.decay_steps))
        if isinstance(self.decay_steps, str):
            room = max_steps - warmup if isinstance(self.warmup_steps, str) else max_steps
            decay = min(max(1, decay), max(0, room))
        return {**self.model_dump(), "warmup_steps": warmup, "decay_steps": decay}

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.name == "wsd" and not self.decay_steps:
            raise ValueError('name = "wsd" needs decay_steps >= 1, found 0')
        if self.name != "wsd" and self.decay_steps:
            raise ValueError(f'decay_steps = {self.decay_steps} is for name = "wsd", found name = "{self.name}"')
        if self.name == "constant" and self.min_learning_rate:
            raise ValueError(f'min_learning_rate = {self.min_learning_rate} does nothing with name = "constant"')
        shares = [length for length in (self.warmup_steps, self.decay_steps) if isinstance(length, str)]
        if sum(float(share.removesuffix("%")) for share in shares) > 100:
            raise ValueError(
                f"warmup_steps + decay_steps: expected at most 100% of the run, found {' + '.join(shares)}"
            )
        return self


class SamplingConfig(Section):
    """How the next token is chosen from the model's logits."""

    max_new_tokens: int = Field(256, ge=1, le=2**31 - 1, description="most tokens to generate")
    temperature: float = Field(0.8, ge=0, le=100, description="divides the logits; 0 takes the most likely token")
    top_p: Probability = Field(
        0.95,
        description="keep the most likely tokens that together have this probability; 1: all, 0: only the most likely",
    )
    top_k: int | None = Field(
        None, ge=1, le=2**31 - 1, description="keep this many of the most likely tokens; none: all"
    )
    min_p: Probability = Field(
        0.0, description="drop tokens below this fraction of the most likely token's probability"
    )
    stop_at_eos: bool = Field(True, description="stop at the token that ends the model's documents")

    @model_validator(mode="after")
    def _check_top_p(self) -> Self:
        if self.top_p == 0 and self.top_k is not None:
            raise ValueError(
                f"top_p = 0 keeps the most likely token alone, so top_k = {self.top_k} would do nothing: top_p = 1 "
                "keeps all, temperature = 0 takes the most likely token"
            )
        return self


class InferSamplingConfig(SamplingConfig):
    """How the next token is chosen, what it should not repeat, and where a text ends."""

    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from the logit of each token that the text has; not from the prompt's"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from it once for each time that the text has the token"
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="divides the positive logits of the tokens in prompt and text, multiplies the negative ones; "
        "1: changes nothing",
    )
    min_tokens: int = Field(
        0, ge=0, le=2**31 - 1, description="tokens before one may come that ends the model's documents"
    )
    stop: list[Annotated[Prompt, Field(min_length=1, max_length=1000)]] = Field(
        [], max_length=16, description="strings that end a text; what comes from there on is not shown"
    )

    @property
    def is_penalised(self) -> bool:
        """Whether what the text has already changes the next token."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.min_tokens)

    @model_validator(mode="after")
    def _check_min_tokens(self) -> Self:
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_tokens: expected at most max_new_tokens, {self.max_new_tokens}, found {self.min_tokens}"
            )
        if self.min_tokens and not self.stop_at_eos:
            raise ValueError(
                f"min_tokens: expected 0 with stop_at_eos = false, found {self.min_tokens}: no token ends a text there"
            )
        return self


_RUN_NAME = "a name of at most 128 letters, digits, spaces and . _ + = @ -, beginning with a letter or digit"
RunName = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._+=@ -]{0,127})?$", json_schema_extra={"takes": _RUN_NAME})
]


_BACKENDS = (
    "console: JSON lines on stdout, unless that is a terminal; json: JSON lines on stdout always; "
    "wandb: Weights & Biases; noop: nothing"
)
_IN_ANY_CASE = "messages for people go to stderr in any case"


class LoggingConfig(Section):
    """Where numbers go. The commands that have a run directory write files there in any case."""

    backend: Backends = Field("console", validate_default=True, description=f"{_BACKENDS}; {_IN_ANY_CASE}")
    run_name: Annotated[RunName | None, BeforeValidator(lambda name: None if name == "" else name)] = Field(
        None, description="name of the run; none or empty: its start time"
    )
    architecture: Text = Field("TransformerLM", max_length=200, description="free text, stored with the run")
    dataset: Text = Field("", max_length=200, description="free text, stored with the run")


class TrainLoggingConfig(LoggingConfig):
    """Where numbers go, besides the files in the run's directory."""

    # mypy: the wider list is read only, since a section never changes
    backend: TrainBackends = Field(  # type: ignore[assignment]
        "console",
        validate_default=True,
        description=f"{_BACKENDS}; tensorboard: event files in the run's directory; {_IN_ANY_CASE}",
    )
    report: bool = Field(
        False, description="at its end, write report.html into the run's directory, as transformerlm-runs report does"
    )


class WandbConfig(Section):
    """Weights & Biases; read only when logging.backend names "wandb"."""

    entity: Text | None = Field(None, min_length=1, max_length=200, description="account or team; none: your default")
    project: Text = Field("transformerlm", min_length=1, max_length=128, description="project")
    log_artifacts: bool = Field(True, description="upload checkpoints and tokenizer files as artifacts")
    log_outputs: bool = Field(False, description="upload inference outputs as an artifact")


class ClusterConfig(Section):
    """Who works on the text: this machine, a Ray cluster, or several processes that see the same folders."""

    on: Literal["local", "ray", "share"] = Field(
        "local",
        description="local: this machine; ray: a Ray cluster, or Ray on this machine; share: this process does its "
        "share, as one of a job array",
    )
    address: Text = Field(
        "auto",
        min_length=1,
        max_length=200,
        description="ray: the cluster's address; local: Ray on this machine alone; auto: the cluster of this machine, "
        "else local",
    )
    share: ShareOf | None = Field(
        None,
        description="share: which share this process does, and of how many; none: as SLURM's variables of a job array, "
        "else of srun, say",
    )
    part_mb: int = Field(
        256, ge=1, le=1_000_000, description="size of a part in MB of text on disk; a killed process costs a part"
    )

    @model_validator(mode="after")
    def _check_idle_keys(self) -> Self:
        problems = [
            f'{key} = "{getattr(self, key)}" does nothing with on = "{self.on}"'
            for key, user in (("address", "ray"), ("share", "share"))
            if self.is_changed(key) and self.on != user
        ]
        if self.share is not None:
            place, num_shares = map(int, self.share.split("/"))
            if place > num_shares:
                problems.append(
                    f"share: expected one of 1/{num_shares} to {num_shares}/{num_shares}, found {self.share}"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self
