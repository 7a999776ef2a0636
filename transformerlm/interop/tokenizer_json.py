"""Writing and reading Hugging Face's `tokenizer.json`: byte-level BPE that splits by one of our patterns.

Written by hand, without the `tokenizers` library. Tokens are spelled in GPT-2's byte alphabet, as in `vocab.json`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformerlm.interop.verify import NOT_ASKED, verify_tokenizer_json
from transformerlm.tokenizer.io import MAX_SPECIALS, reads_as, text_to_token, token_to_text
from transformerlm.tokenizer.pretokenize import CL100K_PATTERN, GPT2_PATTERN, PATTERNS
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, write_whole
from transformerlm.utils.json_files import read_json_object
from transformerlm.utils.strings import is_utf8

FILE = "tokenizer.json"
MAX_FILE_BYTES = 1 << 28
_MAX_NAMES = 5
# The patterns as Hugging Face's files write them; the possessive `++` of tiktoken is only for speed. Files of GPT-4's
# tokenizer often have Llama 3's pattern, which differs from OpenAI's in the white space that ends a text.
_LLAMA3_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _LLAMA3_ENDS
_SPLITS = {
    "cl100k": _LLAMA3.replace(_LLAMA3_ENDS, r"|\s+(?![\s\S])" + _LLAMA3_ENDS),
    "llama3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_SPELLINGS = {
    GPT2_PATTERN: "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    CL100K_PATTERN: "cl100k",
    **{spelled: name for name, spelled in _SPLITS.items()},
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def write_tokenizer_json(
    tokenizer: Tokenizer, out: Path, *, leading: str | None = None, verify: bool = True, overwrite: bool = False
) -> str:
    """Write a `tokenizer.json` as `to_json` gives it, and return one line about how it was verified.

    Raises:
        FileExistsError: it exists already, and `overwrite` is not set.
        ValueError: the tokenizer cannot be expressed, or the `tokenizers` library gives other ids.
    """
    check_free(out, overwrite=overwrite)
    text = to_json(tokenizer, leading=leading)
    outcome = verify_tokenizer_json(tokenizer, text) if verify else NOT_ASKED
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return outcome


def to_json(tokenizer: Tokenizer, *, leading: str | None = None) -> str:
    """Return the tokenizer as the text of a `tokenizer.json`, which puts the special token `leading` before each text.

    Raises:
        ValueError: a special token that tokenizer.json would decode to other bytes.
    """
    for special in tokenizer.special_tokens:
        if (other := reads_as(special)) is not None:
            raise ValueError(
                f"tokenizer: expected special tokens that tokenizer.json can express, found {special!r}, which it "
                f"decodes to the bytes {other!r} (train one of ASCII characters)"
            )
    specials = {token_id: text for text, token_id in tokenizer.special_token_ids.items()}
    tokens = sorted(tokenizer.vocab.items())
    names = {index: specials.get(index) or token_to_text(token) for index, token in tokens}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    record = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": specials[index], **flags} for index in sorted(specials)],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.pattern),
        "post_processor": _processor(leading, tokenizer),
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": {name: index for index, name in names.items()},
            "merges": [[token_to_text(left), token_to_text(right)] for left, right in tokenizer.merges],
        },
    }
    return json.dumps(record, ensure_ascii=False, indent=1) + "\n"


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern == "gpt2":
        return {**_BYTES, "use_regex": True}
    if pattern == "smollm":
        return {"type": "Sequence", "pretokenizers": [_DIGITS, {**_BYTES, "use_regex": True}]}
    split = {"type": "Split", "pattern": {"Regex": _SPLITS[pattern]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


def _processor(leading: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    spans = {**_BYTES, "trim_offsets": False}
    if leading is None:
        return spans
    texts = [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB")]
    first, second = ({"SpecialToken": {"id": leading, "type_id": index}} for index in range(2))
    token = {"id": leading, "ids": [tokenizer.special_token_ids[leading]], "tokens": [leading]}
    pair = [first, texts[0], second, texts[1]]
    template = {"type": "TemplateProcessing", "single": pair[:2], "pair": pair, "special_tokens": {leading: token}}
    return {"type": "Sequence", "processors": [spans, template]}


def leading_token(path: Path) -> str | None:
    """Return the special token that a `tokenizer.json` puts before each text; None: it adds none, or others, too."""
    return _leading(read_json_object(path, max_bytes=MAX_FILE_BYTES).get("post_processor"))


def _templates(processor: Any) -> list[dict[str, Any]]:
    """Return the parts of a post-processor that may add tokens."""
    parts = processor.get("processors") if (processor or {}).get("type") == "Sequence" else [processor or _BYTES]
    return [part for part in parts if part.get("type") != "ByteLevel"]


def _leading(processor: Any) -> str | None:
    templates = _templates(processor)
    if len(templates) != 1 or templates[0].get("type") != "TemplateProcessing":
        return None
    single = templates[0]["single"]
    if len(single) != 2 or "SpecialToken" not in single[0] or "Sequence" not in single[1]:
        return None
    return str(single[0]["SpecialToken"]["id"])


def from_file(path: Path, *, keeps_leading: bool = False) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`; with `keeps_leading` the caller asks for its `leading_token`.

    Raises:
        ValueError: it does something that our tokenizers do not; the message says what.
        OSError: it cannot be read.
    """
    record = read_json_object(path, max_bytes=MAX_FILE_BYTES)
    try:
        return _from_record(record, keeps_leading=keeps_leading)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected the form of a tokenizer.json, found none ({error})") from None


def _from_record(record: dict[str, Any], *, keeps_leading: bool) -> Tokenizer:
    model = record["model"]
    _refuse("model.type", model.get("type", "BPE"), ["BPE"])
    _check_normalizer(record.get("normalizer"))
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _refuse(f"model.{key}", model.get(key), [None, False, "", 0.0])
    pattern = _pattern(record.get("pre_tokenizer"))
    templates = _templates(record.get("post_processor"))
    if templates and not (keeps_leading and _leading(record["post_processor"])):
        found = templates[0].get("type")
        warnings.warn(f"its post_processor ({found}) adds tokens to each text; ours adds none", stacklevel=3)
    specials = _added_tokens(record.get("added_tokens") or [])
    vocab = _ids(model["vocab"])
    for name, index in specials.items():
        if vocab.setdefault(name, index) != index:
            raise ValueError(f"expected one id of {name!r}, found {index} and {vocab[name]}")
    by_id = {index: name.encode() if name in specials else text_to_token(name) for name, index in vocab.items()}
    if len(by_id) < len(vocab):
        raise ValueError("expected each id once, found one for two tokens")
    merges = [_merge(merge) for merge in model["merges"]]
    if missing := sorted({bytes([value]) for value in range(256)} - set(by_id.values())):
        raise ValueError(
            f"model.vocab: expected all 256 single bytes, found {256 - len(missing)}, without "
            f"{token_to_text(missing[0])!r} (the tokenizer was trained without them, as SmolLM2's was, and drops them)"
        )
    ignores = model.get("ignore_merges") is True
    try:
        tokenizer = Tokenizer(by_id, merges, list(specials), pattern=pattern)
        check_reachable(tokenizer, by_itself=ignores)
    except ValueError:
        if not ignores:
            raise
        return Tokenizer(by_id, merges, list(specials), pattern=pattern, ignore_merges=True)
    return tokenizer  # merges make all tokens, so ignoring them would change nothing


def _check_normalizer(normalizer: Any) -> None:
    """Refuse one that changes text, but for NFC, of which a warning tells."""
    if normalizer is None:
        return
    if normalizer != {"type": "NFC"}:
        raise ValueError(f"normalizer: expected null or NFC, found {json.dumps(normalizer)[:80]}")
    warnings.warn(
        "its normalizer (NFC) composes letters and their accents; ours changes no text, so give it composed text to "
        "get the same ids",
        stacklevel=4,
    )


def _pattern(pre_tokenizer: Any) -> str:
    """Return the name of the pattern that a `pre_tokenizer` splits by."""
    parts = pre_tokenizer["pretokenizers"] if (pre_tokenizer or {}).get("type") == "Sequence" else [pre_tokenizer or {}]
    if not parts:
        raise ValueError("pre_tokenizer: expected ByteLevel, found none")
    *splits, last = parts
    _refuse("pre_tokenizer.type", last.get("type"), ["ByteLevel"])
    _refuse("pre_tokenizer.add_prefix_space", last.get("add_prefix_space", True), [False])
    if last.get("use_regex", True):
        if [split.get("type") for split in splits] == ["Digits"]:
            _refuse("pre_tokenizer.individual_digits", splits[0].get("individual_digits", False), [True])
            return "smollm"
        _refuse("number of splits before the pre_tokenizer ByteLevel", len(splits), [0])
        return "gpt2"
    _refuse("number of splits before the pre_tokenizer ByteLevel", len(splits), [1])
    split = splits[0]
    _refuse("pre_tokenizer.type", split.get("type"), ["Split"])
    _refuse("pre_tokenizer.behavior", split.get("behavior"), ["Isolated"])
    _refuse("pre_tokenizer.invert", split.get("invert", False), [False])
    found = split["pattern"].get("Regex")
    if found not in _SPELLINGS:
        raise ValueError(f"expected the split pattern of {', '.join(PATTERNS)}, found {str(found)[:200]!r}")
    return _SPELLINGS[found]


def _refuse(key: str, found: Any, expected: list[Any]) -> None:
    if found not in expected:
        raise ValueError(f"{key}: expected {json.dumps(expected[0])}, found {json.dumps(found)[:80]}")


def _added_tokens(tokens: list[Any]) -> dict[str, int]:
    """Return content and id of each added token; like our special tokens, all are kept whole wherever they are.

    Those that are not special there are so here, with a warning: a prompt has them as plain text unless `allow_special`
    is given, and an export says that they are special.
    """
    found, plain = {}, []
    for token in tokens:
        for key in ("single_word", "lstrip", "rstrip"):
            _refuse(f"added token {str(token.get('content'))[:40]!r}: {key}", token.get(key, False), [False])
        found[token["content"]] = token["id"]
        if token.get("special") is False:
            plain.append(token["content"])
    if len(tokens) > MAX_SPECIALS:
        raise ValueError(f"expected at most {MAX_SPECIALS:,} added tokens, found {len(tokens):,}")
    ids = _ids(found)
    if plain:
        names = ", ".join(plain[:_MAX_NAMES]) + (f" and {len(plain) - _MAX_NAMES} more" if plain[_MAX_NAMES:] else "")
        warnings.warn(f"added tokens that are not special there, and special tokens here: {names}", stacklevel=4)
    return ids


def _ids(vocab: Any) -> dict[str, int]:
    for name, index in vocab.items():
        if type(index) is not int or not isinstance(name, str) or not name:
            raise ValueError(f"expected a whole number as the id of {str(name)[:40]!r}, found {str(index)[:40]!r}")
    return dict(vocab)


def _merge(merge: Any) -> tuple[bytes, bytes]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise ValueError(f"expected merges of two tokens, found {str(merge)[:80]!r}")
    return text_to_token(parts[0]), text_to_token(parts[1])


def check_reachable(tokenizer: Tokenizer, *, by_itself: bool = False) -> None:
    """Refuse a vocabulary with tokens that no merge forms; with `by_itself`, each must be what its text encodes to.

    Raises:
        ValueError: there is such a token; the message names the first.
    """
    specials = set(tokenizer.special_token_ids.values())
    made = {left + right for left, right in tokenizer.merges}
    for index, token in tokenizer.vocab.items():
        if index in specials or len(token) == 1:
            continue
        if token not in made:
            raise ValueError(f"expected a merge for each token, found none for {token_to_text(token)!r} (id {index})")
        # A part of a character is never a pre-token.
        if by_itself and is_utf8(token) and tokenizer.encode_piece(token.decode()) != [index]:
            name = token_to_text(token)
            raise ValueError(f"expected merges that make each token of its bytes, found others for {name!r}")
