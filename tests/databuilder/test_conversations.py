"""Conversations from templates: the same for a seed, valid for make-data, and a test that training cannot know."""

from __future__ import annotations

import hashlib
import json

import pytest

from databuilder.conversations import (
    DEFAULT_TEST,
    SENTENCES,
    SHORT_ANSWERS,
    TEST,
    TRAIN,
    main,
    split_kinds,
    write_conversations,
)
from transformerlm.utils.conversations import conversation_as_text

NUMBER = 8_000


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the rows of both files."""
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(folder, train=NUMBER)
    return [[json.loads(line) for line in (folder / name).read_text().splitlines()] for name in (TRAIN, TEST)]


def asked_of(rows) -> set[str]:
    """Return each question, with all that was said before it but the system's words."""
    asked = set()
    for row in rows:
        said = [message["content"] for message in row["messages"] if message["role"] != "system"]
        asked |= {"\n".join(said[: place + 1]) for place in range(0, len(said), 2)}
    return asked


def test_the_same_seed_gives_the_same_files(tmp_path):
    """A seed is two files, to the byte, on every machine and Python; another seed is others."""
    sums = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert write_conversations(tmp_path / name, train=500, test=80, seed=seed) == {TRAIN: 500, TEST: 80}
        data = b"".join((tmp_path / name / file).read_bytes() for file in (TRAIN, TEST))
        sums.append(hashlib.sha256(data).hexdigest()[:16])
    assert sums[0] == sums[1] != sums[2]
    assert sums[0] == "24768f4e4bb46aad"


def test_no_question_of_the_test_is_in_training(written):
    """Neither with what was said before it, nor by the thing that it asks for."""
    train, test = written
    assert not asked_of(train) & asked_of(test)
    for_training, for_test = split_kinds(seed=0)
    assert for_training.keys() == for_test.keys()
    for name, kind in for_training.items():
        keys = [set(map(repr, side.keys)) for side in (kind, for_test[name])]
        assert min(map(len, keys)) > 0
        assert not keys[0] & keys[1], name


def test_a_word_of_the_test_is_of_the_test_in_all_kinds():
    """Who has counted the letters of a word has half spelled it."""
    for_training, for_test = split_kinds(seed=0)
    assert for_training["spelling"].keys == for_training["letters"].keys
    assert for_test["addition"].keys == for_test["subtraction"].keys


def test_rows_are_conversations_that_make_data_takes(written):
    """Messages in turn, a system message first if at all, the assistant's last."""
    for row in written[0] + written[1]:
        conversation_as_text(row["messages"], where="row")
        roles = [message["role"] for message in row["messages"]]
        assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)


def test_kinds_and_systems_are_shared_out(written):
    """As many of each kind, a third with each system message, and each kind goes on now and then."""
    train, test = written
    for rows in (train, test):
        counts = {kind: sum(row["kind"] == kind for row in rows) for kind in {row["kind"] for row in rows}}
        assert set(counts.values()) == {len(rows) // 8}
    assert len(test) == DEFAULT_TEST
    systems = [row["messages"][0]["content"] for row in train if row["messages"][0]["role"] == "system"]
    for words in (SHORT_ANSWERS, SENTENCES):
        assert systems.count(words) == pytest.approx(NUMBER / 3, rel=0.1)
    for kind in {row["kind"] for row in train}:
        assert any(len(row["messages"]) > 3 for row in train if row["kind"] == kind)


def test_the_system_decides_how_long_answers_are(written):
    """A sentence ends with a full stop; a short answer never does."""
    for row in written[0]:
        wants_sentences = row["messages"][0]["content"] == SENTENCES
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert all(answer.endswith(".") == wants_sentences for answer in answers), row


def test_the_test_has_each_conversation_once(written):
    """A kind with few questions has fewer, and does not go on for ever."""
    test = [json.dumps(row) for row in written[1]]
    assert len(set(test)) == len(test)


def test_a_kind_that_runs_out_has_fewer(tmp_path):
    """Seven names are asked for in few ways."""
    numbers = write_conversations(tmp_path, train=8, test=16_000)
    assert 8_000 < numbers[TEST] < 16_000


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    """A line for each file."""
    main([str(tmp_path / "chat"), "--train", "80", "--test", "16"])
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'chat' / TRAIN}: 80 conversations",
        f"{tmp_path / 'chat' / TEST}: 16 conversations",
    ]


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--test", "-1"], ["--seed", "x"]])
def test_a_mistake_is_an_error(arguments, tmp_path, capsys):
    """Exit code 2 and a line; nothing is written."""
    with pytest.raises(SystemExit) as done:
        main([str(tmp_path / "chat"), *arguments])
    assert done.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "chat").exists()


def test_a_file_is_no_place_for_them(tmp_path, capsys):
    """The line names the file and says what was expected."""
    (tmp_path / "chat").write_text("")
    with pytest.raises(SystemExit) as done:
        main([str(tmp_path / "chat")])
    assert done.value.code == 2
    assert f"error: {tmp_path / 'chat'}: expected a directory, found a file\n" in capsys.readouterr().err
