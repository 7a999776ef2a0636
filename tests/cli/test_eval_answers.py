"""`transformerlm-eval` with `mode = "answers"`: what a model answers is compared with what it should."""

from __future__ import annotations

import json
import tomllib

import pytest

from tests.cli.commands import call, shipped
from tests.inference.helpers import greedy_without_cache
from transformerlm.checkpoints.directory import list_checkpoints
from transformerlm.checkpoints.load import load_model, load_tokenizer
from transformerlm.tokenizer.chat import ChatFormat

PLAIN = 'chat = {system = "", user = "", assistant = " ", end = ".", after = "", special_tokens = []}'
USUAL = ("--mode=answers", "--device=cpu", "--resamples=50", "--toml", PLAIN)
NAMES = ["Ada", "Bob", "Zoë", "Émile"]
TOKENS = 12


def drawn(checkpoint, name: str) -> list[int]:
    """Return the ids that the plain loop draws as an answer to a name."""
    tokenizer = load_tokenizer(checkpoint)
    parts = [tokenizer.encode_ordinary(text) for text in (name, ".", " ")]
    prompt = [tokenizer.special_token_ids["<|endoftext|>"], *(one for part in parts for one in part)]
    return greedy_without_cache(load_model(checkpoint), prompt, TOKENS)


def answer_of(checkpoint, name: str) -> tuple[str, bool]:
    """Return the text of these ids up to its end, and whether it has one."""
    text, end, _ = load_tokenizer(checkpoint).decode(drawn(checkpoint, name)).partition(".")
    return text, bool(end)


@pytest.fixture(scope="module")
def newest(pipeline):
    """Return the last checkpoint of the run."""
    return list_checkpoints(pipeline.run / "checkpoints")[0]


@pytest.fixture(scope="module")
def asked(newest, tmp_path_factory):
    """Return a file in which the answers to half of the names are those of the model, and how many those are."""
    rows, right = [], 0
    for number, name in enumerate(NAMES):
        text, is_whole = answer_of(newest, name)
        right += number % 2 == 0 and is_whole
        messages = [
            {"role": "user", "content": name},
            {"role": "assistant", "content": text if number % 2 == 0 else f"not {text}"},
        ]
        rows.append({"messages": messages, "kind": "even" if number % 2 == 0 else "odd"})
    path = tmp_path_factory.mktemp("asked") / "test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path, right


def evaluate(path, *arguments):
    """Call the command on a file."""
    return call("eval", *USUAL, f"--max_new_tokens={TOKENS}", "--input", path, *arguments)


def test_answers_are_right_where_they_are_those_of_the_model(asked, newest):
    """One JSON line with shares and sizes, by kind too; a table and wrong answers on stderr."""
    path, right = asked
    done = evaluate(path, "--checkpoint", newest)
    assert done.code == 0, done.stderr
    (record,) = done.records
    assert (record["event"], record["params.mode"]) == ("evaluated", "answers")
    assert record["metrics.exact_match"] == right / 4
    assert (record["metrics.answers"], record["metrics.conversations"], record["questions"]) == (4, 4, 4)
    assert (record["partial"], record["stopped_by"]) == (False, None)
    assert record["kinds"]["even"]["exact_match"] == right / 2
    assert record["kinds"]["odd"]["exact_match"] == 0.0
    assert "exactly right" in done.stderr
    assert "wrong: Bob  found " in done.stderr


def test_the_field_of_the_messages_is_no_other_format(asked, newest, tmp_path, monkeypatch):
    """The strings around messages stay those that the checkpoint was trained with."""
    rows = [json.loads(line) for line in asked[0].read_text().splitlines()]
    path = tmp_path / "dialog.jsonl"
    path.write_text("".join(json.dumps({"dialog": row["messages"]}) + "\n" for row in rows))
    known = ChatFormat.of(tomllib.loads(PLAIN)["chat"])
    monkeypatch.setattr("transformerlm.checkpoints.chat_format.chat_format_of", lambda _: known)
    words = ["--mode=answers", "--checkpoint", newest, "--input", path, "--chat.messages_field=dialog", "--device=cpu"]
    (tmp_path / "eval.toml").write_text(call("eval", *words, f"--max_new_tokens={TOKENS}", "--print-config").stdout)
    done = call("eval", "--config", tmp_path / "eval.toml")  # as printed, which names no other string
    assert done.code == 0, done.stderr
    assert done.records[0]["metrics.exact_match"] == asked[1] / 4


def test_the_model_ends_its_answers(asked):
    """Otherwise the test above would only show that no answer is right."""
    assert asked[1] == 2


def test_an_answer_that_does_not_end_is_wrong(newest, tmp_path):
    """Even if it is right as far as it goes."""
    text = load_tokenizer(newest).decode(drawn(newest, "Ada")[:1])
    assert "." not in text
    messages = [{"role": "user", "content": "Ada"}, {"role": "assistant", "content": text}]
    (tmp_path / "cut.jsonl").write_text(json.dumps({"messages": messages}))
    done = evaluate(tmp_path / "cut.jsonl", "--checkpoint", newest, "--max_new_tokens=1")
    assert done.records[0]["metrics.exact_match"] == 0.0
    assert "found no end, expected" in done.stderr


def test_two_checkpoints_are_compared_on_the_same_questions(asked, newest, pipeline):
    """Both columns are in the table, and the difference is paired."""
    older = list_checkpoints(pipeline.run / "checkpoints")[1]
    done = evaluate(asked[0], "--compare", older, newest)
    assert done.code == 0, done.stderr
    (record,) = done.records
    difference = record["b.metrics.exact_match"] - record["a.metrics.exact_match"]
    assert record["metrics.exact_match_difference"] == pytest.approx(difference)
    assert record["a.kinds"].keys() == record["b.kinds"].keys() == {"even", "odd"}
    assert "second - first" in done.stderr


def test_the_batch_does_not_change_the_answers(asked, newest):
    """One at a time gives the same record."""
    records = [evaluate(asked[0], "--checkpoint", newest, f"--batch_size={size}").records[0] for size in (1, 3)]
    assert records[0] == records[1]


def test_a_part_of_the_conversations_is_drawn_or_the_time_ends_it(asked, newest):
    """The record says so, and at least one question is answered."""
    (record,) = evaluate(asked[0], "--checkpoint", newest, "--max_documents=2").records
    assert (record["partial"], record["stopped_by"], record["metrics.conversations"]) == (True, None, 2)
    done = evaluate(asked[0], "--checkpoint", newest, "--time=0.0001s", "--batch_size=1")
    (record,) = done.records
    assert (record["partial"], record["stopped_by"]) == (True, "time")
    assert 1 <= record["metrics.answers"] < 4
    assert "partial (time): of 4 questions" in done.stderr


def test_questions_longer_than_the_context_are_told_of(newest, tmp_path):
    """The model reads their end, and a line says how many there are."""
    messages = [{"role": "user", "content": "Ada sees the sea " * 9}, {"role": "assistant", "content": "a"}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": messages}))
    done = evaluate(tmp_path / "long.jsonl", "--checkpoint", newest)
    assert done.code == 0, done.stderr
    assert "1 of 1 questions are longer than its context: it reads their end" in done.stderr


def test_right_answers_that_hold_the_end_are_told_of(newest, tmp_path):
    """No model can give them, so a line says how many they are, and the record does."""
    rows = [[{"role": "user", "content": "Ada"}, {"role": "assistant", "content": text}] for text in ("a. b", "a b")]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    done = evaluate(tmp_path / "held.jsonl", "--checkpoint", newest)
    assert done.code == 0, done.stderr
    told = '1 of 2 right answers hold the string that ends an answer ("."): none of these can be right'
    assert done.stderr.count(told) == 1
    assert done.records[0]["metrics.out_of_reach"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode=answers", "--stride=4"), 'stride is not for mode = "answers", found stride = 4'),
        (("--mode=answers", "--context_length=4"), 'context_length is not for mode = "answers"'),
        (("--mode=answers", "--allow_special=true"), 'allow_special is not for mode = "answers"'),
        (("--mode=answers", "--text_field=a"), 'text_field is not for mode = "answers": chat.messages_field is'),
        (("--chat.end=.",), 'chat is for mode = "answers", found mode = "documents"'),
        (("--max_new_tokens=5",), 'max_new_tokens is for mode = "answers", found mode = "documents"'),
        (("--kind_field=a",), 'kind_field is for mode = "answers", found mode = "documents"'),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments, message):
    """Each error names the key, and exits with 2."""
    done = call("eval", "--config", shipped("eval"), *arguments)
    assert done.code == 2
    assert message in done.stderr


def test_a_model_that_knows_no_chat_is_refused(asked, newest):
    """ChatML needs its tokens, and the line says which is missing."""
    done = call("eval", "--mode=answers", "--input", asked[0], "--checkpoint", newest, "--device=cpu")
    assert done.code == 2
    assert "found '<|im_start|>'" in done.stderr
