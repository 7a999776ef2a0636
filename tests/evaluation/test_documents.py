"""Documents are cut in the same way from any files, and have the bytes of the text."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from databuilder.dataset_builder import build_dataset
from tests.evaluation.helpers import tiny_model
from tests.token_files.shards import as_shards
from transformerlm.evaluation.documents import draw, encode_documents, open_token_file, read_documents
from transformerlm.evaluation.scoring import score_documents
from transformerlm.evaluation.statistics import summarize
from transformerlm.tokenizer import Tokenizer, train_bpe
from transformerlm.utils.text_files import ReadStats

END = "<|endoftext|>"
TEXTS = ["The sea.\nA tree.", "Zoë finds 🍎🍎!", " 漢字 and e\u0301\r\n", "'s"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Return a tokenizer that splits other characters into bytes: it was trained on ASCII only."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the sea and the tree and the sea " * 20)
    return Tokenizer(*train_bpe(path, 270, [END]), [END])


def write_cut(folder, form: str) -> list[str]:
    """Write TEXTS in one of several forms, with documents without text between them, and return the files' names."""
    if form == "one file":
        (folder / "a.txt").write_text(END.join(["", *TEXTS, " \n", ""]), newline="")
    elif form == "many files":
        for number, text in enumerate([*TEXTS, "\n"]):
            (folder / f"{number}.txt").write_text(text, newline="")
    elif form == "gz":
        for number in (0, 2):
            (folder / f"{number}.txt.gz").write_bytes(gzip.compress(END.join(TEXTS[number : number + 2]).encode()))
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("form", ["one file", "many files", "gz", "jsonl"])
def test_it_does_not_matter_how_a_text_is_dealt_out_to_files(tmp_path, tokenizer, form):
    """The documents are the same, and so is every number that follows from them."""
    texts = read_documents(write_cut(tmp_path, form))
    assert texts == TEXTS
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    for mode in ("documents", "sliding"):
        metrics, expected = (
            summarize(score_documents(model, encode_documents(them, tokenizer), mode=mode)) for them in (texts, TEXTS)
        )
        assert metrics == expected


def test_bytes_are_those_of_the_text(tokenizer):
    """A document has its UTF-8 bytes, even if single tokens are invalid UTF-8, whatever the tokenizer."""
    documents = encode_documents(TEXTS, tokenizer)
    assert documents.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    parts = np.split(documents.ids, documents.ends[:-1])
    assert [tokenizer.decode(part) for part in parts] == TEXTS
    assert any("\ufffd" in tokenizer.decode([token_id]) for token_id in documents.ids)


def test_half_a_character_has_the_bytes_of_what_is_read_in_its_place(tokenizer):
    """A lone surrogate is encoded as U+FFFD and counted as that."""
    documents = encode_documents(["a\ud83d"], tokenizer)
    assert documents.num_bytes.tolist() == [len("a\ufffd".encode())]
    assert tokenizer.decode(documents.ids) == "a\ufffd"


def test_a_token_file_gives_what_its_text_gives(tmp_path, tokenizer):
    """Ids, ends and bytes of a token file are those of the text it was made from, and its sidecar's sum."""
    paths = write_cut(tmp_path, "one file")
    build_dataset(paths, tokenizer=tokenizer, train_path=tmp_path / "data.npy")
    found, expected = open_token_file(tmp_path / "data.npy", tokenizer), encode_documents(TEXTS, tokenizer)
    for name in ("ids", "ends", "num_bytes"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert found.separator_id == expected.separator_id == tokenizer.special_token_ids[END]
    assert found.num_bytes.sum() == json.loads((tmp_path / "data.json").read_text())["bytes"]


def test_a_folder_of_shards_is_the_text_of_one_file(tmp_path, tokenizer):
    """Documents are the same at any size of a shard; a shard that has changed is refused by name."""
    build_dataset(write_cut(tmp_path, "one file"), tokenizer=tokenizer, train_path=tmp_path / "data.npy")
    expected = open_token_file(tmp_path / "data.npy", tokenizer)
    for size in (1, 20, 1000):
        found = open_token_file(as_shards(tmp_path / "data.npy", tmp_path, shard_tokens=size), tokenizer)
        for name in ("ids", "ends", "num_bytes"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    folder = tmp_path / "data-1.shards"
    (folder / "00002.npy").write_bytes((folder / "00001.npy").read_bytes())
    with pytest.raises(ValueError, match=r"data-1.shards/00002.npy: (tokens|sha256) is"):
        open_token_file(folder, tokenizer)


def test_a_token_file_of_another_tokenizer_is_refused(tmp_path, tokenizer):
    """The error names the file and says what to do."""
    build_dataset(write_cut(tmp_path, "one file"), tokenizer=tokenizer, train_path=tmp_path / "data.npy")
    other = Tokenizer(tokenizer.vocab, tokenizer.merges, [END], pattern="cl100k")
    with pytest.raises(
        ValueError, match=r"data\.npy: made with the tokenizer .*, but the checkpoint's is .*; evaluate"
    ):
        open_token_file(tmp_path / "data.npy", other)


def test_a_tokenizer_without_the_separator_has_no_separator_id(tokenizer):
    """Documents are still cut at the separator."""
    assert encode_documents(TEXTS, Tokenizer(tokenizer.vocab, tokenizer.merges)).separator_id is None


def test_files_without_text_are_refused(tmp_path):
    """Only blanks and separators: an error names the files."""
    (tmp_path / "a.txt").write_text(f" {END}\n")
    with pytest.raises(ValueError, match=r"input: expected text, found none in .*a\.txt"):
        read_documents(tmp_path / "a.txt")


def test_a_long_document_is_put_together_again(tmp_path):
    """A document of several blocks, with separators anywhere in between, is one."""
    texts = ["word " * 500_000 + "end", "b" * 3, "é " * 600_000 + "."]
    (tmp_path / "a.txt").write_text(END.join(texts))
    assert read_documents(tmp_path / "a.txt") == texts


def test_bytes_that_are_no_utf8_are_counted_or_refused(tmp_path):
    """Invalid bytes are read as U+FFFD, which has three bytes, or are an error."""
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    stats = ReadStats()
    assert read_documents(tmp_path / "a.txt", stats=stats) == ["a\ufffdb"]
    assert stats.invalid_utf8 == 1
    with pytest.raises(ValueError, match="expected UTF-8"):
        read_documents(tmp_path / "a.txt", stats=ReadStats(refuse_invalid=True))


@pytest.mark.filterwarnings("ignore:rows spell")
def test_rows_are_plain_text_unless_special_tokens_are_allowed(tmp_path, tokenizer):
    """What a row spells is its text, as in make-data: no document ends in it, and no id is a special token's."""
    row = f"GPT-2's {END} ends a text."
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": row}) + "\n" + json.dumps({"text": "two"}) + "\n")
    (tmp_path / "b.txt").write_text(row)
    texts = read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    assert texts == [row, "two", "GPT-2's ", " ends a text."]
    documents = encode_documents(texts, tokenizer)
    parts = np.split(documents.ids, documents.ends[:-1])
    assert [part.tolist() for part in parts] == [tokenizer.encode_ordinary(text) for text in texts]
    assert documents.num_bytes.tolist() == [len(text.encode()) for text in texts]
    build_dataset([tmp_path / "a.jsonl", tmp_path / "b.txt"], tokenizer=tokenizer, train_path=tmp_path / "data.npy")
    assert open_token_file(tmp_path / "data.npy", tokenizer).ids.tolist() == documents.ids.tolist()
    assert read_documents(tmp_path / "a.jsonl", allow_special=True) == ["GPT-2's ", " ends a text.", "two"]


def test_a_character_in_two_halves_has_the_bytes_of_the_character(tokenizer):
    """A surrogate pair is one character of four bytes, for ids and bytes alike."""
    assert encode_documents(["a\ud83d\udc4d"], tokenizer).num_bytes.tolist() == [5]


def test_drawn_documents_are_those_of_the_text(tokenizer):
    """As many as asked for, each once, in order, the same for a seed, with their ids and bytes unchanged."""
    drawn = draw(5, 100, seed=3)
    assert (
        drawn.tolist() == sorted(set(drawn.tolist())) == draw(5, 100, seed=3).tolist() != draw(5, 100, seed=4).tolist()
    )
    assert draw(9, 4, seed=0).tolist() == [0, 1, 2, 3]
    documents = encode_documents(TEXTS, tokenizer)
    some, expected = documents.take(np.array([1, 3])), encode_documents([TEXTS[1], TEXTS[3]], tokenizer)
    for name in ("ids", "ends", "num_bytes", "id_bytes"):
        assert getattr(some, name).tolist() == getattr(expected, name).tolist(), name
    assert (some.separator_id, some.start_id) == (documents.separator_id, documents.start_id)


def test_the_bytes_of_ids_add_up_to_those_of_a_document(tokenizer):
    """The bytes that the ids of a text stand for are the text."""
    documents = encode_documents(TEXTS, tokenizer)
    totals = np.cumsum(documents.id_bytes[documents.ids])[documents.ends - 1]
    assert np.diff(totals, prepend=0).tolist() == documents.num_bytes.tolist()
