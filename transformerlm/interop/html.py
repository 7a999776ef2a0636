"""A model as one HTML file: weights in 8 bits, the tokenizer, and a small engine, for a browser without a network.

    <script>             page.js, for which the content policy has a hash
    #data                JSON: settings, where each array of `html_parts` is in the bytes, facts
    #engine              the script of the worker
    .weights             the bytes of all arrays, in blocks of base64

The policy allows this script, this style and a worker made of the page's own text. Nothing can be fetched or sent.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.schemas import SamplingConfig
from transformerlm.checkpoints.document_ids import DocumentIds, ids_of_checkpoint
from transformerlm.checkpoints.load import load_config_of, load_model, load_tokenizer
from transformerlm.checkpoints.validation import read_state
from transformerlm.interop import page
from transformerlm.interop.html_parts import Parts, check_known, engine_settings, model_parts, tokenizer_parts
from transformerlm.interop.model_card import card_facts
from transformerlm.interop.verify import NOT_ASKED
from transformerlm.models.settings import ModelSettings
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.bundle import bundled
from transformerlm.utils.files import check_free, whole_file
from transformerlm.utils.one_page import fill, json_block, policy

MAX_BYTES = 256 * 10**6
"""What a page may hold: browsers read the whole file into memory, and a phone has little."""
BLOCK_BYTES = 3 << 20
"""The bytes of one block of base64, a multiple of 3: a browser's strings are not endless."""
_ALIGNMENT = 8
_WEIGHTS = "\0"  # where the weights go: no other part has it
_BLOCK = re.compile(r'<script type="application/octet-stream" class="weights">([^<]*)</script>')
_DATA = re.compile(r'<script type="application/json" id="data">([^<]*)</script>')


def write_html(
    checkpoint: Path,
    out: Path,
    *,
    license: str | None = None,
    languages: Sequence[str] = (),
    verify: bool = True,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint as one page, which appears whole or not at all, and return a line about how it was verified.

    Raises:
        FileExistsError: it exists already, and `overwrite` is not set.
        ValueError: the page's engine does not compute such a model, or it is too large for one page.
        CheckpointError: the checkpoint is missing or damaged.
        OSError: it cannot be written, or does not read back as it was written.
    """
    check_free(out, overwrite=overwrite)
    settings = ModelSettings(**load_config_of(checkpoint).model.model_dump())
    check_known(settings)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.ignore_merges:
        raise ValueError(f"{checkpoint}: expected a tokenizer without ignore_merges, which the page does not know")
    check_size(settings, tokenizer)
    model = load_model(checkpoint)
    if tokenizer.vocab_size > model.vocab_size:
        found = f"{tokenizer.vocab_size} in its tokenizer, {model.vocab_size} in its model"
        raise ValueError(f"{checkpoint}: expected ids for the model's vocab_size at most, found {found}")
    parts = model_parts(model, vocab_size=tokenizer.vocab_size) | tokenizer_parts(tokenizer)
    header = {
        "settings": engine_settings(settings),
        "pattern": tokenizer.pattern,
        "document_ids": _ids(ids_of_checkpoint(checkpoint, tokenizer)),
    }
    about = _about(checkpoint, license=license, languages=languages)
    return _write(parts, header, about | {"num_parameters": model.num_parameters()}, out, verify=verify)


def _about(checkpoint: Path, *, license: str | None, languages: Sequence[str]) -> dict[str, Any]:
    """Return what the page says of the model, and what its fields hold at first: the run's own samples' settings."""
    samples = load_config_of(checkpoint).samples
    is_ours = "imported_from" not in read_state(checkpoint)
    said = {"license": license, "language": ", ".join(languages)}
    facts = {**card_facts(checkpoint), **{key: value for key, value in said.items() if value}}
    return {
        "facts": {key: value.replace("`", "") for key, value in facts.items()},
        "language": next(iter(languages), None),
        "prompt": next(iter(samples.prompts), "") if is_ours else "",
        "sampling": to_fields(samples.sampling if is_ours else SamplingConfig()),
    }


def check_size(settings: ModelSettings, tokenizer: Tokenizer) -> None:
    """Refuse a model whose page would be larger than `MAX_BYTES`.

    Raises:
        ValueError: says how large it would be.
    """
    size = estimated_bytes(settings, vocab_size=tokenizer.vocab_size)
    if size > MAX_BYTES:
        raise ValueError(
            f'format "html": expected a page of at most {MAX_BYTES // 10**6} MB, found a model that makes one of '
            f"{size / 10**6:,.0f} MB; format gguf or hf has no such limit"
        )


def estimated_bytes(settings: ModelSettings, *, vocab_size: int) -> int:
    """Return about how large the page of a model is: a byte for a weight, four for one of the embedding, in base64."""
    d_model, num_up = settings.d_model, 2 if settings.ffn == "swiglu" else 1
    attention = 2 * d_model * (settings.d_query + settings.d_kv)
    layers = settings.num_layers * (attention + (num_up + 1) * d_model * settings.d_ff)
    return (layers + 5 * vocab_size * d_model) * 4 // 3


def to_fields(sampling: SamplingConfig) -> dict[str, Any]:
    """Return how the run generates its samples, for the page's fields."""
    return {**sampling.model_dump(include={"max_new_tokens", "temperature", "top_p", "top_k", "min_p"}), "seed": None}


def _ids(document_ids: DocumentIds) -> dict[str, Any]:
    return {
        "start_id": document_ids.start_id,
        "ends": list(document_ids.eos_token_ids),
        "starts_texts": document_ids.starts_texts,
    }


def _write(parts: Parts, header: dict[str, Any], about: dict[str, Any], out: Path, *, verify: bool) -> str:
    places, size = _places(parts)
    data = {
        **about,
        "context_length": header["settings"]["context_length"],
        "made": "Made with transformerlm-export --format=html; weights in 8 bits.",
        "header": {**header, "parts": places, "bytes": size},
    }
    before, after = _page(data, name=out.stem).split(_WEIGHTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(out) as unfinished:
            with unfinished.open("w", encoding="utf-8", newline="") as file:
                file.write(before)
                for block in _blocks(parts, size):
                    encoded = base64.b64encode(block).decode()
                    file.write(f'<script type="application/octet-stream" class="weights">{encoded}</script>\n')
                file.write(after)
            if verify:
                _read_back(unfinished, parts, places)
    except OSError as error:
        raise OSError(f"{out}: cannot be written: {error.strerror or error}") from None
    return f"verified: {len(parts)} arrays read back equal" if verify else NOT_ASKED


def _page(data: dict[str, Any], *, name: str) -> str:
    """Return the page with a mark in the place of its weights."""
    style, script, engine = page.read("page.css"), bundled("page.js", page.read), bundled("engine.js", page.read)
    parts = {
        # The worker is made of the page's text, and has the page's policy: it cannot ask for anything either.
        "policy": policy(scripts=[script], style=style, more="worker-src blob:"),
        "title": html.escape(name),
        "style": style,
        "script": script,
        "name": html.escape(name),
        "data": json_block(data),
        "engine": engine,
        "weights": _WEIGHTS,
    }
    return fill(page.read("page.html"), parts)


def _places(parts: Parts) -> tuple[dict[str, tuple[str, int, int]], int]:
    """Return the type, the first byte and the length of each array, and the number of bytes in all."""
    places, end = {}, 0
    for name, array in parts.items():
        places[name] = (array.dtype.str[1:], end, array.size)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _blocks(parts: Parts, size: int) -> Iterator[bytes]:
    """Yield the bytes of all arrays, each at a multiple of the alignment, in blocks."""
    whole = bytearray(size)
    at = 0
    for array in parts.values():
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        whole[at : at + len(data)] = data
        at += -(-len(data) // _ALIGNMENT) * _ALIGNMENT
    for start in range(0, size, BLOCK_BYTES):
        yield bytes(whole[start : start + BLOCK_BYTES])


def read_html(path: Path) -> tuple[dict[str, Any], Parts]:
    """Return the data of a page and its arrays, as a browser reads them.

    Raises:
        OSError: it is not such a page, or not whole.
    """
    text = path.read_text(encoding="utf-8")
    found = _DATA.search(text)
    if found is None:
        raise OSError("it is not a page of a model")
    data = json.loads(found[1])
    whole = b"".join(base64.b64decode(block) for block in _BLOCK.findall(text))
    if len(whole) != data["header"]["bytes"]:
        raise OSError(f"expected {data['header']['bytes']:,} bytes of weights, found {len(whole):,}")
    places = data["header"]["parts"].items()
    return data, {name: np.frombuffer(whole, f"<{kind}", length, start) for name, (kind, start, length) in places}


def _read_back(path: Path, parts: Parts, places: dict[str, tuple[str, int, int]]) -> None:
    _, found = read_html(path)
    for name in places:
        if not np.array_equal(found[name], parts[name].reshape(-1)):
            raise OSError(f"{name} does not read back as it was written")
