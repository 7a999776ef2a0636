"""Behaviour of counting pre-tokens: nothing but the text decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokenizer.test_bpe_trainer import EOT, _sample_text
from transformerlm.tokenizer import reading
from transformerlm.tokenizer.counting import BatchCounter, count_pre_tokens
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.reading import Texts


@pytest.mark.parametrize(("num_workers", "chunk_chars"), [(1, 1 << 20), (2, 1 << 20), (1, 1), (1, 37), (2, 500)])
def test_counts_do_not_depend_on_workers_or_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, chunk_chars: int
) -> None:
    """However the text is cut and distributed, the counts are those of the whole."""
    text = _sample_text(3000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(reading, "CHUNK_CHARS", chunk_chars)
    counts = count_pre_tokens([tmp_path / "a.txt"], [EOT], num_workers=num_workers)
    whole = BatchCounter(SpecialTokenSplitter([EOT]))(Texts([text], ordinary=False))
    assert counts == {word.encode(): count for word, count in whole.items()}
