"""The index of a folder of shards: what is missing, damaged, too much or not its own is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.token_files.shards import FACTS, ids_with_documents, write_shards
from transformerlm.token_files import sidecar
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.index import Shard, read_index, stream_sha256, write_index
from transformerlm.token_files.sidecar import write_facts

IDS = ids_with_documents(300)
PARTS = [IDS[:100], IDS[100:200], IDS[200:]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three shards of 100 ids, of which the second is listed twice."""
    return write_shards(tmp_path / "train.shards", PARTS, order=[0, 1, 1, 2])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index as a stranger may: with a sha256 of its values that fits."""
    path = folder / "index.json"
    facts = json.loads(path.read_text())
    change(facts)
    del facts["sidecar_sha256"]
    write_facts(path, facts)


def test_an_index_says_what_its_shards_say(folder: Path) -> None:
    """Totals count an entry as often as it is listed; the facts are those of a sidecar."""
    data = TokenDataset(folder)
    assert (data.num_tokens, data.num_bytes, data.vocab_size) == (400, 800, 1000)
    assert data.tokenizer_sha256 == FACTS["tokenizer_sha256"]
    assert data.metadata["separator_id"] == FACTS["separator_id"]
    facts, shards = read_index(folder)
    assert facts["format"] == 2
    assert [shard.file for shard in shards] == ["00000.npy", "00001.npy", "00001.npy", "00002.npy"]
    assert data.num_documents == sum(np.count_nonzero(PARTS[number] == 0) for number in (0, 1, 1, 2)) + sum(
        PARTS[number][-1] != 0 for number in (0, 1, 1, 2)
    )


def test_documents_of_shards_are_found_in_the_stream(tmp_path: Path) -> None:
    """Offsets count over all shards; the last document needs no separator; nothing is one shard of nothing."""
    ids = np.append(ids_with_documents(300), 5).astype(np.uint16)
    ends = np.flatnonzero(ids == 0) + 1
    cut = int(ends[len(ends) // 2])
    data = TokenDataset(write_shards(tmp_path / "a.shards", [ids[:cut], ids[cut:]]))
    np.testing.assert_array_equal(data.document_offsets, [0, *ends, 301])
    assert data.num_documents == len(ends) + 1
    empty = TokenDataset(write_shards(tmp_path / "b.shards", [ids[:0]]))
    assert (len(empty), empty.num_documents, empty.check(), len(empty.files())) == (0, 0, -1, 1)


def test_the_total_sha256_is_that_of_the_ids_in_order() -> None:
    """It changes with the order and the number of entries, and not with the names of the files."""
    first, second = Shard("a.npy", 5, 5, 1, "aa" * 32), Shard("b.npy", 6, 5, 1, "bb" * 32)
    renamed = Shard("c.npy", 5, 9, 2, "aa" * 32)
    sums = [stream_sha256(shards) for shards in ([first, second], [second, first], [first, first, second])]
    assert len(set(sums)) == 3
    assert stream_sha256([renamed, second]) == sums[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.update(format=3), "expected format 2, found 3"),
        (lambda facts: facts.update(tokens=401), "expected tokens to be 400, the sum over its shards, found 401"),
        (lambda facts: facts.update(documents=1), "expected documents to be"),
        (lambda facts: facts.update(sha256="00" * 32), "expected sha256 .* that of its shards, found 000"),
        (lambda facts: facts.update(vocab_size=None), "expected vocab_size of type int, found None"),
        (lambda facts: facts.update(dtype="nonsense"), "expected dtype uint16 or uint32, found 'nonsense'"),
        (lambda facts: facts.update(dtype="float32"), "expected dtype uint16 or uint32, found 'float32'"),
        (lambda facts: facts.update(shards=[]), r"expected a list of shards, found \[\]"),
        (lambda facts: facts.update(shards=[1]), "expected a list of shards"),
        (lambda facts: facts["shards"][0].pop("sha256"), r"shards\[0\]: expected sha256 of type str, found None"),
        (lambda facts: facts["shards"][0].update(sha256="zz"), r"shards\[0\]: expected sha256 of 64 hexadecimal"),
        (lambda facts: facts["shards"][3].update(documents_sha256=5), r"shards\[3\]: expected documents_sha256 of 64"),
        (lambda facts: facts["shards"][0].update(tokens=-1), r"shards\[0\]: expected tokens >= 0, found -1"),
        (lambda facts: facts["shards"][0].update(tokens=True), r"shards\[0\]: expected tokens of type int, found True"),
        (lambda facts: facts["shards"][2].update(tokens=9), "the same facts for 00001.npy wherever it is listed"),
        (lambda facts: facts["shards"][0].update(file="../00000.npy"), "expected the name of a token file in this"),
        (lambda facts: facts["shards"][0].update(file="/etc/x.npy"), "expected the name of a token file in this"),
        (lambda facts: facts["shards"][0].update(file="00000.documents.npy"), "expected the name of a token file"),
        (lambda facts: facts["shards"][0].update(file="00000.npy\n"), "expected the name of a token file"),
    ],
)
def test_an_index_with_a_strangers_values_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """The error names the index, what it should say and what it says, even where the values' own sha256 fits."""
    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"index.json: .*{message}|index.json: {message}") as error:
        TokenDataset(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_totals_that_no_file_can_have_are_refused(folder: Path) -> None:
    """A stranger's 10^30 tokens are an error of one line, and neither an overflow nor an allocation."""

    def change(facts: dict[str, Any]) -> None:
        facts["shards"][0]["tokens"] = 10**30
        facts["tokens"] = 10**30 + 300
        facts["sha256"] = stream_sha256(
            Shard(*(entry[key] for key in ("file", "tokens", "bytes", "documents", "sha256")))
            for entry in facts["shards"]
        )

    rewrite(folder, change)
    with pytest.raises(ValueError, match="expected at most 4611686018427387904 tokens, found 10000"):
        TokenDataset(folder)


def test_a_changed_or_missing_index_is_refused(folder: Path) -> None:
    """A byte of the index that changed, no JSON, no index: each is one line with a remedy."""
    path = folder / "index.json"
    good = path.read_text()
    path.write_text(good.replace("<|endoftext|>", "<|endofsong|>"))
    with pytest.raises(ValueError, match="its values have changed since it was written"):
        TokenDataset(folder)
    path.write_text(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"index.json:\d+: expected JSON.*run transformerlm-make-data again"):
        TokenDataset(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train.shards: expected a folder of token files with an index.json"):
        TokenDataset(folder)


def test_missing_extra_and_strange_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    """A shard that is missing, one too many, and a link out of the folder are found before any shard is opened."""
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a/00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.npy: listed in index.json, but missing, as 1 of 3 shards are"):
        TokenDataset(tmp_path / "a")
    (tmp_path / "a/00001.npy").symlink_to(folder / "00001.npy")
    with pytest.raises(ValueError, match=r"00001.npy: expected a file in this folder, found a link to .*train.shards"):
        TokenDataset(tmp_path / "a")
    shutil.copy(folder / "00001.npy", folder / "00003.npy")
    with pytest.raises(ValueError, match=r"00003.npy: expected only the 3 shards that index.json lists.*move it out"):
        TokenDataset(folder)
    (folder / "00003.npy").rename(folder / ".00003.npy.tmp")
    assert len(TokenDataset(folder)) == 400


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IDS[:99], "tokens is 100 in index.json, found 99 in the file"),
        (IDS[:101], "tokens is 100 in index.json, found 101 in the file"),
        (IDS[:100].astype(np.uint32), "dtype is uint16 in index.json, found uint32 in the file"),
        (IDS[:100].astype(np.float64), "found 1-D float64"),
    ],
)
def test_a_shard_that_is_not_what_the_index_says_is_refused_when_it_is_read(
    folder: Path, array: np.ndarray, message: str
) -> None:
    """Another length or type shows when the shard is opened, and when all are checked."""
    np.save(folder / "00001.npy", array)
    data = TokenDataset(folder)
    assert data.tokens[5] == IDS[5]
    with pytest.raises(ValueError, match=message):
        data.tokens[150:160]
    with pytest.raises(ValueError, match=f"{message}|sha256 is"):  # uint32 has as many ids
        data.check()


def test_the_files_are_checked_one_by_one(folder: Path) -> None:
    """Each distinct file is hashed and searched in one go, so that ranks can share them; a changed byte is found."""
    data = TokenDataset(folder)
    assert [file.check() for file in data.files()] == [int(part.max()) for part in PARTS]
    assert data.check() == IDS.max()
    content = bytearray((folder / "00002.npy").read_bytes())
    content[-1] ^= 1
    (folder / "00002.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"00002.npy: sha256 is .* in index.json, found .* in the file"):
        data.files()[2].check()
    with pytest.raises(ValueError, match=r"00002.npy: sha256 is .* in index.json, found .* in the file"):
        data.check()


def test_an_index_is_only_written_over_the_shards_that_it_lists(folder: Path) -> None:
    """A shard that is missing, of another length, or not listed is found before there is an index."""
    facts, shards = read_index(folder)
    known = {key: facts[key] for key in ("dtype", *FACTS)}
    with pytest.raises(FileNotFoundError, match=r"00009.npy: listed in index.json, but missing"):
        write_index(folder, [*shards, Shard("00009.npy", 1, 1, 1, "00" * 32)], known)
    assert not (folder / "index.json").exists()
    with pytest.raises(ValueError, match=r"00002.npy: expected only the 2 shards"):
        write_index(folder, shards[:2], known)
    (folder / "00002.npy").unlink()
    with pytest.raises(ValueError, match=r"expected vocab_size of type int, found None"):
        write_index(folder, shards[:2], {"dtype": "uint16"})
    write_index(folder, shards[:2], known)
    assert len(TokenDataset(folder)) == 200


def test_an_index_that_nobody_could_read_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's limit is the reader's: what it writes can be read, and one byte more is refused before that."""
    facts, shards = read_index(folder)
    known = {key: facts[key] for key in ("dtype", *FACTS)}
    size = (folder / "index.json").stat().st_size
    monkeypatch.setattr(sidecar, "MAX_BYTES", size)
    write_index(folder, shards, known)
    assert len(TokenDataset(folder)) == 400
    monkeypatch.setattr(sidecar, "MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match=rf"index.json: expected at most {size - 1:,} bytes to write, found {size:,}"):
        write_index(folder, shards, known)
    assert not (folder / "index.json").exists()
