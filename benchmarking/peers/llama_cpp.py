"""The peer `llama_cpp`: llama.cpp with our weights, from a GGUF file that we write, one sequence at a time."""

from __future__ import annotations

import tempfile
from itertools import islice, product
from pathlib import Path
from typing import Literal

from config.special_tokens import END_OF_TEXT
from transformerlm.interop.gguf import write_model
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer

LEAST_IDS = 256 + 2  # the bytes, one merge, one special token
_MOST_IDS = LEAST_IDS + 256 * 256 - 1
_DTYPES: dict[str, Literal["fp32", "bf16", "q8_0"]] = {"fp32": "fp32", "bf16": "bf16", "int8": "q8_0"}


class LlamaCpp:
    """Greedy generation by llama.cpp, with weights in `precision` and keys and values in fp32."""

    def __init__(self, model: TransformerLM, *, precision: str, num_threads: int) -> None:
        import llama_cpp

        fp32 = llama_cpp.GGML_TYPE_F32
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_model(model, _any_tokenizer(model.vocab_size), path, dtype=_DTYPES[precision], verify=False)
            self._llama = llama_cpp.Llama(
                str(path), n_ctx=model.context_length, n_threads=num_threads, n_threads_batch=num_threads,
                type_k=fp32, type_v=fp32, use_mmap=False, verbose=False,
            )  # fmt: skip

    def generate(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Return the `count` greedy ids after the prompt, of which there is one."""
        (prompt,) = prompts
        self._llama.reset()  # otherwise it keeps its cache of the prompt
        return [list(islice(self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0), count))]


def why_not(model: TransformerLM) -> str | None:
    """Return why llama.cpp cannot run this model, or None."""
    if not LEAST_IDS <= model.vocab_size <= _MOST_IDS:
        return f"its vocabulary here has {LEAST_IDS} to {_MOST_IDS} ids"
    return None


def _any_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer with this many ids: llama.cpp requires one, but nothing here uses it."""
    pairs = islice(product(range(256), repeat=2), vocab_size - 257)
    merges = [(bytes([left]), bytes([right])) for left, right in pairs]
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    return Tokenizer(dict(enumerate(tokens)), merges, [END_OF_TEXT])
