"""Text in, text out: a model and its tokenizer together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self, TypedDict, Unpack

import torch

from transformerlm.checkpoints.directory import resolve_verified
from transformerlm.checkpoints.document_ids import DocumentIds, guess_ids, ids_of_checkpoint
from transformerlm.checkpoints.load import load_model, load_tokenizer
from transformerlm.inference.arguments import check_prompts, generators_of
from transformerlm.inference.generate import PREFIX_BYTES, Batcher, Decoder, stream
from transformerlm.inference.in_order import drawn_ids, texts_in_order
from transformerlm.inference.penalties import Penalties
from transformerlm.inference.requests import Request
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.inference.texts import Pieces, pieces_of
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.device import resolve_device
from transformerlm.utils.dtypes import resolve_precision
from transformerlm.utils.strings import check_are_strings, check_is_no_string, check_is_string


class _Keywords(TypedDict):
    """The settings that every way to generate has, under the names of `SamplingConfig` and `InferSamplingConfig`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_tokens: int
    stop: Sequence[str]
    stop_at_eos: bool


@dataclass(frozen=True)
class _Settings:
    """What a text is asked for: a request without its prompt and generator, and the strings that end it."""

    request: Request
    stop: Sequence[str]


class Predictor:
    """Continues texts with a model and the tokenizer it was trained with.

    Special tokens spelled out in a prompt are plain text unless `allow_special` is given. `document_ids` say which id
    starts a new document, as an empty prompt does, and which ids end a sample with `stop_at_eos`; by default they come
    from `guess_ids`. Raises ValueError when the tokenizer has more ids than the model.

    A model that was loaded generates through a `Decoder`, made at the first text. A model that was given to the
    constructor may still change, as in training, and is used as it is; call `prepare` when it does not change.
    """

    def __init__(self, model: TransformerLM, tokenizer: Tokenizer, document_ids: DocumentIds | None = None) -> None:
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"predictor: the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size of "
                f"{model.vocab_size}; use the tokenizer the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self.document_ids = guess_ids(tokenizer) if document_ids is None else document_ids
        self.checkpoint: Path | None = None
        """The directory of the checkpoint that was loaded."""
        self._decoder: Decoder | None = None
        self._is_fixed, self._int8, self._is_reproducible = False, False, False

    def __repr__(self) -> str:
        dtype = self.model.token_embeddings.weight.dtype
        precision = "int8" if self._int8 else str(dtype).removeprefix("torch.")
        return (
            f"Predictor({self.model.num_parameters():,} parameters, context_length={self.model.context_length}, "
            f"vocab_size={self.model.vocab_size}, {self.tokenizer.vocab_size} tokens, {precision}, {self.model.device})"
        )

    @property
    def eos_token_id(self) -> int | None:
        """The id at which a document ends, the first where there are several."""
        return self.document_ids.eos_token_id

    @property
    def start_id(self) -> int | None:
        """The id before all that the model reads, where it never saw text without one; a long text keeps it."""
        return self.document_ids.start_id if self.document_ids.starts_texts else None

    @classmethod
    def from_checkpoint(
        cls, directory: str | Path, *, device: str = "auto", precision: str = "fp32", reproducible: bool = False
    ) -> Self:
        """Load a checkpoint, or a run directory's newest one, onto `device` in `precision`.

        `precision` is "fp32", "bf16", "auto" or "int8". "bf16" stores the weights in bfloat16: half the memory, and up
        to twice the speed where memory is the limit. "int8" generates with matrices of 8 bits; `model` stays fp32.
        With `reproducible` a prompt and a seed give the same text on a CPU: alone, beside others and from
        `transformerlm-serve`.
        All files but the optimizer's are verified, once. Raises CheckpointError where one is missing or damaged.
        """
        place, int8 = resolve_device(device), precision == "int8"
        dtype = torch.bfloat16 if not int8 and resolve_precision(precision, place) == "bf16" else torch.float32
        path, _ = resolve_verified(Path(directory))
        model, tokenizer = load_model(path, device=place, dtype=dtype, is_verified=True), load_tokenizer(path)
        predictor = cls(model, tokenizer, ids_of_checkpoint(path, tokenizer))
        predictor.checkpoint = path
        predictor._is_fixed, predictor._int8, predictor._is_reproducible = True, int8, reproducible
        return predictor

    def prepare(self) -> None:
        """Prepare a fast copy of the model's weights as they are now; it takes their memory once more, or twice."""
        self._decoder = Decoder(self.model, int8=self._int8, reproducible=self._is_reproducible)

    def batcher(
        self,
        *,
        slots: int,
        prefill_chunk: int = 128,
        prefix_cache_bytes: int = 0,
        max_length: int | None = None,
        reads_first: bool = False,
    ) -> Batcher:
        """Return a batcher of this model, which draws ids of the tokenizer alone; several share the weights.

        `max_length` and `reads_first` are those of `Batcher`.
        """
        decoder = self._prepared() or Decoder(self.model)
        return Batcher(
            decoder,
            slots=slots,
            prefill_chunk=prefill_chunk,
            prefix_cache_bytes=prefix_cache_bytes,
            vocab_size=self.tokenizer.vocab_size,
            max_length=max_length,
            reads_first=reads_first,
        )

    def _prepared(self, *, speculative: bool = False) -> Decoder | None:
        """Return the decoder to generate with, or None for the model itself."""
        if self._decoder is None and self._is_fixed:
            self.prepare()
        if self._decoder is None and speculative:
            return Decoder(self.model)  # for this text alone: the model may change
        return self._decoder

    def stream(
        self,
        prompt: str | list[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        min_tokens: int = 0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        stop_at_eos: bool = True,
        allow_special: bool = False,
        speculative: int = 0,
    ) -> Iterator[str]:
        """Yield the text that follows `prompt`, a text or its ids, in pieces of whole characters, without the prompt.

        The same `seed` gives the same text; None draws from torch's global generator. A prompt longer than the model's
        context keeps its end, with a warning. `speculative` drafts that many tokens a step, at most 64, from the text
        so far. The first string of `stop` that appears ends the text before it; `min_tokens` come before the end token
        may. Raises ValueError for parameters out of range.
        """
        if not (isinstance(prompt, list) and all(type(one) is int for one in prompt)):
            check_is_string(prompt, "prompt")
        settings = self._settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            stop=stop,
            stop_at_eos=stop_at_eos,
        )
        request = replace(settings.request, prompt=self._encode(prompt, allow_special), generator=self._generator(seed))
        return pieces_of(self._ids(request, speculative), Pieces(self.tokenizer.decode_bytes, stop=stop))

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        min_tokens: int = 0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        stop_at_eos: bool = True,
        allow_special: bool = False,
        speculative: int = 0,
    ) -> str:
        """Return `prompt` and its continuation, as `stream` gives it."""
        check_is_string(prompt, "prompt")
        pieces = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            stop=stop,
            seed=seed,
            stop_at_eos=stop_at_eos,
            allow_special=allow_special,
            speculative=speculative,
        )
        return prompt + "".join(pieces)

    def generate_batch(
        self,
        prompt: str,
        *,
        num_samples: int,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        min_tokens: int = 0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        stop_at_eos: bool = True,
        allow_special: bool = False,
    ) -> list[str]:
        """Return `num_samples` texts, each `prompt` and its own continuation, decoded together.

        The texts differ from those of single calls with the same seed.
        """
        check_is_string(prompt, "prompt")
        return self.generate_prompts(
            [prompt] * num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            stop=stop,
            seeds=seed,
            stop_at_eos=stop_at_eos,
            allow_special=allow_special,
        )

    def generate_prompts(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        min_tokens: int = 0,
        stop: Sequence[str] = (),
        seeds: int | Sequence[int] | None = None,
        stop_at_eos: bool = True,
        allow_special: bool = False,
    ) -> list[str]:
        """Return each prompt and its continuation, decoded together.

        With a seed for each prompt, the text is the one that `generate` gives for prompt and seed; a single seed serves
        all prompts together. Raises TypeError for a single str, which `generate` takes.
        """
        check_are_strings(prompts, "prompts")
        generator = [self._seeded(seed) for seed in seeds] if isinstance(seeds, Sequence) else self._generator(seeds)
        settings = self._settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            stop=stop,
            stop_at_eos=stop_at_eos,
        )
        all_ids = check_prompts(
            [self._encode(prompt, allow_special) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            vocab_size=self.model.vocab_size,
        )
        generators = generators_of(generator, len(prompts), self.model.device)
        pairs = zip(all_ids, generators, strict=True)
        longest = max(map(len, all_ids)) + max_new_tokens
        max_length = None if self._is_reproducible else longest  # as in generate_each
        texts = self._texts(pairs, settings, slots=len(prompts), max_length=max_length)
        return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]

    def generate_each(
        self,
        samples: Iterable[tuple[str, int]],
        *,
        slots: int,
        longest_prompt: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        min_tokens: int = 0,
        stop: Sequence[str] = (),
        stop_at_eos: bool = True,
        allow_special: bool = False,
    ) -> Iterator[str]:
        """Yield the continuation of each prompt and seed, in order, `slots` of them decoded together.

        A text that has ended is replaced at once by the next sample, which is asked for only then. The texts are those
        of `generate_prompts` with a seed for each. `longest_prompt` is the greatest number of tokens that a prompt has
        (see `num_tokens`), where the caller knows it: then the slots take no more memory than their texts need.
        """
        settings = self._settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            stop=stop,
            stop_at_eos=stop_at_eos,
        )
        pairs = ((self._encode(prompt, allow_special), self._seeded(seed)) for prompt, seed in samples)
        # A reproducible text must not depend on the cache's shape, which serving makes for whole contexts.
        is_known = longest_prompt is not None and not self._is_reproducible
        max_length = (longest_prompt or 0) + max_new_tokens if is_known else None
        return self._texts(pairs, settings, slots=slots, max_length=max_length)

    def num_tokens(self, prompt: str, *, allow_special: bool = False) -> int:
        """Return how many tokens the model reads of a prompt, with the one that starts it: at most its context."""
        return min(max(1, len(self._ids_of(prompt, allow_special))), self.model.context_length)

    def _settings(self, **keywords: Unpack[_Keywords]) -> _Settings:
        check_is_no_string(keywords["stop"], "stop")
        request = Request(
            request_id="",
            prompt=[],
            max_new_tokens=keywords["max_new_tokens"],
            sampling=SamplingParams(
                temperature=keywords["temperature"],
                top_k=keywords["top_k"],
                top_p=keywords["top_p"],
                min_p=keywords["min_p"],
            ),
            penalties=Penalties(
                presence=keywords["presence_penalty"],
                frequency=keywords["frequency_penalty"],
                repetition=keywords["repetition_penalty"],
            ),
            ends=frozenset(self.document_ids.eos_token_ids if keywords["stop_at_eos"] else ()),
            min_tokens=keywords["min_tokens"],
            start_id=self.start_id,
        )
        return _Settings(request, keywords["stop"])

    def _ids(self, request: Request, speculative: int) -> Iterator[int]:
        """Yield the ids of one text as they are drawn."""
        if self._is_reproducible and not speculative:
            return drawn_ids(self.batcher(slots=1), request)
        decoder = self._prepared(speculative=speculative > 0)
        start = partial(stream, self.model) if decoder is None else partial(stream, decoder)
        return start(
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.sampling.temperature,
            top_k=request.sampling.top_k,
            top_p=request.sampling.top_p,
            min_p=request.sampling.min_p,
            eos_token_id=request.ends,
            vocab_size=self.tokenizer.vocab_size,
            generator=request.generator,
            speculative=speculative,
            penalties=request.penalties,
            min_tokens=request.min_tokens,
            start_id=request.start_id,
        )

    def _texts(
        self,
        samples: Iterable[tuple[list[int], torch.Generator | None]],
        settings: _Settings,
        *,
        slots: int,
        max_length: int | None = None,
    ) -> Iterator[str]:
        """Yield the text of each prompt's ids and generator, in order."""
        requests = (
            replace(settings.request, request_id=str(number), prompt=ids, generator=generator)
            for number, (ids, generator) in enumerate(samples)
        )
        make_pieces = partial(Pieces, self.tokenizer.decode_bytes, stop=settings.stop)
        if not isinstance(self.model, TransformerLM):  # a model of another make, which no Decoder knows
            return ("".join(pieces_of(self._ids(request, 0), make_pieces())) for request in requests)
        batcher = self.batcher(slots=slots, prefix_cache_bytes=PREFIX_BYTES, max_length=max_length, reads_first=True)
        return texts_in_order(batcher, requests, most=slots, make_pieces=make_pieces)

    def _encode(self, prompt: str | list[int], allow_special: bool) -> list[int]:
        """Return the ids that a prompt is to the model, with a warning where it cannot read them all."""
        ids = prompt if isinstance(prompt, list) else self._ids_of(prompt, allow_special)
        context_length = self.model.context_length
        if not ids:
            if self.document_ids.start_id is None:
                raise ValueError("predictor: the prompt is empty, and no token is known at which a document starts")
            return [self.document_ids.start_id]
        if len(ids) > context_length:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, more than context_length {context_length}; the model reads its end",
                stacklevel=3,
            )
        return ids

    def _ids_of(self, prompt: str, allow_special: bool) -> list[int]:
        """Return a prompt's ids, after the one with which texts start, where they do."""
        ids = self.tokenizer.encode(prompt) if allow_special else self.tokenizer.encode_ordinary(prompt)
        return self.document_ids.started(ids)

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else self._seeded(seed)

    def _seeded(self, seed: int) -> torch.Generator:
        return torch.Generator(self.model.device).manual_seed(seed)
