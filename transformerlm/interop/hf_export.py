"""A checkpoint as a directory that Hugging Face's `transformers`, and what builds on it, opens without changes.

config.json  generation_config.json  model.safetensors (or shards and their index)
tokenizer.json  tokenizer_config.json  README.md  chat_template.jinja (of a model that was trained on conversations)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from config.schemas import SamplingConfig
from transformerlm.checkpoints.chat_format import ids_with_chat, renderer_of
from transformerlm.checkpoints.document_ids import DocumentIds, ids_of_checkpoint
from transformerlm.checkpoints.layout import MODEL, index_name, index_text, plan_files, single_name
from transformerlm.checkpoints.load import load_config_of, load_model, load_tokenizer
from transformerlm.checkpoints.validation import read_state
from transformerlm.interop import chat_template, llama, tokenizer_json
from transformerlm.interop.model_card import CardNotes, model_card
from transformerlm.interop.verify import NOT_ASKED, verify_hf
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.chat import ChatRenderer
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, whole_directory

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = single_name(MODEL)
INDEX_FILE = index_name(MODEL)
_BESIDE = ("*.json", "*.safetensors", "README.md", "loss.*", chat_template.FILE)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    max_shard_mb: int = 5000,
    verify: bool = True,
    overwrite: bool = False,
    notes: Callable[[Path], CardNotes] | None = None,
) -> str:
    """Write the directory, and return one line about how it was verified.

    If `dtype` is not fp32, the rounded weights are verified. `notes` returns what the card says besides the facts of
    the checkpoint; it is called with the directory, into which it may put a picture.

    Raises:
        FileExistsError: it exists already, and `overwrite` is not set.
        ValueError: the model is not a Llama or Qwen3, or `transformers` computes something else.
        CheckpointError: the checkpoint is missing or damaged.
        OSError: it cannot be written.
    """
    check_free(out, overwrite=overwrite, holds=CONFIG_FILE, beside=_BESIDE)
    config = load_config_of(checkpoint)
    llama.architecture_of(ModelSettings(**config.model.model_dump()))
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint).to(_DTYPES[dtype])
    if dtype == "fp16":
        _check_range(model)
    with whole_directory(out) as directory:
        ids = ids_of_checkpoint(checkpoint, tokenizer)
        renderer = renderer_of(checkpoint, tokenizer, ids)
        ids = ids if renderer is None else ids_with_chat(ids, renderer)
        sampling = {} if "imported_from" in read_state(checkpoint) else to_sampling(config.samples.sampling)
        if renderer is not None and renderer.end_strings:  # no token ends an answer
            sampling["stop_strings"] = list(renderer.end_strings)
        _write_facts(model, tokenizer, ids, directory, dtype=dtype, sampling=sampling)
        _write_weights(model, directory, max_shard_bytes=max_shard_mb * 10**6)
        has_template = renderer is not None and _write_template(renderer, directory)
        card = model_card(checkpoint, name=out.name, notes=notes(directory) if notes else None)
        (directory / "README.md").write_text(card, encoding="utf-8")
        leading = [ids.start_id] if ids.starts_texts else []
        chat = renderer if has_template else None
        return verify_hf(model.float(), tokenizer, directory, leading=leading, chat=chat) if verify else NOT_ASKED


def _check_range(model: TransformerLM) -> None:
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"dtype: expected fp32 or bf16 for {name}, found fp16, which ends at 65,504")


def _write_template(renderer: ChatRenderer, directory: Path) -> bool:
    """Write the chat template, which transformers reads from a file of its own; return whether there is one."""
    template = chat_template.template_to_export(renderer)
    if template is not None:
        (directory / chat_template.FILE).write_text(template, encoding="utf-8")
    return template is not None


def to_sampling(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the keys of `generation_config.json` that make transformers sample as we do by default."""
    if sampling.temperature == 0 or sampling.top_p == 0:
        return {"do_sample": False}
    keys = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    keys["top_k"] = sampling.top_k or 0  # without the key some versions keep the 50 most likely tokens
    return keys | ({"min_p": sampling.min_p} if sampling.min_p else {})


def _write_facts(
    model: TransformerLM,
    tokenizer: Tokenizer,
    ids: DocumentIds,
    directory: Path,
    *,
    dtype: str,
    sampling: Mapping[str, Any],
) -> None:
    texts: dict[int | None, str] = {index: text for text, index in tokenizer.special_token_ids.items()}
    bos, eos, pad = (texts.get(index) for index in (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id))
    facts: dict[str, Mapping[str, Any]] = {
        CONFIG_FILE: llama.to_config(model.settings, dtype=dtype, ids=llama.to_ids(ids)),
        GENERATION_FILE: {**llama.to_ids(ids), **sampling},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.context_length,
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad or eos,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, record in facts.items():
        (directory / name).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = tokenizer_json.to_json(tokenizer, leading=bos if ids.starts_texts else None)
    (directory / tokenizer_json.FILE).write_text(text, encoding="utf-8")


def _write_weights(model: TransformerLM, directory: Path, *, max_shard_bytes: int) -> None:
    d_head, names = model.settings.d_head, llama.weight_names(model.settings)
    weights = dict(model.named_parameters())
    sizes = {ours: weights[ours].nbytes for ours in names}
    plan = plan_files(MODEL, sizes, max_bytes=max_shard_bytes)
    for file, shard in plan.items():
        tensors = {
            names[ours]: llama.halves_from_pairs(ours, weights[ours].detach(), d_head).contiguous() for ours in shard
        }
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"{directory / file}: cannot be written: {error}") from None
        shutil.copymode(directory / CONFIG_FILE, directory / file)  # the library makes it readable for its owner only
    if len(plan) > 1:
        places = {file: [names[ours] for ours in shard] for file, shard in plan.items()}
        text = index_text(places, total_bytes=sum(weight.nbytes for weight in weights.values()))
        (directory / INDEX_FILE).write_text(text, encoding="utf-8")
