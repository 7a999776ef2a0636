"""Hand-made models and a tokenizer whose behaviour is known without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer

EOS = "<|endoftext|>"


def note_lengths_of_slots(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Return a list to which each decoder adds the `max_length` of the slots that it makes from now on."""
    lengths: list[int | None] = []
    once = Decoder.make_slots

    def make_slots(decoder: Decoder, num_slots: int, max_length: int | None = None) -> DecoderCache:
        lengths.append(max_length)
        return once(decoder, num_slots, max_length)

    monkeypatch.setattr(Decoder, "make_slots", make_slots)
    return lengths


def make_model(**changes: Any) -> TransformerLM:
    sizes = {"vocab_size": 257, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4, **changes}
    return TransformerLM(**sizes).eval()


def make_tokenizer(special_tokens: list[str] | None = None) -> Tokenizer:
    """A tokenizer of the 256 bytes, ids by value, and `<|endoftext|>` with id 256."""
    special_tokens = [EOS] if special_tokens is None else special_tokens
    return Tokenizer({i: bytes([i]) for i in range(256)}, [], special_tokens)


def greedy_without_cache(
    model: TransformerLM, prompt: list[int], max_new_tokens: int, start_id: int | None = None
) -> list[int]:
    """The documented window in its plainest form: a full forward pass for each token."""
    context, half, ids = model.context_length, max(1, model.context_length // 2), list(prompt)

    def last(size: int) -> list[int]:
        if prompt[0] == start_id and len(ids) > size > 1:
            return [prompt[0], *ids[len(ids) - size + 1 :]]
        return ids[-size:]

    window = last(context)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window = last(half) if len(window) == context else [*window, ids[-1]]
    return ids[len(prompt) :]


class Script(torch.nn.Module):
    """A model that says a fixed sequence: after the n-th id read, counted from the prompt's end, comes `ids[n]`."""

    def __init__(self, ids: list[int], vocab_size: int = 257) -> None:
        super().__init__()
        self.ids, self.vocab_size, self.context_length = ids, vocab_size, 1000
        self.device = torch.device("cpu")
        self.calls = 0

    def make_cache(self, batch_size: int, max_length: int) -> Any:
        self.calls = 0
        return type("Cache", (), {"length": 0})()

    def forward(self, token_ids: torch.Tensor, *, cache: Any, last_only: bool) -> torch.Tensor:
        logits = torch.full((len(token_ids), 1, self.vocab_size), -20.0)
        logits[:, :, self.ids[self.calls]] = 20.0
        self.calls += 1
        return logits
