"""The tokenizer benchmark on a small text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarking import bench_tokenizer as bench
from benchmarking.tokenizer_peers import ENCODERS, train_ours
from config.bench_tokenizer import BenchTokenizerConfig
from config.io import SHIPPED, dump_json_schema, dump_toml, load_config
from tests.benchmarking.commands import by_quantity, check_line, run_command

EOT = "<|endoftext|>"
DOCUMENTS = ["The cat sat on the mat, the cat's mat.\n\n\tIt's 42 cats — früh, 漢字! ", "Once upon a time…\r\n" * 4]
TEXT = EOT.join(DOCUMENTS * 20)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_shipped_toml_loads_and_names_its_schema(tmp_path: Path) -> None:
    """The shipped TOML is valid, its printed form parses back to an equal object, and its schema is the current one."""
    config = load_config(BenchTokenizerConfig, SHIPPED / "bench_tokenizer.toml")
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load_config(BenchTokenizerConfig, tmp_path / "again.toml") == config
    assert (SHIPPED / "bench_tokenizer.toml").read_text().startswith("#:schema bench_tokenizer.schema.json\n")
    schema = (SHIPPED / "bench_tokenizer.schema.json").read_text()
    assert schema == dump_json_schema(BenchTokenizerConfig) + "\n"


@pytest.mark.usefixtures("no_new_process")
@pytest.mark.parametrize("workers", [1, 2])
def test_lines_of_a_small_run(workers: int, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each candidate has a line for each quantity it can do, with the asked-for rounds, and gives the same ids."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    argv = [f"--text={text_file}", "--vocab_size=300", f"--workers={workers}"]
    lines, stderr = run_command(bench.main, [*argv, "--measure.warmup=1", "--measure.repeats=2"], capsys)
    for line in lines:
        check_line(line)
        assert line["params.bytes"] == sum(len(document.encode()) for document in DOCUMENTS * 20)
        assert line["params.documents"] == 40
    found = by_quantity(lines)
    everyone, trainable = ("transformerlm", "tokenizers", "tiktoken"), ("transformerlm", "tokenizers")
    expected = {("train_mb_per_second", name): 2 for name in trainable}
    expected |= {(name, who): 1 for name in ("train_peak_memory_mb", "bytes_per_token") for who in trainable}
    passes = ["encode_first_pass_mb_per_second", "encode_second_pass_mb_per_second"]
    passes += ["encode_batch_mb_per_second"] if workers > 1 else []
    expected |= {(name, who): 2 for name in passes for who in everyone}
    assert {key: line["repeats"] for key, line in found.items()} == expected
    assert all(line["ids_equal"] for (name, who), line in found.items() if name in passes and who != "transformerlm")
    assert all("speedup.median" in found[passes[0], who] for who in everyone[1:])
    assert "encode_first_pass_mb_per_second" in stderr


@pytest.mark.usefixtures("no_new_process")
def test_a_missing_peer_is_skipped_with_one_line(
    text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the peers our own numbers come all the same, and stderr says what is missing."""
    monkeypatch.setattr(bench, "is_installed", lambda module: False)
    argv = [f"--text={text_file}", "--vocab_size=300", "--measure.warmup=0", "--measure.repeats=1"]
    lines, stderr = run_command(bench.main, argv, capsys)
    assert {line["candidate"] for line in lines} == {"transformerlm"}
    assert "tiktoken is not installed: skipped (pip install tiktoken)\n" in stderr


def test_the_embedded_corpus_is_used_without_files(tmp_path: Path) -> None:
    """With no text named, documents are docstrings, up to `max_bytes` of them."""
    documents = bench.write_text(BenchTokenizerConfig(max_bytes=20_000), tmp_path / "text.txt")
    assert len(documents) > 10
    assert 10_000 < (tmp_path / "text.txt").stat().st_size <= 20_000


def test_text_is_cut_at_a_character(tmp_path: Path) -> None:
    """A limit that falls into a character leaves the character out."""
    path = tmp_path / "text.txt"
    path.write_text("aé漢" * 10, encoding="utf-8")
    documents = bench.write_text(BenchTokenizerConfig(text=[str(path)], max_bytes=11), tmp_path / "cut.txt")
    assert documents == ["aé漢aé"]


def test_no_text_is_an_error(tmp_path: Path) -> None:
    """A file without text says so and names the file."""
    path = tmp_path / "empty.txt"
    path.write_text(EOT)
    with pytest.raises(ValueError, match=r"expected some text.*empty\.txt"):
        bench.write_text(BenchTokenizerConfig(text=[str(path)]), tmp_path / "text.txt")


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoders_give_the_same_ids(name: str, text_file: Path) -> None:
    """With our merges every library gives our ids, special tokens included, one by one and in batches."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    tokenizer = train_ours(text_file, 320, EOT, 1)
    encoder = ENCODERS[name](tokenizer)
    texts = [*DOCUMENTS, TEXT]
    assert [encoder.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert encoder.encode_batch(texts, 1) == [tokenizer.encode(text) for text in texts]


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that bound the peers' threads are put back."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with bench._peer_threads(2):
        assert os.environ["RAYON_NUM_THREADS"] == "2"
    assert os.environ["RAYON_NUM_THREADS"] == "7"
    assert "TOKENIZERS_PARALLELISM" not in os.environ
