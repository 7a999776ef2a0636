"""Questions from conversations, and the shares of right answers with their intervals."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from transformerlm.evaluation.answers import (
    Question,
    compare_answers,
    count_out_of_reach,
    read_questions,
    score_answers,
    score_by_kind,
)

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 1 more?"},
    {"role": "assistant", "content": "5"},
]


def write(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def some(number: int, *, kind: str = "", each: int = 1) -> list[Question]:
    """Return questions, as many of each conversation."""
    return [Question((), "a", kind, one // each, f"a.jsonl:{one}") for one in range(number)]


def test_each_message_of_an_assistant_is_a_question(tmp_path):
    """What comes before it is as the file has it, and not as some model answered it."""
    rows = [{"messages": ASKED, "kind": "sums"}, {"messages": ASKED[1:3]}]
    first, second, third = read_questions(write(tmp_path / "a.jsonl", rows))
    assert first == Question((("system", "Be brief."), ("user", "2 + 2?")), "4", "sums", 0, f"{tmp_path / 'a.jsonl'}:1")
    assert [role for role, _ in second.messages] == ["system", "user", "assistant", "user"]
    assert (second.reference, second.conversation) == ("5", 0)
    assert (third.kind, third.conversation, third.where) == ("", 1, f"{tmp_path / 'a.jsonl'}:2")


def test_several_files_are_read_packed_or_not(tmp_path):
    """Conversations are numbered through all of them, empty lines and a BOM are none, and fields have other names."""
    rows = [{"chat": ASKED[1:3], "topic": "sums"}] * 2
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes() + b"\n\n")
    )
    found = read_questions([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], messages_field="chat", kind_field="topic")
    assert [(question.conversation, question.kind) for question in found] == [(n, "sums") for n in range(4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "a.jsonl:2: expected a JSON object"),
        ("{", "a.jsonl:2:1: expected JSON"),
        ('{"chat": []}', "a.jsonl:2: expected the field 'messages', found ['chat'] (set chat.messages_field)"),
        ('{"messages": []}', "a.jsonl:2: expected a list of messages, found an empty array"),
        ('{"messages": [{"role": "tool", "content": ""}]}', "a.jsonl:2: message 1: expected the role system, user or"),
        ('{"messages": [], "kind": 3}', "a.jsonl:2: expected text under 'kind', found a number (set kind_field)"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(line, message, tmp_path):
    """File, line, what was expected and what was found."""
    path = write(tmp_path / "a.jsonl", [{"messages": ASKED}])
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_questions(path)


def test_what_asks_nothing_is_refused(tmp_path):
    """A file of another kind, and conversations in which no assistant speaks."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt: expected conversations as JSON lines"):
        read_questions(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"expected messages of an assistant, found none in .*b\.jsonl"):
        read_questions(write(tmp_path / "b.jsonl", [{"messages": ASKED[:2]}]))


def test_invalid_utf8_is_replaced_or_refused(tmp_path):
    """As in the other modes of the command."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"messages": ASKED[1:3]}).encode().replace(b"2 + 2?", b"\xff?"))
    assert read_questions(path)[0].messages == (("user", "\ufffd?"),)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected UTF-8, found byte 0xff"):
        read_questions(path, refuse_invalid=True)


def test_right_answers_that_end_early_are_counted():
    """Those that hold the string, and those whose end begins it; a token that ends answers cuts no text."""
    questions = [Question((), text, "", 0, "a.jsonl:1") for text in ("4", "", "4\n", "4\n\n5", "\n4")]
    assert count_out_of_reach(questions, ["\n\n"]) == 2
    assert count_out_of_reach(questions, ["\n"]) == 3
    assert count_out_of_reach(questions, []) == 0


def test_the_share_is_that_of_the_answers():
    """Three of four are right; a question of another conversation weighs the same."""
    found = score_answers(some(4), [True, True, False, True], resamples=200)
    assert (found["exact_match"], found["answers"], found["conversations"]) == (0.75, 4, 4)
    assert 0.0 <= found["exact_match_low"] < 0.75 < found["exact_match_high"] <= 1.0


def test_answers_of_one_conversation_are_drawn_together():
    """So ten answers of two conversations tell less than ten of ten; one conversation has no interval."""
    right = [True] * 5 + [False] * 5
    apart, together = (score_answers(some(10, each=each), right, resamples=500) for each in (1, 5))
    assert (together["exact_match_low"], together["exact_match_high"]) == (0.0, 1.0)
    assert apart["exact_match_low"] > 0.0
    assert score_answers(some(10, each=10), right)["exact_match_low"] is None
    assert score_answers(some(10), right, resamples=0)["exact_match_low"] is None


def test_kinds_are_counted_apart():
    """Each by its own questions; without kinds there are none."""
    questions = [*some(2, kind="sums"), *some(3, kind="words"), *some(1)]
    found = score_by_kind(questions, [True, False, True, True, True, False], resamples=0)
    assert {kind: (each["answers"], each["exact_match"]) for kind, each in found.items()} == {
        "sums": (2, 0.5),
        "words": (3, 1.0),
    }
    assert score_by_kind(some(2), [True, True]) == {}


def test_the_difference_is_paired():
    """Where both are right on the same questions, chance in the choice of questions says nothing."""
    first = [True, False] * 20
    same = compare_answers(some(40), first, first)
    assert same == {
        "exact_match_difference": 0.0,
        "exact_match_difference_low": 0.0,
        "exact_match_difference_high": 0.0,
    }
    better = compare_answers(some(40), first, [True] * 40, resamples=300)
    assert better["exact_match_difference"] == 0.5
    assert 0.3 < better["exact_match_difference_low"] < 0.5 < better["exact_match_difference_high"] < 0.7
