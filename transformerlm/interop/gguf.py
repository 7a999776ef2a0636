"""GGUF: one file with weights and tokenizer, for llama.cpp and the programs built on it.

The tensors get llama.cpp's names. For its architecture "llama" their values are unchanged: there llama.cpp rotates
pairs (2i, 2i+1) of a head's features, as we do. (Hugging Face's Llama rotates (i, i + d/2), so converters from it must
reorder the rows of q and k.) A model with norms of queries and keys becomes its architecture "qwen3", where llama.cpp
rotates as Hugging Face does. Llama 3.1's scaling is the tensor `rope_freqs`, by which llama.cpp divides the
frequencies. Vectors are always fp32. With q8_0, a matrix whose rows are not a multiple of its blocks of 32 is fp16, as
in llama.cpp's own converter.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from config.extras import how_to_install
from config.schemas import SamplingConfig
from transformerlm.checkpoints.chat_format import ids_with_chat, renderer_of
from transformerlm.checkpoints.document_ids import DocumentIds, guess_ids, ids_of_checkpoint
from transformerlm.checkpoints.load import load_config_of, load_model, load_tokenizer
from transformerlm.checkpoints.validation import read_state
from transformerlm.interop.chat_template import ollama_template, template_to_export
from transformerlm.interop.llama import Architecture, architecture_of, halves_from_pairs
from transformerlm.interop.tokenizer_json import check_reachable
from transformerlm.interop.verify import NOT_ASKED
from transformerlm.models.layers import rope_factors
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.chat import ChatRenderer
from transformerlm.tokenizer.io import token_to_text
from transformerlm.tokenizer.pretokenize import pre_tokenize
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, whole_file, write_whole

if TYPE_CHECKING:
    from gguf import GGUFWriter

Dtype = Literal["fp32", "fp16", "bf16", "q8_0"]

# What the `gguf` package calls the type of the weights, and of the whole file.
_TYPES: dict[Dtype, tuple[str, str]] = {
    "fp32": ("F32", "ALL_F32"),
    "fp16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_PRE_TOKENIZERS = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2", "smollm": "smollm"}
_NAMES = {"token_embeddings": "token_embd", "ln_final": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "ln1": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.output_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "ln2": "ffn_norm",
    "ffn.w1": "ffn_gate",
    "ffn.w2": "ffn_down",
    "ffn.w3": "ffn_up",
}


def write_gguf(
    checkpoint: Path, out: Path, *, dtype: Dtype = "fp32", verify: bool = True, overwrite: bool = False
) -> str:
    """Write a checkpoint as one file, which appears whole or not at all, and return a line about how it was verified.

    A Modelfile beside it tells Ollama the context length, how the run generates its samples, and the chat format. Ids
    that the tokenizer does not have are omitted: `transformerlm-infer` never generates them either.

    Raises:
        FileExistsError: it exists already, and `overwrite` is not set.
        ValueError: the model is not a Llama or Qwen3, llama.cpp has no such tokenizer, a weight is too large for
            `dtype`, or the `gguf` package is missing.
        OSError: it cannot be written, or does not read back as it was written.
    """
    _import_gguf()
    for path in (out, modelfile_path(out)):
        check_free(path, overwrite=overwrite)
    config = load_config_of(checkpoint)
    _architecture_of(ModelSettings(**config.model.model_dump()))
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    if tokenizer.vocab_size > model.vocab_size:
        found = f"{tokenizer.vocab_size} in its tokenizer, {model.vocab_size} in its model"
        raise ValueError(f"{checkpoint}: expected ids for the model's vocab_size at most, found {found}")
    ids = ids_of_checkpoint(checkpoint, tokenizer)
    chat = renderer_of(checkpoint, tokenizer, ids)
    outcome = write_model(model, tokenizer, out, dtype=dtype, verify=verify, document_ids=ids, chat=chat)
    sampling = None if "imported_from" in read_state(checkpoint) else config.samples.sampling
    text = _modelfile(out.name, model.context_length, sampling)
    if chat is not None:
        text += _modelfile_of_chat(chat, starts_texts=ids.starts_texts)
    write_whole(modelfile_path(out), text)
    return outcome


def modelfile_path(out: Path) -> Path:
    """Return the path of a GGUF file's Modelfile: `first.Modelfile` beside `first.gguf`."""
    return out.with_suffix(".Modelfile")


def _modelfile(name: str, context_length: int, sampling: SamplingConfig | None) -> str:
    """Return what Ollama needs to know.

    Its default context would be longer than any that the model has seen, and its own top-k and penalty for repetition
    apply where none is named.
    """
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {context_length}"]
    if sampling is not None:
        chosen = {key: getattr(sampling, key) for key in ("temperature", "top_p", "min_p")}
        chosen |= {"top_k": sampling.top_k or 0, "repeat_penalty": 1.0}
        lines += [f"PARAMETER {key} {value}" for key, value in chosen.items()]
    return "\n".join(lines) + "\n"


def _modelfile_of_chat(chat: ChatRenderer, *, starts_texts: bool) -> str:
    """Return the lines of a Modelfile for a model that chats: Ollama does not read the template in the GGUF file."""
    template = ollama_template(chat, starts_texts=starts_texts)
    lines = [] if template is None else [f'TEMPLATE """{template}"""']
    if chat.end_strings:
        warnings.warn(
            f"GGUF has no place for {chat.chat.end!r}, the text that ends an answer: give it to llama.cpp's programs "
            "yourself (--reverse-prompt, or stop in a request to llama-server)",
            stacklevel=3,
        )
    for end in chat.end_strings or [chat.tokenizer.decode([index]) for index in chat.end_ids]:
        if (value := _modelfile_value(end)) is not None:
            lines.append(f"PARAMETER stop {value}")
        else:
            warnings.warn(f"a Modelfile cannot hold {end!r}, which ends an answer: left out", stacklevel=3)
    return "".join(f"{line}\n" for line in lines)


def _modelfile_value(text: str) -> str | None:
    """Return a text in the quotes of a Modelfile, which has no escapes; None: Ollama would read another text."""
    if '"""' in text or not all(one.isprintable() or one in "\n\r\t" for one in text):
        return None
    mark = '"""' if '"' in text else '"'
    return f"{mark}{text}{mark}"


def write_model(
    model: TransformerLM,
    tokenizer: Tokenizer,
    out: Path,
    *,
    dtype: Dtype = "fp32",
    verify: bool = True,
    document_ids: DocumentIds | None = None,
    chat: ChatRenderer | None = None,
) -> str:
    """Write a model and its tokenizer as `write_gguf` does, and the template of its chat format, if it has one."""
    gguf, settings = _import_gguf(), model.settings
    ids = document_ids or guess_ids(tokenizer)
    architecture = _architecture_of(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(None, architecture)
    _add_tokenizer(gguf, writer, tokenizer, ids if chat is None else ids_with_chat(ids, chat))
    if chat is not None and (template := template_to_export(chat)) is not None:
        writer.add_chat_template(template)
    _add_sizes(writer, replace(settings, vocab_size=tokenizer.vocab_size), name=out.stem)
    writer.add_file_type(gguf.LlamaFileType[_TYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    turned = settings.d_head if architecture == "qwen3" else None
    weights = _tensors(dict(model.named_parameters()), tokenizer.vocab_size, turned_d_head=turned)
    if (scaling := settings.rope_scaling) is not None:
        weights["rope_freqs.weight"] = rope_factors(settings.rope_theta, settings.d_head, **scaling).float().numpy()
    tensors = _add_tensors(gguf, writer, weights, dtype)
    try:
        with whole_file(out) as unfinished:
            _write(writer, unfinished)
            if verify:
                _read_back(gguf, unfinished, tensors)
    except OSError as error:
        raise OSError(f"{out}: cannot be written: {error.strerror or error}") from None
    return f"verified with gguf: {len(tensors)} tensors read back equal" if verify else NOT_ASKED


def _architecture_of(settings: ModelSettings) -> Architecture:
    architecture = architecture_of(settings)
    if architecture == "qwen3" and settings.rope_scaling is not None:
        found = dict(settings.rope_scaling)
        raise ValueError(f"model.rope_scaling: expected none, found {found} (with qk_norm, llama.cpp does not scale)")
    return architecture


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ValueError(f"gguf is not installed: {how_to_install('gguf')}") from None
    return gguf


def _tensors(weights: Mapping[str, Tensor], vocab_size: int, *, turned_d_head: int | None) -> dict[str, np.ndarray]:
    """Return the weights as arrays under llama.cpp's names, without a tied head.

    With `turned_d_head` the rows of q and k are put in Hugging Face's order, for heads of that size.
    """
    tensors = {}
    for name, parameter in weights.items():
        module, weight = name.removesuffix(".weight"), parameter.detach()
        if turned_d_head is not None:
            weight = halves_from_pairs(name, weight, turned_d_head)
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            tensors[f"blk.{layer}.{_LAYER_NAMES[module]}.weight"] = weight.numpy()
        else:
            has_ids = module in ("token_embeddings", "lm_head")
            tensors[f"{_NAMES[module]}.weight"] = (weight[:vocab_size] if has_ids else weight).numpy()
    return tensors


def _add_tensors(
    gguf: ModuleType, writer: GGUFWriter, weights: Mapping[str, np.ndarray], dtype: Dtype
) -> dict[str, np.ndarray]:
    """Add the weights, and return what the file will hold for each: numbers, or the bytes of bf16 and q8_0."""
    tensors = {}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType[_type_name(weight, dtype)]
        with np.errstate(over="ignore"):
            tensors[name] = gguf.quants.quantize(weight, kind)
        if not np.isfinite(gguf.quants.dequantize(tensors[name], kind)).all():
            largest = np.abs(weight).max()
            raise ValueError(
                f"{name}: expected numbers that {kind.name} can hold, found {largest:g}; choose dtype = fp32"
            )
        writer.add_tensor(name, tensors[name], raw_dtype=kind)
    return tensors


def _type_name(weight: np.ndarray, dtype: Dtype) -> str:
    if weight.ndim == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and weight.shape[1] % 32 else _TYPES[dtype][0]


def _add_sizes(writer: GGUFWriter, settings: ModelSettings, *, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(settings.vocab_size)
    writer.add_context_length(settings.context_length)
    writer.add_embedding_length(settings.d_model)
    writer.add_block_count(settings.num_layers)
    writer.add_feed_forward_length(settings.d_ff)
    writer.add_head_count(settings.num_heads)
    writer.add_head_count_kv(settings.num_kv_heads)
    writer.add_rope_dimension_count(settings.d_head)
    if settings.qk_norm or settings.d_query != settings.d_model:  # else the reader divides the width by the heads
        writer.add_key_length(settings.d_head)
        writer.add_value_length(settings.d_head)
    writer.add_rope_freq_base(settings.rope_theta)
    writer.add_layer_norm_rms_eps(settings.norm_eps)


def _add_tokenizer(gguf: ModuleType, writer: GGUFWriter, tokenizer: Tokenizer, document_ids: DocumentIds) -> None:
    """Add vocabulary and merges; raise ValueError if llama.cpp would give other ids, or end texts elsewhere.

    One difference is left: by the patterns llama3 and qwen2 llama.cpp does not take the long s for an s.
    """
    if tokenizer.pattern not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer: expected the pattern {', '.join(_PRE_TOKENIZERS)}, found {tokenizer.pattern!r}: llama.cpp has "
            "no pre-tokenizer that cuts every text in the same places (llama3 cuts nearly as cl100k does)"
        )
    _check_whole_tokens(tokenizer)
    bos, ends, pad = document_ids.start_id, document_ids.eos_token_ids, document_ids.pad_token_id
    if bos is None or not ends or not tokenizer.merges:
        # Without the special token, llama.cpp ends texts at id 11; without merges, it does not load the file.
        found = f"{len(tokenizer.special_tokens)} special tokens and {len(tokenizer.merges)} merges"
        raise ValueError(f"tokenizer: expected a special token at which texts end, and merges, found {found}")
    ids, specials = range(tokenizer.vocab_size), {index: text for text, index in tokenizer.special_token_ids.items()}
    tokens = [specials.get(index) or token_to_text(tokenizer.vocab[index]) for index in ids]
    merges = [(token_to_text(left), token_to_text(right)) for left, right in tokenizer.merges]
    if len(set(tokens)) < len(tokens) or not {left + right for left, right in merges} <= set(tokens):
        raise ValueError("tokenizer: a special token reads as another token does, or merges make it: GGUF has no such")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[tokenizer.pattern])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if index in specials else gguf.TokenType.NORMAL for index in ids])
    writer.add_token_merges([" ".join(parts) for parts in merges])
    writer.add_bos_token_id(bos)
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)  # llama.cpp stops at each
    for add, end in zip(places, ends, strict=False):
        add(end)
    if left := [repr(tokens[end]) for end in ends[len(places) :]]:
        warnings.warn(
            f"GGUF has room for {len(places)} tokens that end a text: {', '.join(left)} left out", stacklevel=4
        )
    if pad is not None:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(document_ids.starts_texts)


def _check_whole_tokens(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose pre-tokens llama.cpp would take for other tokens: with llama3 it asks for them whole."""
    if tokenizer.pattern != "llama3":
        if tokenizer.ignore_merges:
            raise ValueError("tokenizer: expected ignore_merges with the pattern llama3 alone, as llama.cpp has it")
        return
    if not tokenizer.ignore_merges:
        check_reachable(tokenizer, by_itself=True)
    if found := [each for each in tokenizer.special_tokens if len(pre_tokenize(each, pattern="llama3")) == 1]:
        raise ValueError(
            f"tokenizer: expected special tokens that llama.cpp does not find in plain text, found {found[0]!r}"
        )


def _write(writer: GGUFWriter, path: Path) -> None:
    try:
        with contextlib.closing(writer):
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:  # on a full disk numpy says only how many items it has written
        raise OSError(error.strerror or f"{error}; is the disk full?") from None


def _read_back(gguf: ModuleType, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, data in tensors.items():
        if name not in found or not np.array_equal(found[name], data):
            raise OSError(f"{name} does not read back as it was written")
