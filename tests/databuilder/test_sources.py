"""Sources with weights: each document appears as often as asked, and none of validation is in training."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from databuilder import BuildReport, Source, build_dataset, checks, encoding
from databuilder.sources import are_chosen
from tests.utils.packed import write_parquet, zstd
from transformerlm.token_files import writer as token_file
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer, reading

EOT = "<|endoftext|>"
BYTES = {value: bytes([value]) for value in range(256)}
TOKENIZER = Tokenizer(BYTES, [], [EOT])


def _documents(name: str, number: int) -> list[str]:
    return [f"{name}{index} é{' word' * (index % 7)}" for index in range(number)]


def _write(folder: Path, name: str, number: int) -> Path:
    path = folder / f"{name}.txt"
    path.write_text(EOT.join(_documents(name, number)))
    return path


def _build(folder: Path, sources: object, **options: object) -> BuildReport:
    options = {"tokenizer": TOKENIZER, "train_path": folder / "train.npy", "overwrite": True, **options}
    return build_dataset(sources, **options)


def _split(folder: Path) -> dict[str, object]:
    return {"valid_path": folder / "valid.npy", "valid_fraction": 0.1}


def _read(path: Path) -> list[str]:
    """Return the documents of a token file, whose last must have its end, too."""
    *documents, rest = TOKENIZER.decode(np.load(path)).split(EOT)
    assert rest == ""
    return documents


@pytest.fixture(params=[(1, 1), (300, 50), (1 << 20, 1 << 20)])
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the size of the batches to read and of the blocks to repeat."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", request.param[0])
    monkeypatch.setattr(token_file, "BLOCK_TOKENS", request.param[1])


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize(
    ("weight", "expected"), [(0.5, 50), (1, 100), (1.5, 150), (2, 200), (2.5, 250), (3, 300), (0.01, 1), (0.999, 99)]
)
def test_a_weight_is_the_number_of_times_that_each_document_comes(tmp_path: Path, weight: float, expected: int) -> None:
    """Whole passes over the source follow each other, then the fraction, spread evenly; counts include all."""
    documents = _documents("a", 100)
    report = _build(tmp_path, [Source(_write(tmp_path, "a", 100), weight)])
    part = [text for text, chosen in zip(documents, are_chosen(np.arange(100), weight % 1), strict=True) if chosen]
    written = _read(tmp_path / "train.npy")
    assert written == documents * int(weight) + part
    assert abs(len(written) - expected) <= 1
    assert report.train.documents == len(written)
    assert report.train.bytes == sum(len(text.encode()) for text in written)
    assert report.train.tokens == len(np.load(tmp_path / "train.npy"))


@pytest.mark.usefixtures("_sizes")
def test_no_validation_document_is_in_training(tmp_path: Path) -> None:
    """Whatever the weights, validation is the same as without weights, and training has the other documents."""
    sources = [Source(_write(tmp_path, name, 90), weight) for name, weight in (("a", 2.5), ("b", 0.5), ("c", 1.0))]
    _build(tmp_path, [source.input for source in sources], **_split(tmp_path))
    held_out, rest = _read(tmp_path / "valid.npy"), _read(tmp_path / "train.npy")
    report = _build(tmp_path, sources, **_split(tmp_path))
    assert _read(tmp_path / "valid.npy") == held_out
    times = Counter(_read(tmp_path / "train.npy"))
    assert not set(held_out) & set(times)
    for name, allowed in (("a", {2, 3}), ("b", {0, 1}), ("c", {1})):
        assert {times[text] for text in rest if text.startswith(name)} == allowed
    assert report.valid is not None
    assert (report.valid.documents, report.train.documents) == (len(held_out), times.total())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 30), st.floats(0.01, 4)), min_size=1, max_size=4),
    fraction=st.sampled_from([0.05, 0.5]),
)
def test_reports_count_what_the_files_hold(
    sizes: list[tuple[int, float]], fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For any weights each source's documents, tokens and bytes are those in the files, and close to the weight."""
    folder = tmp_path_factory.mktemp("build")
    sources = [
        Source(_write(folder, name, number), weight) for name, (number, weight) in zip("abcd", sizes, strict=False)
    ]
    report = _build(folder, sources, valid_path=folder / "valid.npy", valid_fraction=fraction)
    assert report.valid is not None
    for made in (report.train, report.valid):
        written = _read(made.path)
        for name, source in zip("abcd", made.sources, strict=False):
            mine = [text for text in written if text.startswith(name)]
            size = sum(len(text.encode()) for text in mine)
            assert (source.documents, source.bytes, source.tokens) == (len(mine), size, size + len(mine))
        assert made.tokens == sum(source.tokens for source in made.sources)
    for (number, weight), train, valid in zip(sizes, report.train.sources, report.valid.sources, strict=True):
        assert abs(train.documents - (number - valid.documents) * weight) <= 2


def test_weights_of_one_are_the_files_in_a_row(tmp_path: Path) -> None:
    """With weight 1 everywhere the token files are those of the same inputs without weights, byte for byte."""
    paths = [_write(tmp_path, "a", 40), _write(tmp_path, "b", 50)]
    _build(tmp_path, paths, **_split(tmp_path))
    plain = [(tmp_path / name).read_bytes() for name in ("train.npy", "valid.npy")]
    assert "mixture" not in json.loads((tmp_path / "train.json").read_text())
    _build(tmp_path, [Source(path) for path in paths], **_split(tmp_path))
    assert [(tmp_path / name).read_bytes() for name in ("train.npy", "valid.npy")] == plain


def test_the_sidecar_says_what_each_source_gave(tmp_path: Path) -> None:
    """The sidecars hold the weights and each source's part, and training opens the files."""
    sources = [Source(str(_write(tmp_path, "a", 20)), 2.0), Source([str(_write(tmp_path, "b", 40))], 0.5)]
    report = _build(tmp_path, sources, **_split(tmp_path))
    sidecar = json.loads((tmp_path / "train.json").read_text())
    assert [Path(source["path"]).name for source in sidecar["sources"]] == ["a.txt", "b.txt"]
    first, second = sidecar["mixture"]
    assert first == {
        "input": [str(tmp_path / "a.txt")],
        "weight": 2.0,
        "documents": 34,  # 3 of 20 are held out
        "tokens": report.train.sources[0].tokens,
        "bytes": report.train.sources[0].bytes,
    }
    assert (second["weight"], second["documents"]) == (0.5, 19)
    assert first["tokens"] + second["tokens"] == sidecar["tokens"]
    for name in ("train.npy", "valid.npy"):
        dataset = TokenDataset(tmp_path / name)
        dataset.check()
        assert dataset.num_documents == sum(source["documents"] for source in dataset.metadata["mixture"])


def _all_kinds(folder: Path) -> list[Source]:
    """Write a source of each kind of file, some of them large enough to be read as bytes."""
    _write(folder, "plain", 3000)
    (folder / "b.txt.gz").write_bytes(gzip.compress(EOT.join(_documents("gzip", 200)).encode()))
    (folder / "c.txt.zst").write_bytes(zstd(EOT.join(_documents("zstd", 200)).encode()))
    lines = [json.dumps({"body": text}) for text in _documents("lines", 200)]
    (folder / "d.jsonl").write_text("\n".join(lines))
    write_parquet(folder / "e.parquet", {"content": _documents("rows", 200)})
    return [
        Source(folder / "d.jsonl", 2.5, text_field="body"),
        Source([folder / "plain.txt", folder / "b.txt.gz"], 1.5),
        Source(f"{folder}/c.*", 0.5),
        Source(folder / "e.parquet", 2, text_field="content"),
    ]


def test_workers_and_engines_do_not_change_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of file: one worker or two, text or chunks of bytes, the same bytes in all four outputs."""
    pytest.importorskip("numba")
    monkeypatch.setattr(encoding, "BATCH_CHARS", 5000)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    sources = _all_kinds(tmp_path)
    built = []
    for engine, workers in (("reference", 1), ("reference", 2), ("compiled", 1), ("compiled", 2)):
        tokenizer = Tokenizer(BYTES, [], [EOT], engine=engine)  # type: ignore[arg-type]
        _build(tmp_path, sources, tokenizer=tokenizer, num_workers=workers, **_split(tmp_path))
        built.append(
            [(tmp_path / f"{name}.{kind}").read_bytes() for name in ("train", "valid") for kind in ("npy", "json")]
        )
    assert built[0] == built[1] == built[2] == built[3]
    times = Counter(_read(tmp_path / "train.npy"))
    assert {times[text] for text in _documents("rows", 200)} == {0, 2}  # 0: held out


def test_the_fraction_takes_another_part_than_validation(tmp_path: Path) -> None:
    """A source whose share is smaller than the held-out one still gives its share of the rest."""
    _build(tmp_path, [Source(_write(tmp_path, "a", 1000), 0.05)], valid_path=tmp_path / "valid.npy", valid_fraction=0.5)
    assert abs(len(_read(tmp_path / "train.npy")) - 25) <= 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [Source("a.txt"), Source("gone.txt")],
            r"^sources\.1: input: expected a text file, found nothing at gone\.txt",
        ),
        ([Source("a.txt"), Source("no*.txt")], r"^sources\.1: input: expected text files, found none that match"),
        ([Source("a.txt"), Source("b.zip")], r"^sources\.1: input: expected .* found b\.zip"),
        ([Source([])], r"^sources\.0: input: expected at least one text file or glob, found none"),
        ([Source("a.txt"), Source(["blank.txt"])], r"^sources\.1: expected text, found none in blank\.txt$"),
        ([Source("a.txt", 2), Source("*.txt")], r"^sources\.1: expected files of its own, found a\.txt, .* sources\.0"),
        ([Source("a.txt", 0)], r"^sources\.0: expected a weight above 0, found 0$"),
        ([Source("a.txt", -1.0)], r"^sources\.0: expected a weight above 0, found -1\.0$"),
        ([Source("a.txt", float("nan"))], r"^sources\.0: expected a weight above 0, found nan$"),
        ([Source("a.txt", float("inf"))], r"^sources\.0: expected a weight above 0, found inf$"),
        ([], "input: expected at least one text file or glob, found none"),
    ],
)
def test_sources_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[Source], message: str
) -> None:
    """The error is one line that says which source it is, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "a", 3)
    (tmp_path / "blank.txt").write_text(f"\n{EOT} ")
    (tmp_path / "b.zip").write_text("x")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message) as caught:
        _build(tmp_path, sources)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_disk_must_have_room_for_the_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The early check of the disk includes the weights."""
    path = _write(tmp_path, "a", 1000)
    room = 5 * path.stat().st_size
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": room}))
    _build(tmp_path, [Source(path, 3)])
    with pytest.raises(OSError, match="for the token files, found"):
        _build(tmp_path, [Source(path, 5)])
