"""The compared trainers: each learns the same number of merges from the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarking.tokenizer.trainers import TRAINERS, Merges, Training, same_merges

EOT = "<|endoftext|>"
SENTENCE = "the cat sat on the mat, the cat's mat — früh, 漢字 42 and the dog lay on the rug while it rained"


def learnt(name: str, folder: Path) -> Merges:
    """Train on a small text and return the merges."""
    if name not in ("transformerlm", "reference"):
        pytest.importorskip(name)
    path = folder / "text.txt"
    words = SENTENCE.split()
    path.write_text(EOT.join(" ".join(words[start:]) for start in range(len(words))), encoding="utf-8")
    trainer = TRAINERS[name](Training(path, 300, EOT, 1, "compiled"))
    trainer.train()
    return trainer.merges()


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_as_many_merges_of_the_same_text(name: str, tmp_path: Path) -> None:
    """300 ids are 256 bytes, the separator and 43 merges; the most frequent pair comes first, the separator never."""
    merges = learnt(name, tmp_path)
    tokens = [b"".join(parts) for parts in merges]
    assert len(merges) == 43
    assert tokens[0] in (b" t", b"th", b"he", b"at")
    assert name == "gigabpe" or not any(b"|" in token for token in tokens)


def test_our_engines_learn_the_same(tmp_path: Path) -> None:
    """The compiled engine's merges are the reference's."""
    assert same_merges(learnt("transformerlm", tmp_path), learnt("reference", tmp_path))


def test_gigatoken_ties_are_hugging_faces(tmp_path: Path) -> None:
    """Both break ties in the same way, so their merges are equal if both see whole documents."""
    assert same_merges(learnt("gigatoken", tmp_path), learnt("tokenizers", tmp_path))


def test_merges_are_compared_by_their_parts_where_both_tell_them() -> None:
    """The same token from other parts is another merge; a library that reports only tokens is compared by tokens."""
    ours: Merges = [(b"a", b"b"), (b"ab", b"c")]
    assert same_merges(ours, list(ours))
    assert not same_merges(ours, [(b"a", b"b"), (b"a", b"bc")])
    assert same_merges(ours, [(b"ab",), (b"abc",)])
    assert not same_merges(ours, [(b"ab",), (b"bc",)])
    assert not same_merges(ours, ours[:1])
