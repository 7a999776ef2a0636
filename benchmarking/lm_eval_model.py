"""A checkpoint as a model of the lm-evaluation-harness; importing this registers it as `transformerlm`."""

from __future__ import annotations

from functools import partial
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from transformerlm.evaluation.scoring import Windowing, score_continuations
from transformerlm.inference.predictor import Predictor
from transformerlm.utils.dtypes import autocast, resolve_precision

DEFAULT_BATCH_SIZE = 8
DEFAULT_MAX_GEN_TOKS = 256

# A request of the harness: the texts, the ids of the context, and those of the continuation.
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("transformerlm")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests with a model and the tokenizer of its checkpoint.

    Args:
        checkpoint: a run directory (its newest checkpoint), or one checkpoint's directory.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: fp32, or bf16 autocast over fp32 weights, or auto.
        batch_size: sequences scored at once; the harness's "auto" is 8.

    Raises:
        ValueError: there is no such checkpoint or device, or the token that ends its documents is unknown.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str,
        device: str | None = None,
        precision: str = "fp32",
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        **_: Any,  # the harness adds settings of its own, such as max_batch_size
    ) -> None:
        super().__init__()
        self._predictor = Predictor.from_checkpoint(checkpoint, device=device or "auto")
        self._model, self._tokenizer = self._predictor.model, self._predictor.tokenizer
        if self._predictor.eos_token_id is None:
            raise ValueError(f"{checkpoint}: expected a model with a token that ends a document, found one without")
        self._device = self._model.token_embeddings.weight.device
        precision = resolve_precision(precision, self._device)
        self._windowing = Windowing(
            batch_size=int(batch_size) if str(batch_size).isdigit() else DEFAULT_BATCH_SIZE,
            autocast=partial(autocast, self._device, precision),
        )

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        assert self._predictor.eos_token_id is not None
        return self._predictor.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text."""
        assert self._predictor.document_ids.start_id is not None
        return self._predictor.document_ids.start_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the harness's cache of requests."""
        return self._tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """Return the ids of a text, special tokens recognised, after the one before each text of a model that has one.

        With `add_special_tokens` False, none is added.
        """
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else self._predictor.document_ids.started(ids)

    def _loglikelihood_tokens(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """Return for each continuation its log-likelihood in nats, and whether greedy decoding would give it."""
        parts = [(context, continuation) for _, context, continuation in requests]
        return score_continuations(self._model, parts, self._windowing)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-likelihood in nats, read through the windows that the harness prescribes."""
        parts: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)  # the windows begin with the prefix
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._model.context_length, context_len=1)
            parts += [(("", ""), *make_disjoint_window(window)) for window in windows]
            owners += [number] * (len(parts) - len(owners))
        answers = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            answers[number] += likelihood
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return each context's continuation up to one of its stop texts: the greedy one, unless asked to sample."""
        return [self._generate(context, dict(settings)) for context, settings in (one.args for one in requests)]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        pieces = self._predictor.stream(
            context,
            max_new_tokens=int(settings.get("max_gen_toks", DEFAULT_MAX_GEN_TOKS)),
            temperature=temperature,
            top_k=settings.get("top_k") or None,  # 0 is off there
            top_p=float(settings.get("top_p", 1.0)),
            allow_special=True,
        )
        text = ""
        for piece in pieces:
            text += piece
            ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text
