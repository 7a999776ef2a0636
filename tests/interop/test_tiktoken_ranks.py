"""tiktoken's ranks: the same ids, merges recovered from ranks, and errors if ranks cannot express the same."""

from __future__ import annotations

import base64

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interop.models import SPECIALS
from transformerlm.interop.tiktoken_ranks import merges_of, read_ranks, to_ranks, write_ranks
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.pretokenize import PATTERNS

BYTES = {index: bytes([index]) for index in range(256)}


def test_the_tokenizer_comes_back(tokenizer, tmp_path):
    """Written and read with its pattern and special tokens, it is the same tokenizer, as the check by tiktoken says."""
    outcome = write_ranks(tokenizer, tmp_path / "ranks.tiktoken")
    assert outcome.startswith("verified with tiktoken: the ids of ")
    assert f"give tiktoken.Encoding pat_str={PATTERNS[tokenizer.pattern]!r} and special_tokens=" in outcome
    again = read_ranks(tmp_path / "ranks.tiktoken", pattern=tokenizer.pattern, special_tokens=SPECIALS)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_special_tokens_fill_the_ids_that_are_left_out(tmp_path):
    """As in OpenAI's p50k_base, whose only special token is not the last."""
    ranks = {**{bytes([index]): index for index in range(256)}, b"ab": 257, b"abc": 259}
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    tokenizer = read_ranks(path, pattern="gpt2", special_tokens=["<a>", "<b>", "<c>"])
    assert tokenizer.special_token_ids == {"<a>": 256, "<b>": 258, "<c>": 260}
    assert tokenizer.encode("abc<b>") == [259, 258]
    assert to_ranks(tokenizer) == ranks
    with pytest.raises(ValueError, match="found none with id 258"):
        read_ranks(path, pattern="gpt2", special_tokens=["<a>"])


def test_any_text_has_the_same_ids(tokenizer):
    """tiktoken agrees on every text whose letters its Unicode tables know, as they know all of these."""
    theirs = tiktoken.Encoding(
        "ours",
        pat_str=PATTERNS[tokenizer.pattern],
        mergeable_ranks=to_ranks(tokenizer),
        special_tokens=tokenizer.special_token_ids,
    )

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(st.characters(max_codepoint=0x2FF)) | st.text(alphabet=" \n\r\t'sStT1a.我<|user>"))
    def agrees(text):
        assert theirs.encode(text, allowed_special="all") == tokenizer.encode(text)

    agrees()


@pytest.mark.parametrize(
    ("merges", "why"),
    [
        ([(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")], "two merges make one token"),
        ([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], "lower ranks make a and bc of abc, not ab and c"),
    ],
)
def test_merges_that_ranks_cannot_express_are_refused(merges, why):
    """tiktoken would merge in another way; the error says what was expected."""
    tokens = dict.fromkeys(left + right for left, right in merges)
    vocab = BYTES | {256 + number: token for number, token in enumerate(tokens)}
    with pytest.raises(ValueError, match="cannot be expressed as tiktoken's ranks"):
        to_ranks(Tokenizer(vocab, merges))


def test_ids_in_another_order_than_the_merges_are_refused():
    """The rank is the id, so a token that is merged first must have the lower one."""
    merges = [(b"a", b"b"), (b"c", b"d")]
    with pytest.raises(ValueError, match="in the order of the ids"):
        to_ranks(Tokenizer(BYTES | {256: b"cd", 257: b"ab"}, merges))


def test_merges_are_found_from_ranks():
    """Each token is cut where the lower ranks leave two parts."""
    ranks = {**{token: index for index, token in BYTES.items()}, b"bc": 256, b"ab": 257, b"abc": 258}
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]


def line(token: bytes, rank: int) -> bytes:
    """Return a line of a file of ranks."""
    return base64.b64encode(token) + f" {rank}\n".encode()


GOOD = b"".join(line(token, index) for index, token in BYTES.items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD + b"!!!! 256\n", r":257: expected a token in base64"),
        (GOOD + b"YWI=\n", r":257: expected a token in base64"),
        (GOOD + b"YWI= -1\n", r":257: expected a token in base64"),
        (GOOD + b"YWI= 1 2\n", r":257: expected a token in base64"),
        (GOOD + b"YWI= " + b"9" * 5000 + b"\n", r":257: expected a token in base64"),
        (GOOD + line(b"x" * 5000, 256), r":257: expected a token in base64"),
        (GOOD + line(b"a", 256), r":257: expected each token once"),
        (GOOD + line(b"ab", 98), r"expected "),
        (GOOD + line(b"ab", 300), r"expected the ids 0 to 256"),
        (GOOD + line(b"abc", 256), r"expected tokens that lower ranks make of two parts, found b'abc'"),
        (GOOD[30:], r"expected "),
        (b"", r"expected all 256 single bytes"),
    ],
)
def test_a_file_that_is_not_in_order_is_refused(data, message, tmp_path):
    """The error names the file and, if there is one, the line."""
    path = tmp_path / "ranks"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_ranks(path, pattern="gpt2", special_tokens=[])
    assert str(path) in str(caught.value)
