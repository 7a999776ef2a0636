"""The compiled merging of one piece: the same tokens as the reference's, whatever the windows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest

from tests.tokenizer import plain_kernels
from transformerlm.tokenizer.bpe_merge import merge_by_heap
from transformerlm.tokenizer.pair_table import learn_merges

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import merge_kernels as compiled_kernels
from transformerlm.tokenizer.fast.arrays import PADDING

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # hashes wrap around
PLAIN = plain_kernels.load()["merge_kernels"]
BYTE_IDS = np.arange(256, dtype=np.int64)


class Merger:
    """Learned merges as the kernels and as the reference need them."""

    def __init__(self, alphabet: bytes, seed: int, *, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        """Learn merges from words of the alphabet, or take `pairs` as they are."""
        rng = random.Random(seed)
        words = Counter(bytes(rng.choices(alphabet, k=rng.randint(1, 25))) for _ in range(40))
        merges = learn_merges(words, 80)
        tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
        ids = {token: token_id for token_id, token in enumerate(tokens)}
        pairs = [(ids[left], ids[right]) for left, right in merges] if pairs is None else pairs
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        rows = [(*pair, 256 + rank) for pair, rank in self.ranks.items()]
        self.marked = PLAIN.mark_certain(np.array(rows, dtype=np.int64).reshape(-1, 3))
        table = compiled_kernels.empty_pairs(len(rows))
        PLAIN.fill_pairs(self.marked, table)
        lengths = np.array(list(map(len, tokens)), dtype=np.int64)
        self.merges = compiled_kernels.Merges(BYTE_IDS, table, lengths)

    def by_kernel(self, kernels: ModuleType, word: bytes) -> list[int]:
        """Return the ids that a kernel writes after one that is there."""
        data = np.frombuffer(bytearray(word + bytes(PADDING)), dtype=np.uint8)
        work = np.full(kernels.WORK_PER_BYTE * max(1, len(word)), -7, dtype=np.int64)
        out = np.full(1 + len(word), 97, dtype=np.uint32)
        end = kernels.merge_piece(data, 0, len(word), self.merges, work, out, 1)
        return out[1:end].tolist()

    def by_reference(self, word: bytes) -> list[int]:
        """Return the ids of the reference."""
        return merge_by_heap(list(word), self.ranks, list(range(256, 999)))


def test_certain_merges_change_no_tokens_whatever_the_merges() -> None:
    """Merges in any order, of parts that are made later too: those that are made at once are those of the reference."""
    rng, num_certain = random.Random(4), 0
    for _ in range(60):
        ids = [*b"abcd", *range(256, 256 + 24)]
        pairs = rng.sample([(left, right) for left in ids for right in ids], 24)
        pairs[: len(pairs) // 2] = rng.sample([(left, right) for left in b"abcd" for right in b"abcd"], 12)
        merger = Merger(b"a", 0, pairs=list(dict.fromkeys(pairs)))
        num_certain += int((merger.marked[:, 2] & PLAIN.CERTAIN > 0).sum())
        for _ in range(20):
            word = bytes(rng.choices(b"abcd", k=rng.randint(1, 40)))
            assert merger.by_kernel(compiled_kernels, word) == merger.by_reference(word), (pairs, word)
    assert num_certain > 100


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc", b"aabbbbc"])
@pytest.mark.parametrize(("window", "scanned"), [(2, 1), (3, 4), (7, 8), (32, 64)])
def test_windows_of_any_size_give_the_references_tokens(
    alphabet: bytes, window: int, scanned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows far too small are joined, tried again, grown and gone back from; no read or write leaves its array."""
    monkeypatch.setattr(PLAIN, "WINDOW_BYTES", window)
    monkeypatch.setattr(PLAIN, "SCANNED_BYTES", scanned)
    merger, rng = Merger(alphabet, 1), random.Random(1)
    for length in [1, 2, 5, 9, 33, 65, 66, 100, 300]:
        for _ in range(3):
            word = bytes(rng.choices(alphabet, k=length))
            assert merger.by_kernel(PLAIN, word) == merger.by_reference(word), word


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc", b"aabbbbc", bytes(range(256))])
def test_long_pieces_have_the_references_tokens(alphabet: bytes) -> None:
    """The compiled kernel and the reference agree on pieces of thousands of bytes, repeated ones too."""
    for seed in range(8):
        merger, rng = Merger(alphabet, seed), random.Random(seed)
        for length in (65, 200, 3_000):
            word = bytes(rng.choices(alphabet, k=length))
            assert merger.by_kernel(compiled_kernels, word) == merger.by_reference(word)
            word = (bytes(rng.choices(alphabet, k=rng.randint(1, 9))) * length)[:length]
            assert merger.by_kernel(compiled_kernels, word) == merger.by_reference(word)


def test_a_run_of_one_character_is_merged_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the run, the windows that repeat the one before them are not merged."""
    calls: list[int] = []
    merge_window = PLAIN.merge_window

    def counting(data: object, start: int, length: int, *rest: object) -> int:
        calls.append(length)
        return int(merge_window(data, start, length, *rest))

    monkeypatch.setattr(PLAIN, "merge_window", counting)
    merger = Merger(b"a", 0)
    assert merger.by_kernel(PLAIN, b"a" * 20_000) == merger.by_reference(b"a" * 20_000)
    assert sum(calls) < 1_000
