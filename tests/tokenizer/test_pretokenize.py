"""Behaviour of the cuts made before BPE: special tokens, pre-tokens, and safe places in a stream."""

from __future__ import annotations

import pickle
import re

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformerlm.tokenizer import pretokenize
from transformerlm.tokenizer.pretokenize import PATTERNS, SpecialTokenSplitter, StreamCutter, pre_tokenize, safe_pieces
from transformerlm.utils.text_files import TextBlock

# Characters near which the pattern and the special tokens decide, drawn far more often than others would be.
TRICKY = st.text(alphabet=list("aZsvlretd'19.  \n\r\t\u3000\u00a0é漢²\x1c<|>e"), max_size=40)
ANY_TEXT = st.one_of(TRICKY, st.text(max_size=30))
SPECIALS = st.lists(
    st.sampled_from(["<|e|>", "<|e|><|e|>", "<|", "|>", "a b", "  ", "'s", "\n\n", "el", "le", "a", "<|e|> "]),
    max_size=4,
    unique=True,
)


def _units(splitter: SpecialTokenSplitter, text: str) -> list[str]:
    """Return special tokens and pre-tokens of the text in order."""
    units: list[str] = []
    for segment, is_special in splitter.split(text):
        units += [segment] if is_special else pre_tokenize(segment)
    return units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world", ["Hello", " world"]),
        ("it's we'll I'VE", ["it", "'s", " we", "'ll", " I", "'", "VE"]),
        ("a   b", ["a", "  ", " b"]),
        ("a\n\nb", ["a", "\n", "\n", "b"]),
        ("end  ", ["end", "  "]),
        ("x=42, y", ["x", "=", "42", ",", " y"]),
        ("漢字 é2²", ["漢字", " é", "2²"]),
        ("", []),
    ],
)
def test_pre_tokens_are_those_of_gpt2(text: str, expected: list[str]) -> None:
    """Contractions, one leading space, numbers, marks, and the last blank before a word."""
    assert pre_tokenize(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it's we'll", ["it", "'s", " we", "'ll"]),
        ("a   b", ["a", "  ", " b"]),
        ("a   1", ["a", "   ", "1"]),
        ("x=42, y", ["x", "=", "4", "2", ",", " y"]),
        ("1\n\n2 \n a", ["1", "\n\n", "2", " \n", " a"]),
        ("'1s '²", ["'", "1", "s", " '", "²"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_pre_tokens_are_those_of_smollm(text: str, expected: list[str]) -> None:
    """Each digit is a piece without a blank; white space before one stays whole; all else is as in GPT-2."""
    assert pre_tokenize(text, pattern="smollm") == expected


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_smollm_is_gpt2_between_numbers(text: str) -> None:
    """Numbers are cut out first, as Hugging Face's Digits does, and GPT-2's pattern goes over each part alone."""
    parts = regex.split(r"(\p{N})", text)
    expected = [piece for part in parts for piece in pre_tokenize(part)]
    assert pre_tokenize(text, pattern="smollm") == expected


@settings(max_examples=500)
@given(before=ANY_TEXT, after=ANY_TEXT)
def test_a_cut_of_smollm_is_one_whatever_comes(before: str, after: str) -> None:
    """The pre-tokens of both sides of a safe cut are those of the whole."""
    cut = SpecialTokenSplitter((), pattern="smollm").safe_cut(before)
    sides = [pre_tokenize(side, pattern="smollm") for side in (before[:cut], before[cut:] + after)]
    assert sides[0] + sides[1] == pre_tokenize(before + after, pattern="smollm")


@given(text=ANY_TEXT)
def test_pre_tokens_join_to_the_text(text: str) -> None:
    """No character is lost or changed."""
    assert "".join(pre_tokenize(text)) == text


def test_special_tokens_come_first_and_the_longest_wins() -> None:
    """Of special tokens that begin at one place the longest is taken; text that only looks like one stays text."""
    splitter = SpecialTokenSplitter(["<|e|>", "<|e|><|e|>", "<|e|>"])
    found = list(splitter.split("a<|e|><|e|><|e|>b<|e"))
    assert found == [("a", False), ("<|e|><|e|>", True), ("<|e|>", True), ("b<|e", False)]
    assert splitter.special_tokens == ["<|e|>", "<|e|><|e|>"]


@given(text=ANY_TEXT, specials=SPECIALS)
def test_splitting_agrees_with_the_standard_library(text: str, specials: list[str]) -> None:
    """Special tokens are found as `re` finds them, the longest alternative first."""
    longest_first = sorted(specials, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
    parts = re.split(f"({pattern})", text)
    expected = [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
    assert list(SpecialTokenSplitter(specials).split(text)) == expected


@pytest.mark.parametrize("token", ["", "\ud800"])
def test_special_tokens_that_cannot_be_are_refused(token: str) -> None:
    """An empty token would match everywhere, half a character nowhere."""
    with pytest.raises(ValueError, match="special_tokens: expected"):
        SpecialTokenSplitter([token])


@settings(max_examples=500, deadline=None)
@given(text=ANY_TEXT, rest=ANY_TEXT, specials=SPECIALS)
@example(text="a\n", rest="\nb", specials=[])
@example(text="it'", rest="ll", specials=[])
@example(text="xa", rest=" b", specials=["a b"])
def test_a_safe_cut_is_safe_whatever_follows(text: str, rest: str, specials: list[str]) -> None:
    """The units of the whole are those of the two sides of the cut, for any continuation."""
    splitter = SpecialTokenSplitter(specials)
    cut = splitter.safe_cut(text)
    assert 0 <= cut < max(1, len(text))
    whole = text + rest
    assert _units(splitter, whole) == _units(splitter, whole[:cut]) + _units(splitter, whole[cut:])


@settings(max_examples=500, deadline=None)
@given(text=ANY_TEXT, rest=ANY_TEXT, specials=SPECIALS)
def test_what_had_no_cut_is_not_looked_through_again(text: str, rest: str, specials: list[str]) -> None:
    """Where the last search found no cut, the next one looks only through what has come since."""
    splitter = SpecialTokenSplitter(specials)
    held = text[splitter.safe_cut(text) :]
    whole = held + rest
    assert splitter.safe_cut(whole, looked_through=len(held)) == splitter.safe_cut(whole)


def test_a_run_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run longer than the limit ends the stream with an error that names its kind; one just as long passes."""
    monkeypatch.setattr(pretokenize, "MAX_UNCUT_CHARS", 1000)
    blocks = [TextBlock("some words and " + "x" * 999, False), TextBlock("", True)]
    assert sum(len(piece.text) for piece in safe_pieces(blocks, SpecialTokenSplitter([]), size=4)) == 1014
    blocks = [TextBlock("x" * 600, False), TextBlock("y" * 600, False), TextBlock("", True)]
    with pytest.raises(
        ValueError, match=r"^a\.txt: expected words of at most 1,000 characters, .* 'xxxxxxxxxxxxxxxxxxxx'"
    ):
        list(safe_pieces(blocks, SpecialTokenSplitter([]), size=4, where="a.txt"))
    blocks = [TextBlock(" \n" * 600 + "a", False), TextBlock("", True)]
    with pytest.raises(ValueError, match=r"^a\.txt: expected at most 1,000 characters of white space in a row, found"):
        list(safe_pieces(blocks, SpecialTokenSplitter([]), size=4, where="a.txt"))


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(ANY_TEXT, max_size=8), specials=SPECIALS, size=st.integers(1, 20))
def test_a_stream_in_any_parts_has_the_units_of_the_whole(parts: list[str], specials: list[str], size: int) -> None:
    """Cutting again loses nothing and splits nothing that belongs together."""
    splitter = SpecialTokenSplitter(specials)
    cutter = StreamCutter(splitter, size=size, first_size=1)
    pieces = [cutter.feed(part) for part in parts] + [cutter.flush()]
    assert "".join(pieces) == "".join(parts)
    assert [unit for piece in pieces for unit in _units(splitter, piece)] == _units(splitter, "".join(parts))


def test_little_is_held_back() -> None:
    """Prose is released but for its last word, text without blanks but for its last run, a special token."""
    splitter = SpecialTokenSplitter(["<|e|>"])
    assert splitter.safe_cut("one two three") == len("one two")
    assert splitter.safe_cut("漢字。漢字") == len("漢字。")
    assert splitter.safe_cut("<|e|><|e|><|") == len("<|e|>")
    assert splitter.safe_cut("aaaa") == splitter.safe_cut("") == 0


def test_a_run_without_any_cut_is_not_searched_again_and_again() -> None:
    """The number of searches for a long run in small parts grows with the logarithm of its length."""

    class Counting(SpecialTokenSplitter):
        searches = 0

        def safe_cut(self, text: str, *, looked_through: int = 0) -> int:
            Counting.searches += 1
            return super().safe_cut(text, looked_through=looked_through)

    cutter = StreamCutter(Counting([]), size=100)
    assert not any(cutter.feed("aaaaaaaaaa") for _ in range(10_000))
    assert Counting.searches < 20
    assert cutter.flush() == "a" * 100_000


def test_pieces_never_cross_a_document() -> None:
    """What is held back comes out with the end of its document."""
    blocks = [TextBlock("one two", False), TextBlock("three", True), TextBlock("", True), TextBlock("four five", True)]
    pieces = list(safe_pieces(blocks, SpecialTokenSplitter([]), size=4))
    assert pieces == [
        TextBlock("one", False),
        TextBlock(" twothree", True),
        TextBlock("", True),
        TextBlock("four five", True),
    ]


def test_a_splitter_can_be_sent_to_a_worker() -> None:
    """Pickling keeps the special tokens."""
    splitter = pickle.loads(pickle.dumps(SpecialTokenSplitter(["<|e|>"])))
    assert list(splitter.split("a<|e|>")) == [("a", False), ("<|e|>", True)]


@pytest.mark.parametrize("ending", ["s", "d", "m", "t", "ll", "ve", "re"])
def test_a_text_is_never_cut_after_an_apostrophe(ending: str) -> None:
    """What follows may make a contraction of it: `it'l` is cut before the apostrophe, as `'ll` may come."""
    for pattern in PATTERNS:
        splitter = SpecialTokenSplitter((), pattern=pattern)
        assert splitter.safe_cut(f"it'{ending[0]}") == len("it")
        assert splitter.safe_cut("it' ") == len("it")
        assert splitter.safe_cut("it'1") == len("it'" if pattern == "smollm" else "it")
    beginning = f"it'{ending[0]}"
    cut = SpecialTokenSplitter(()).safe_cut(beginning)
    whole = f"it'{ending} is"
    assert pre_tokenize(whole[:cut]) + pre_tokenize(whole[cut:]) == pre_tokenize(whole)
