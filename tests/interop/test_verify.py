"""The checks find what differs, and say when they did not look."""

from __future__ import annotations

import sys

import pytest

from config.extras import how_to_install
from transformerlm.interop.tiktoken_ranks import to_ranks
from transformerlm.interop.tokenizer_json import to_json
from transformerlm.interop.verify import compare_ids, hard_texts, verify_ranks, verify_tokenizer_json


def test_hard_texts_hold_what_tokenizers_stumble_over(tokenizer):
    """Line ends of three kinds, odd blanks, scripts, emoji, and each special token beside itself and a letter."""
    text = "".join(hard_texts(tokenizer))
    for part in ("\r\n", "\r", "\u3000", "\x1c", "我", "ガラス", "👩‍👩‍👧‍👦", "e\u0301", "\u017f", "12345678"):
        assert part in text
    for special in tokenizer.special_tokens:
        assert f"a{special}b {special}{special}" in text


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: [*ids, 0]])
def test_other_ids_are_an_error(change, tokenizer):
    """The error names the library that gives one id more or less, the text and both lists."""
    with pytest.raises(ValueError, match=r"verify: other encodes .* to .*, ours to "):
        compare_ids(tokenizer, lambda text: change(tokenizer.encode(text)), tokenizer.decode, library="other")


def test_another_decoded_text_is_an_error(tokenizer):
    """Equal ids are not enough: the text must come back as ours."""
    with pytest.raises(ValueError, match="verify: other decodes"):
        compare_ids(tokenizer, tokenizer.encode, lambda ids: tokenizer.decode(ids).strip(), library="other")


def test_another_pattern_is_found(tokenizer):
    """The texts tell gpt2's pattern from the others."""
    other = "cl100k" if tokenizer.pattern == "gpt2" else "gpt2"
    twin = type(tokenizer)(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern=other)
    with pytest.raises(ValueError, match="verify: tokenizers encodes"):
        verify_tokenizer_json(tokenizer, to_json(twin))


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken"])
def test_a_missing_library_is_said(library, tokenizer, monkeypatch):
    """One line names the library and the install command."""
    monkeypatch.setitem(sys.modules, library, None)
    verify = {
        "tokenizers": lambda: verify_tokenizer_json(tokenizer, to_json(tokenizer)),
        "tiktoken": lambda: verify_ranks(tokenizer, to_ranks(tokenizer)),
    }[library]
    assert verify() == f"not verified, as {library} is not installed: {how_to_install('interop')}"
