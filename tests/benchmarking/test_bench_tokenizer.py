"""The tokenizer benchmark on a small text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarking import bench_tokenizer as bench
from config.bench_tokenizer import BenchTokenizerConfig
from config.io import SHIPPED, dump_json_schema, dump_toml, load_config
from tests.benchmarking.commands import by_quantity, check_line, run_command
from tests.benchmarking.tokenizer.debian_files import write_messages

EOT = "<|endoftext|>"
DOCUMENTS = ["The cat sat on the mat, the cat's mat.\n\n\tIt's 42 cats — früh, 漢字! ", "Once upon a time…\r\n" * 4]
TEXT = EOT.join(DOCUMENTS * 20)
SMALL = ["--sizes_mb=[]", "--vocab_sizes=[300]", "--measure.warmup=0"]
PASSES = [
    f"encode_{what}_{number}_pass_mb_per_second" for what in ("file", "documents") for number in ("first", "second")
]


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
def test_lines_of_a_small_run(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each candidate has a line for each quantity it can do, with the asked-for rounds, ids and text equal to ours."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    argv = [f"--text={text_file}", *SMALL, "--threads=[1]", '--peers=["reference", "tokenizers", "tiktoken"]']
    lines, stderr = run_command(bench.main, [*argv, "--measure.repeats=2"], capsys)
    for line in lines:
        check_line(line)
        assert line["params.bytes"] == len(TEXT.encode())
        assert (line["params.vocab_size"], line["params.threads"]) == (300, 1)
    found = by_quantity(lines)
    trainable = ("transformerlm", "reference", "tokenizers")
    everyone = (*trainable, "tiktoken")
    expected = {("train_mb_per_second", who): 2 for who in trainable}
    expected |= {("train_extra_memory_mb", who): 1 for who in trainable}
    decoding = ["decode_array_mb_per_second", "decode_list_mb_per_second"]
    expected |= {(name, who): 2 for name in [*PASSES, *decoding] for who in everyone}
    expected |= {("train_tokenizer_peak_memory_mb", "transformerlm"): 1}
    made = ("make_data_mb_per_second", "make_data_over_encode_file_time")
    expected |= {(name, "transformerlm"): 2 for name in made}
    assert {key: line["repeats"] for key, line in found.items()} == expected
    assert all(found[name, who]["ids_equal"] for name in PASSES for who in everyone[1:])
    assert all(found[name, who]["text_equal"] for name in decoding for who in everyone[1:])
    assert all("speedup.median" in found[name, who] for name in PASSES for who in everyone[1:])
    assert found["train_mb_per_second", "reference"]["merges_equal"]
    assert found["encode_documents_first_pass_mb_per_second", "transformerlm"]["documents"] == 40
    assert "encode_file_first_pass_mb_per_second" in stderr


@pytest.mark.usefixtures("no_new_process")
def test_a_missing_peer_is_skipped_with_one_line(
    text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without peers and numba the reference engine is still measured, and stderr says what is missing."""
    monkeypatch.setattr(bench, "is_installed", lambda module: False)
    argv = [f"--text={text_file}", *SMALL, "--threads=[1]", '--tasks=["encode_file"]', "--measure.repeats=1"]
    lines, stderr = run_command(bench.main, argv, capsys)
    assert {(line["candidate"], line["params.engine"]) for line in lines} == {("transformerlm", "reference")}
    assert "gigatoken is not installed: skipped (pip install gigatoken)\n" in stderr


def test_a_case_runs_in_a_process_of_its_own(text_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With two threads in a new process, stdout holds only our lines, whatever libraries print there."""
    pytest.importorskip("tiktoken")
    argv = [f"--text={text_file}", *SMALL, "--threads=[2]", '--tasks=["encode_file"]', '--peers=["tiktoken"]']
    lines, _ = run_command(bench.main, [*argv, "--engine=reference", "--measure.repeats=1"], capfd)
    assert [line["candidate"] for line in lines] == ["transformerlm", "tiktoken"] * 2
    assert all(line["ids_equal"] for line in lines[1::2])


def test_the_cpu_clock_is_refused_with_threads(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU seconds of several threads would add up: exit code 2 before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        bench.main([f"--text={text_file}", "--threads=[1, 2]", "--measure.clock=cpu"])
    assert ended.value.code == 2
    assert "expected one thread" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["kinds", "sizes_mb", "vocab_sizes", "threads", "tasks", "peers"])
def test_a_value_that_is_named_twice_is_refused(key: str) -> None:
    """Lists hold each value once: a second one would overwrite the first one's files and lines."""
    value = {"kinds": "thai", "vocab_sizes": 300, "tasks": "train", "peers": "tiktoken"}.get(key, 1)
    with pytest.raises(ValueError, match=f"{key}: expected each value once"):
        BenchTokenizerConfig.model_validate({key: [value, value]})


def test_sizes_are_beginnings_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each size is a file with that much of the text, the smallest first; one beyond the text is skipped and named."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"0123456789")
    config = BenchTokenizerConfig(text=[str(path)], sizes_mb=[5e-6, 1, 2e-6])
    written = bench.write_texts(config, tmp_path / "..")
    assert [(size, file.read_bytes()) for size, file in written] == [(2e-6, b"01"), (5e-6, b"01234")]
    assert "sizes_mb: 1 is left out" in capsys.readouterr().err


def test_text_is_cut_at_a_character(tmp_path: Path) -> None:
    """A limit that falls inside a character omits the character."""
    text, cut = tmp_path / "text.txt", tmp_path / "cut.txt"
    text.write_text("aé漢" * 10, encoding="utf-8")
    found = [bench._first_bytes(text, cut, size).read_text(encoding="utf-8") for size in (6, 7, 8, 9, 11, 60, 100)]
    assert found == ["aé漢", "aé漢a", "aé漢a", "aé漢aé", "aé漢aé", "aé漢" * 10, "aé漢" * 10]


def test_documents_of_several_files_are_kept_apart(tmp_path: Path) -> None:
    """The separator is between files and between JSON lines, but not inside a file of plain text."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    config = BenchTokenizerConfig(text=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], sizes_mb=[])
    (tmp_path / "out").mkdir()
    [(_, path)] = bench.write_texts(config, tmp_path / "out")
    assert path.read_text().split(f"\n{EOT}\n") == ["one", "two", "three"]


def test_the_embedded_corpus_is_used_without_files(tmp_path: Path) -> None:
    """If no text is named, the text is docstrings, as many as asked for."""
    [(size, path)] = bench.write_texts(BenchTokenizerConfig(sizes_mb=[0.02]), tmp_path)
    assert (size, path.stat().st_size) == (0.02, 20_000)
    assert path.read_text().count(f"\n{EOT}\n") > 10


@pytest.mark.usefixtures("no_new_process")
def test_kinds_are_measured_one_by_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A kind's lines name it and its packages; one whose packages are missing is named on stderr and skipped."""
    argv = ['--kinds=["thai", "json_logs"]', f"--debian_root={tmp_path}", "--sizes_mb=[0.02]", "--vocab_sizes=[300]"]
    argv += ["--threads=[1]", '--tasks=["encode_file"]', "--peers=[]", "--measure.warmup=0", "--measure.repeats=1"]
    lines, stderr = run_command(bench.main, [*argv, "--engine=reference"], capsys)
    assert {line["params.kind"] for line in lines} == {"json_logs"}
    assert all(line["sources"].startswith("Python 3") and line["params.bytes"] == 20_000 for line in lines)
    assert f"thai: skipped, as {tmp_path} has no files of Debian's libreoffice-l10n-th (apt-get download" in stderr


def test_a_kind_with_less_text_than_asked_for_is_measured_whole(tmp_path: Path) -> None:
    """Packages ship what they ship: the line says how much it was."""
    write_messages(tmp_path, "th", ["สวัสดี", "ข้อความที่สอง"])
    config = BenchTokenizerConfig(kinds=["thai"], debian_root=tmp_path, sizes_mb=[1])
    [(size, path)] = bench.write_texts(config, tmp_path, kind="thai")
    assert size == 0.0
    assert path.read_text(encoding="utf-8") == f"สวัสดี\nข้อความที่สอง\n{EOT}\n"


def test_kinds_and_text_exclude_each_other() -> None:
    """Whoever names both does not see one of them ignored."""
    with pytest.raises(ValueError, match="kinds: expected no `text` beside it"):
        BenchTokenizerConfig.model_validate({"kinds": ["thai"], "text": ["a.txt"]})


@pytest.mark.parametrize(("sizes", "message"), [([], "expected some text"), ([1], r"expected.*found none.*empty")])
def test_no_text_is_an_error(sizes: list[float], message: str, tmp_path: Path) -> None:
    """A file without text says so and names the file."""
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(ValueError, match=message):
        bench.write_texts(BenchTokenizerConfig(text=[str(path)], sizes_mb=sizes), tmp_path)


def test_too_little_text_for_every_size_is_an_error(text_file: Path, tmp_path: Path) -> None:
    """No text is repeated to reach a size: the error says how much there is and how to take it."""
    config = BenchTokenizerConfig(text=[str(text_file)], sizes_mb=[10])
    with pytest.raises(ValueError, match=r"expected a size of at most 0\.0.*found 10 .*sizes_mb = \[\]"):
        bench.write_texts(config, tmp_path)


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that limit the peers' threads are restored."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with bench._peer_threads(2):
        assert os.environ["RAYON_NUM_THREADS"] == "2"
    assert os.environ["RAYON_NUM_THREADS"] == "7"
    assert "TOKENIZERS_PARALLELISM" not in os.environ
