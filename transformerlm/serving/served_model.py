"""One checkpoint ready to make texts: its decoder, its batcher, and the texts on their way as pieces."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from transformerlm.checkpoints.chat_format import chat_format_of
from transformerlm.checkpoints.directory import resolve_verified
from transformerlm.checkpoints.document_ids import ids_of_checkpoint
from transformerlm.checkpoints.load import load_model, load_tokenizer
from transformerlm.checkpoints.validation import fingerprint
from transformerlm.inference.generate import Batcher, Decoder
from transformerlm.inference.penalties import Penalties
from transformerlm.inference.requests import Drawn, Event, Finished, FinishReason, PromptScored, Request, TokenLogprobs
from transformerlm.inference.sampling import sample
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.inference.texts import Pieces
from transformerlm.serving.engine import Logprobs, ModelFacts, Piece, StepReport, TextRequest
from transformerlm.serving.following import identity
from transformerlm.serving.protocol import Settings
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.device import resolve_device
from transformerlm.utils.dtypes import resolve_precision


@dataclass
class _Text:
    """A text on its way, and what this step has added to it."""

    pieces: Pieces
    num_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None


class ServedModel:
    """Makes the texts of one checkpoint, a step of all of them at a time.

    `path` is what `resolve` takes. The weights are hashed once, and not mapped: a training may remove them meanwhile.
    What the decoder of an `earlier` one found out about this machine is not tested again, if the models are alike.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: it cannot be served as the settings say.
    """

    def __init__(
        self, path: Path, settings: Settings, *, prefix_cache_bytes: int, earlier: ServedModel | None = None
    ) -> None:
        directory, state = resolve_verified(path)
        self._files = identity(directory)
        device, int8 = resolve_device(settings.device), settings.precision == "int8"
        precision = "fp32" if int8 else resolve_precision(settings.precision, device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = load_model(directory, device=device, dtype=dtype, is_verified=True)
        self._tokenizer = _tokenizer_of(directory, model.vocab_size)
        ids, chat = ids_of_checkpoint(directory, self._tokenizer), chat_format_of(directory)
        is_best = state["step"] == state.get("best_step")
        self.facts = ModelFacts(
            path=str(directory.absolute()),
            checkpoint=directory.name,
            step=state["step"],
            val_loss=state.get("best_val_loss" if is_best else "val_loss"),
            fingerprint=fingerprint(state),
            parameters=model.num_parameters(),
            vocab_size=self._tokenizer.vocab_size,
            context_length=model.context_length,
            precision="int8" if int8 else precision,
            device=str(device),
            end_ids=list(ids.eos_token_ids),
            start_id=ids.start_id,
            starts_texts=ids.starts_texts,
            tokenizer_sums={name: one for name, one in state["sha256"].items() if name.startswith("tokenizer/")},
            chat=None if chat is None else chat.to_json(),
        )
        self._device, self._shape = device, model.hparams()
        self._decoder = Decoder(model, int8=int8, reproducible=settings.reproducible)
        if earlier is not None and earlier._shape == self._shape:
            self._decoder.take_findings(earlier._decoder)
        self._batcher = Batcher(
            self._decoder,
            slots=settings.slots,
            prefill_chunk=settings.prefill_chunk,
            prefix_cache_bytes=prefix_cache_bytes,
            vocab_size=self._tokenizer.vocab_size,
        )
        # The loops that draw are compiled at the first draw: here, and not while a first text waits.
        sample(torch.zeros(1, 2), SamplingParams(), [torch.Generator()])
        self._texts: dict[str, _Text] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._batcher.is_idle

    def forget_prefixes(self) -> None:
        """Free the memory for prompts that begin alike: from now on there are few new ones, or none."""
        self._batcher.forget_prefixes()

    def is_replaced(self) -> bool:
        """Return whether the checkpoint's directory holds another one now; one that was removed is not replaced."""
        found = identity(Path(self.facts.path))
        return found is not None and found != self._files

    def start(self, request: TextRequest) -> None:
        """Take a request, of which `step` tells from now on.

        Raises:
            ValueError: the model cannot do what it asks.
        """
        pieces = Pieces(self._tokenizer.decode_bytes, stop=request.stop)
        self._batcher.submit(
            Request(
                request_id=request.request_id,
                prompt=request.prompt,
                max_new_tokens=request.max_tokens,
                sampling=SamplingParams(
                    temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, min_p=request.min_p
                ),
                penalties=Penalties(
                    presence=request.presence_penalty,
                    frequency=request.frequency_penalty,
                    repetition=request.repetition_penalty,
                    logit_bias=request.logit_bias,
                ),
                generator=torch.Generator(self._device).manual_seed(request.seed),
                ends=frozenset() if request.ignore_eos else frozenset([*self.facts.end_ids, *request.end_ids]),
                min_tokens=request.min_tokens,
                num_logprobs=request.num_logprobs,
                num_prompt_logprobs=request.num_prompt_logprobs,
                start_id=self.facts.start_id if self.facts.starts_texts else None,
            )
        )
        self._texts[request.request_id] = _Text(pieces)

    def cancel(self, request_id: str) -> None:
        """End a text at the next step; nothing happens where there is none of this id."""
        if request_id in self._texts:
            self._batcher.cancel(request_id)

    def step(self) -> tuple[list[tuple[str, Piece]], StepReport]:
        """Make one step of all texts; return the pieces that came of it, by request id, and what it took."""
        batcher, began = self._batcher, time.perf_counter()
        read, again, choosing = batcher.num_read, batcher.num_read_again, batcher.choice_seconds
        pieces: list[tuple[str, Piece]] = []
        changed: dict[str, _Text] = {}
        generated = reused = 0
        for event in batcher.step():
            text = self._texts.get(event.request_id)
            if text is None:  # it failed: this is the end of its slot
                continue
            # An end token is drawn, too, and only told as the end.
            generated += isinstance(event, Drawn) or (isinstance(event, Finished) and event.reason == "stop")
            try:
                piece = self._take(event, text)
            except Exception as error:  # of this text: the batcher's step is whole, and no other text is touched
                batcher.cancel(event.request_id)
                piece = failed_piece(error)
            changed[event.request_id] = text
            if piece is not None:
                reused += piece.num_prompt_reused
                pieces.append((event.request_id, piece))
                del self._texts[event.request_id], changed[event.request_id]
        pieces += [(request_id, self._piece(text)) for request_id, text in changed.items()]
        report = StepReport(
            seconds=time.perf_counter() - began,
            choice_seconds=batcher.choice_seconds - choosing,
            prompt_tokens=batcher.num_read - read,
            generated_tokens=generated,
            reused_tokens=reused,
            read_again_tokens=batcher.num_read_again - again,
        )
        return pieces, report

    def _take(self, event: Event, text: _Text) -> Piece | None:
        """Take what became of a text; return its last piece, if this is its end."""
        if isinstance(event, Finished):
            return self._last_piece(text, event)
        if isinstance(event, PromptScored):
            text.prompt_logprobs = event.logprobs
            return None
        text.num_tokens += 1
        text.text += text.pieces.push(event.token_id)
        text.token_ids.append(event.token_id)
        text.logprobs += [] if event.logprobs is None else [event.logprobs]
        if text.pieces.stopped_by is not None:
            self._batcher.cancel(event.request_id)  # the next step tells its end
        return None

    def _last_piece(self, text: _Text, finished: Finished) -> Piece:
        text.text += text.pieces.finish()  # which may complete a stop string
        by_string = text.pieces.stopped_by is not None
        text.num_tokens += finished.reason == "stop"  # the end token, of which nothing was told
        piece = self._piece(text, "stop" if by_string else finished.reason)
        end = None if finished.end is None else _logprobs([finished.end])
        return replace(piece, num_prompt_reused=finished.num_prompt_reused, end=end)

    def _piece(self, text: _Text, finish: FinishReason | Literal[""] = "") -> Piece:
        """Return what a text has gained since its last piece."""
        piece = Piece(
            text=text.text,
            token_ids=text.token_ids,
            logprobs=_logprobs(text.logprobs) if text.logprobs else None,
            prompt_logprobs=None if text.prompt_logprobs is None else _logprobs(text.prompt_logprobs),
            finish=finish,
            stop_string=text.pieces.stopped_by if finish else None,
            num_tokens=text.num_tokens,
            step=self.facts.step,
            fingerprint=self.facts.fingerprint,
        )
        text.text, text.token_ids, text.logprobs, text.prompt_logprobs = "", [], [], None
        return piece


def failed_piece(error: Exception) -> Piece:
    """Return the last piece of a text that an error of ours ends, which the log has whole."""
    traceback.print_exception(error)
    return Piece(finish="error", error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _tokenizer_of(directory: Path, vocab_size: int) -> Tokenizer:
    """Return a checkpoint's tokenizer.

    Raises:
        ValueError: it has none, as a model that was imported without one, or one with more ids than the model.
    """
    if not (directory / "tokenizer").is_dir():
        raise ValueError(
            f"{directory}: expected a tokenizer, found none; import the model again, with tokenizer = true"
        )
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{directory}: expected a tokenizer of at most {vocab_size} ids, as the model has, found "
            f"{tokenizer.vocab_size}"
        )
    return tokenizer


def _logprobs(each: list[TokenLogprobs]) -> Logprobs:
    return Logprobs(
        token_ids=[one.token_id for one in each],
        logprobs=[one.logprob for one in each],
        top=[one.top for one in each],
    )
