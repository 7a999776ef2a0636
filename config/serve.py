"""Schema of `transformerlm-serve`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from config.schemas import ChatStrings, Device, Duration, FilePath, Probability, Section

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*"  # at least two colons, so that no port is taken for a part of it
HostName = Annotated[
    str,
    Field(
        max_length=253,
        pattern=rf"^([A-Za-z0-9._-]+|{_IPV6}|\[{_IPV6}\])$",
        json_schema_extra={"takes": "a host's name or address, without a port"},
    ),
]
Origin = Annotated[
    str,
    Field(
        pattern=r"^https?://[A-Za-z0-9.:\[\]_-]+$",
        max_length=300,
        json_schema_extra={"takes": "an origin such as https://example.org"},
    ),
]
VariableName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$",
        json_schema_extra={"takes": "the name of an environment variable"},
    ),
]
ModelName = Annotated[
    str,
    Field(
        pattern=r"^[^@\x00-\x20\x7f]{1,200}$",
        json_schema_extra={"takes": "a word without @"},
    ),
]


class EngineConfig(Section):
    """How tokens are made."""

    slots: int = Field(16, ge=1, le=1024, description="texts that are generated at the same time; others wait")
    prefill_chunk: int = Field(
        128,
        ge=16,
        le=65536,
        description="most tokens of prompts that are read for each step of the running texts; a power of two",
    )
    prefix_cache_mb: int = Field(
        256, ge=0, le=2**20, description="memory for prompts that begin as earlier ones did, in MB; 0: none"
    )
    reproducible: bool = Field(
        True, description="the same prompt and seed give the same text, whatever else the server does"
    )

    @field_validator("prefill_chunk")
    @classmethod
    def _check_power_of_two(cls, tokens: int) -> int:
        if tokens & (tokens - 1):
            below = 1 << (tokens.bit_length() - 1)
            raise ValueError(f"expected a power of two, found {tokens}; {below} and {2 * below} are the nearest")
        return tokens


class LimitsConfig(Section):
    """What one request, and all of them together, may take."""

    waiting: int = Field(64, ge=0, le=10**6, description="texts that may wait for a slot; then 429")
    waiting_tokens: int = Field(65536, ge=1, le=2**31 - 1, description="prompt tokens that may wait; then 429")
    n: int = Field(16, ge=1, le=1024, description="most choices of one prompt")
    prompts: int = Field(64, ge=1, le=1024, description="most prompts in one request")
    logprobs: int = Field(20, ge=0, le=1000, description="most alternatives with each token")
    max_tokens: int = Field(4096, ge=1, le=2**31 - 1, description="most tokens of one text")
    stop: int = Field(16, ge=0, le=256, description="most stop strings of one request")
    body_mb: int = Field(4, ge=1, le=1024, description="largest request, in MB")
    connections: int = Field(256, ge=1, le=65536, description="connections at the same time")
    overflow: Literal["refuse", "slide"] = Field(
        "refuse",
        description="where prompt and max_tokens exceed the context: refuse, or drop the oldest half of the window",
    )


class TimeoutsConfig(Section):
    """How long things may take."""

    headers: Duration = Field("10s", description="until a request's headers are complete")
    body: Duration = Field("30s", description="until a request's body is complete")
    request: Duration = Field("10m", description="until a text is complete, with its time in the queue")
    write: Duration = Field("30s", description="until a client has taken 16 KiB of what waits for it, or all")
    stalled: Duration = Field("30s", description="without a token while work waits; then the engine is started again")
    drain: Duration = Field("30s", description="for running texts to end, when the server is stopped")


class AccessConfig(Section):
    """Who may ask."""

    key_env: VariableName | None = Field(
        None, description="environment variable that holds the key that every request must bring; none: no key"
    )
    allowed_hosts: list[HostName] = Field(
        ["localhost", "127.0.0.1", "[::1]"],
        min_length=1,
        max_length=100,
        description="names by which the server may be called, at any port, beside host itself",
    )
    allowed_origins: list[Origin] = Field(
        [], max_length=100, description="web pages of other servers that may ask; none: its own page alone"
    )


class FollowConfig(Section):
    """How a run that is training is followed."""

    checkpoint: Literal["none", "newest", "best"] = Field(
        "none", description="take over each new checkpoint of the run, or each new best one"
    )
    interval: Duration = Field("2s", description="time between two looks")


class DefaultsConfig(Section):
    """What a request gets that does not name it; the defaults are those of OpenAI's API."""

    max_tokens: int = Field(16, ge=1, le=2**31 - 1, description="most tokens to generate")
    temperature: float = Field(1.0, ge=0, le=100, description="divides the logits; 0 takes the most likely token")
    top_p: Probability = Field(1.0, description="keep the most likely tokens that together have this probability")
    top_k: int | None = Field(None, ge=1, le=2**31 - 1, description="keep this many of the most likely; none: all")
    min_p: Probability = Field(
        0.0, description="drop tokens below this fraction of the most likely token's probability"
    )


class WebConfig(Section):
    """The page."""

    enabled: bool = Field(True, description="serve the page at /")
    runs_dir: FilePath | None = Field(
        None, description="directory whose runs the page shows; none: the one that the served run is in"
    )


class ServeConfig(Section):
    """Serve a trained model: OpenAI's completions and chat API, and a page to write with it and to watch runs."""

    checkpoint: FilePath = Field(
        description="a run directory RUN (its newest checkpoint), RUN/best, or one checkpoint's directory"
    )
    device: Device = "auto"
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "fp32", description="precision of the weights; auto: bf16 if the hardware has it, else fp32"
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of the engine; none: all cores, or 1 while following a run"
    )
    name: ModelName | None = Field(None, description="the model's name in the API; none: that of the run")
    host: HostName = Field("127.0.0.1", description="address to listen on; another than this machine's own needs a key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    access: AccessConfig = AccessConfig()
    follow: FollowConfig = FollowConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    chat: ChatStrings | None = None
    web: WebConfig = WebConfig()

    @model_validator(mode="after")
    def _needs_a_key(self) -> Self:
        if self.host.strip("[]") not in LOCAL_HOSTS and not self.access.key_env:
            raise ValueError(
                f'host = "{self.host}" lets other machines ask, so it needs a key: access.key_env = "NAME" names the '
                "environment variable that holds it"
            )
        return self

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.defaults.max_tokens > self.limits.max_tokens:
            raise ValueError(
                f"defaults.max_tokens: expected at most limits.max_tokens ({self.limits.max_tokens}), "
                f"found {self.defaults.max_tokens}"
            )
        return self
