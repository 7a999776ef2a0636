"""Training on parts: the merges of one pass, whatever the parts, the engine, and whoever was killed."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.schemas import ClusterConfig
from databuilder.parts import write_id_bytes
from tests.small_disk import files_of_at_most
from tests.utils.packed import write_parquet, zstd
from transformerlm.distributed.work import UNFINISHED
from transformerlm.tokenizer import count_parts
from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.count_parts import Means, Request, Trained, trained_by_parts
from transformerlm.tokenizer.counting import list_words, sum_counts
from transformerlm.tokenizer.engines import Engine
from transformerlm.utils.text_files import ReadStats

EOT = "<|endoftext|>"
VOCAB_SIZE = 400
LOCAL = ClusterConfig()
WORDS = [
    "don't",
    " we'LL",
    "naïve",
    "Ελλάδα",
    "123456",
    "\r\n",
    "\n\n",
    "  ",
    "x" * 30,
    "😀",
    "\0",
    " a",
    "the ",
    EOT,
    "<|",
    "\ufeff",
]


def _text(seed: int, length: int = 1200) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices([*WORDS, *("".join(rng.choices("abcde ", k=5)) for _ in range(40))], k=length))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with text in every format, damaged and empty files among them."""
    folder = tmp_path_factory.mktemp("text")
    rows = [_text(seed, 40) for seed in range(60)]
    lines = b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows)
    (folder / "a.txt").write_bytes(_text(100).encode() + b"\xff\xe2\x82 \xf0\x9f")
    (folder / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "d.txt.zst").write_bytes(zstd(_text(101).encode()))
    write_parquet(folder / "e.parquet", {"text": rows}, row_group_size=7)
    (folder / "f.txt").write_bytes(b"")
    (folder / "g.txt").write_text("one document without a separator " * 100, newline="")
    return folder


def train(inputs: list[str], folder: Path, request: Request, **means: Any) -> tuple[Trained | None, ReadStats]:
    """Return what a training by parts gives to the block that saves it, and its statistics."""
    means.setdefault("cluster", LOCAL)
    stats = ReadStats(sample_chars=100)
    with trained_by_parts(
        inputs, VOCAB_SIZE, request, folder=folder, means=Means(stats=stats, num_workers=1, **means), is_saved=bool
    ) as trained:
        pass
    return trained, stats


def one_pass(inputs: list[str], request: Request, engine: Engine) -> tuple[Trained, ReadStats]:
    """Return what one pass over the text gives."""
    stats = ReadStats()
    trained = train_bpe(
        inputs, VOCAB_SIZE, request.special_tokens, num_workers=1, pattern=request.pattern, engine=engine, stats=stats,
        allow_special=request.allow_special, sample=request.sample,
    )  # fmt: skip
    return Trained(*trained), stats


REQUESTS = [
    Request([EOT]),
    Request([EOT, "the "], pattern="cl100k", allow_special=True),
    Request([EOT], pattern="smollm"),
    Request([EOT], pattern="cl100k", sample=0.5),
    Request([], sample=0.5),
    Request([EOT, EOT + "a"], allow_special=True, sample=0.3),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: f"{request.pattern}-{request.sample}")
def test_merges_do_not_depend_on_parts_or_engine(files: Path, tmp_path: Path, request_: Request) -> None:
    """Both engines learn the same from any parts as from one pass, with the same statistics."""
    inputs = [f"{files}/*"]
    expected, expected_stats = one_pass(inputs, request_, "reference")
    engines: list[Engine] = ["reference"] if request_.pattern == "smollm" else ["reference", "compiled"]
    for engine in engines:
        for part_bytes in (1500, 10**6):
            trained, stats = train(inputs, tmp_path / "t.parts", request_, engine=engine, part_bytes=part_bytes)
            assert trained == expected
            for name in ("disk_bytes", "invalid_utf8", "documents", "chosen_documents"):
                assert getattr(stats, name) == getattr(expected_stats, name)
            assert "".join(stats.sample) == _text(100)[:100]
            assert not (tmp_path / "t.parts").exists()
    assert expected == one_pass(inputs, request_, engines[-1])[0]


@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_many_parts_are_added_up_group_by_group(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    """Past a number of parts, adding up is parts as well; the result is the same."""
    monkeypatch.setattr(count_parts, "MERGE_ALONE", 3)
    names: set[str] = set()
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (names.update(os.listdir(path.parent)), touch(path)))
    trained, _ = train([f"{files}/*"], tmp_path / "t.parts", Request([EOT]), engine=engine, part_bytes=9000)
    assert trained == one_pass([f"{files}/*"], Request([EOT]), "reference")[0]
    assert {name[:6] for name in names} >= {"words-", "counts"}


@settings(max_examples=6, deadline=None)
@given(st.dictionaries(st.binary(min_size=1, max_size=20), st.integers(1, 2**63)))
def test_words_are_written_by_groups_and_read_again(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[bytes, int]
) -> None:
    """Each word is in one group, which depends on its bytes alone; together the groups are all words."""
    folder = tmp_path_factory.mktemp("words")
    group_of = {}
    for order in (1, -1):
        count_parts.write_words(folder, list_words(dict(list(counts.items())[::order])))
        assert sum_counts([[count_parts.read_words(folder)]]) == counts
        for number in range(count_parts.NUM_GROUPS):
            for word, count in sum_counts([[count_parts.read_words(folder, slice(number, number + 1))]]).items():
                assert counts[word] == count
                assert group_of.setdefault(word, number) == number
    assert group_of.keys() == counts.keys()
    assert all(np.load(path, allow_pickle=False) is not None for path in folder.iterdir())


def test_groups_are_of_like_size(tmp_path: Path) -> None:
    """Words of a text, numbers among them, are spread evenly, so that no group needs far more memory than another."""
    count_parts.write_words(tmp_path, list_words({f" {number}".encode(): 1 for number in range(64_000)}))
    sizes = [len(count_parts.read_words(tmp_path, slice(n, n + 1)).ends) for n in range(count_parts.NUM_GROUPS)]
    assert max(sizes) < 1300
    assert min(sizes) > 700


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on file sizes")
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda folder: count_parts.write_words(folder, list_words({b"x" * 5000: 1})), "words.npy"),
        (lambda folder: write_id_bytes(folder, id_bytes=np.zeros(5000, dtype=np.uint32)), "id-bytes"),
    ],
)
def test_a_part_that_does_not_fit_the_disk_is_named(tmp_path: Path, write: Callable[[Path], object], name: str) -> None:
    """The error holds the cause and the file, of which numpy's own error has neither."""
    with files_of_at_most(1500), pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))


def test_the_parts_are_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output is the present folder, or the one above it."""
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")
    assert count_parts.parts_path(Path(".")) == tmp_path / "above/here.parts"
    assert count_parts.parts_path(Path("..")) == tmp_path / "above.parts"
    assert count_parts.parts_path(Path("a/t")) == Path("a/t.parts")


def _forked(function: Callable[[], object]) -> int:
    """Call a function in a process of its own, and return the process's number."""
    if child := os.fork():
        return child
    code = 1
    try:
        function()
        code = 0
    finally:
        os._exit(code)


def _slowly(monkeypatch: pytest.MonkeyPatch, log: Path, seconds: float) -> None:
    """Make counting a part take so long, and write a line for each part that is begun."""
    count = count_parts.count_words

    def count_slowly(parts: Any, *others: Any, **options: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{parts[0].path} {parts[0].start}\n")
        time.sleep(seconds)
        return count(parts, *others, **options)

    monkeypatch.setattr(count_parts, "count_words", count_slowly)


def _wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_process_costs_the_part_in_hand(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """SIGKILL at several moments: the same call goes on, does one part again for each, and leaves nothing over."""
    folder, log = tmp_path / "t.parts", tmp_path / "log"
    options: dict[str, Any] = {"engine": "reference", "part_bytes": 12_000 // kills}
    _slowly(monkeypatch, log, 0.03)
    for number in range(kills):
        before = len(list(folder.glob("counts-??????")))
        child = _forked(lambda: train([f"{files}/*"], folder, Request([EOT]), **options))
        _wait_for(lambda seen=before + 1 + number % 2: len(list(folder.glob("counts-??????"))) >= seen)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    trained, stats = train([f"{files}/*"], folder, Request([EOT]), **options)
    expected, expected_stats = one_pass([f"{files}/*"], Request([EOT]), "reference")
    assert (trained, stats.invalid_utf8) == (expected, expected_stats.invalid_utf8)
    begun = log.read_text().splitlines()
    assert len(set(begun)) <= len(begun) <= len(set(begun)) + kills
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_saving_that_was_killed_is_done_again(files: Path, tmp_path: Path) -> None:
    """After an error while the tokenizer is saved, the parts are still there, and say so."""
    folder = tmp_path / "t.parts"
    with (
        pytest.raises(OSError, match="disk full"),
        trained_by_parts([f"{files}/*"], VOCAB_SIZE, Request([EOT]), folder=folder, means=Means(LOCAL), is_saved=bool),
    ):
        raise OSError("disk full")
    assert count_parts.is_saving(folder)
    assert train([f"{files}/*"], folder, Request([EOT]))[0] == one_pass([f"{files}/*"], Request([EOT]), "reference")[0]
    assert not count_parts.is_saving(folder)


def _share(files: Path, place: int, out: Path) -> None:
    cluster = ClusterConfig(on="share", share=f"{place}/3")
    means = Means(cluster, part_bytes=3000, engine="reference", num_workers=1)
    with trained_by_parts(
        [f"{files}/*"], VOCAB_SIZE, Request([EOT]), folder=out / "t.parts", means=means,
        is_saved=lambda: (out / "saved").exists(),
    ) as trained:  # fmt: skip
        if trained is not None:
            with (out / "saved").open("a") as file:
                file.write(repr(trained) + "\n")


@pytest.mark.parametrize("many", [False, True])
def test_shares_train_one_tokenizer(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    """Three shares, one of them killed on the way; the others do its parts, and exactly one saves."""
    monkeypatch.setattr("transformerlm.distributed.share_work.POLL_SECONDS", 0.02)
    monkeypatch.setattr(count_parts, "MERGE_ALONE", 3 if many else 1000)
    _slowly(monkeypatch, tmp_path / "log", 0.03)
    children = [_forked(lambda place=place: _share(files, place, tmp_path)) for place in (1, 2, 3)]
    _wait_for(lambda: len(list((tmp_path / "t.parts").glob("counts-??????"))) >= 4)
    os.kill(children[2], signal.SIGKILL)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0, 0, signal.SIGKILL]
    expected = repr(one_pass([f"{files}/*"], Request([EOT]), "reference")[0])
    assert (tmp_path / "saved").read_text() == expected + "\n"
    _share(files, 3, tmp_path)  # it comes late, and has nothing to do
    assert (tmp_path / "saved").read_text() == expected + "\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "saved"]


def test_other_text_or_settings_are_refused(files: Path, tmp_path: Path) -> None:
    """Counts of other settings are never added up; the error names the difference, and `restart` throws them away."""
    folder = tmp_path / "t.parts"
    with (
        pytest.raises(OSError, match="stopped"),
        trained_by_parts([f"{files}/*"], VOCAB_SIZE, Request([EOT]), folder=folder, means=Means(LOCAL), is_saved=bool),
    ):
        raise OSError("stopped")
    with pytest.raises(ValueError, match=r"t\.parts: expected parts of the same inputs and settings, found pattern"):
        train([f"{files}/*"], folder, Request([EOT], pattern="cl100k"))
    with pytest.raises(ValueError, match=r"expected parts of the same inputs"):
        train([f"{files}/a.txt"], folder, Request([EOT]))
    begun = trained_by_parts(
        [f"{files}/a.txt"], VOCAB_SIZE, Request([EOT]), folder=folder, means=Means(LOCAL), is_saved=bool, restart=True
    )
    with pytest.warns(UserWarning, match="beginning anew"), begun as trained:
        assert trained == one_pass([f"{files}/a.txt"], Request([EOT]), "reference")[0]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """What only one process can read, once, cannot be shared out."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"expected files that any process can read, found .*pipe"):
        train([f"{tmp_path}/pipe"], tmp_path / "t.parts", Request([EOT]))
    assert not (tmp_path / "t.parts").exists()


def test_text_without_words_is_refused(tmp_path: Path) -> None:
    """As in one pass; a sample that chose nothing says the same."""
    (tmp_path / "a.txt").write_text(EOT * 100)
    for request in (Request([EOT]), Request([EOT], sample=0.5)):
        with pytest.raises(ValueError, match=r"expected text to train on, found none in (a sample .*)?.*a\.txt"):
            train([f"{tmp_path}/a.txt"], tmp_path / f"{request.sample}.parts", request)


# What a driver runs that is killed.
DRIVER = "import sys; from tests.tokenizer.test_count_parts import train_on_ray; train_on_ray(*sys.argv[1:])"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Return a cluster of two nodes with a processor each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(**options)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of some hundred parts."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(_text(seed) for seed in range(80)), newline="")
    return path


def train_on_ray(address: str, text: str | Path, folder: str | Path) -> Trained | None:
    """Return what a training on a cluster gives to the block that saves it."""
    cluster = ClusterConfig(on="ray", address=address)
    return train([str(text)], Path(folder), Request([EOT]), cluster=cluster, part_bytes=4000, engine="reference")[0]


def _num_done(folder: Path) -> int:
    return len(list(folder.glob("counts-??????")))


def _worker_of(folder: Path, killed: list[int]) -> int | None:
    """Return the number of a process that has begun a part; it is in the name of the unfinished folder."""
    here = f"{UNFINISHED}{socket.gethostname()}-"
    workers = [int(name.split(here)[1].split("-")[0]) for name in _names(folder) if here in name]
    return next((worker for worker in workers if worker not in killed), None)  # killed ones leave their folders


def _names(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith("counts-")] if folder.exists() else []


@pytest.mark.slow
def test_a_killed_ray_worker_costs_the_part_in_hand(cluster: Any, text: Path, tmp_path: Path) -> None:
    """Ray does the part again in another worker, and the merges are those of one pass."""
    folder = tmp_path / "t.parts"
    killed: list[int] = []

    def kill() -> None:
        for number in (3, 10, 20):
            _wait_for(lambda number=number: _num_done(folder) >= number)
            killed.append(_wait_for(lambda: _worker_of(folder, killed)))
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    trained = train_on_ray(cluster.address, text, folder)
    killer.join()
    assert trained == one_pass([str(text)], Request([EOT]), "reference")[0]
    assert len(killed) == 3
    assert os.getpid() not in killed
    assert not folder.exists()


@pytest.mark.slow
def test_a_killed_ray_driver_is_gone_on_with(cluster: Any, text: Path, tmp_path: Path) -> None:
    """The parts that are done stay as they are."""
    folder = tmp_path / "t.parts"
    command = [sys.executable, "-c", DRIVER, cluster.address, str(text), str(folder)]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    _wait_for(lambda: _num_done(folder) >= 5)
    driver.kill()
    driver.wait()
    time.sleep(1)  # until Ray has noticed, too
    before = {name: (folder / name / "part.json").stat().st_mtime_ns for name in _names(folder) if "." not in name}
    seen: dict[str, int] = {}

    def look() -> None:
        _wait_for(lambda: _num_done(folder) > len(before) + 5)
        seen.update({name: (folder / name / "part.json").stat().st_mtime_ns for name in before})

    looker = threading.Thread(target=look)
    looker.start()
    assert train_on_ray(cluster.address, text, folder) == one_pass([str(text)], Request([EOT]), "reference")[0]
    looker.join()
    assert len(before) >= 5
    assert seen == before


@pytest.mark.slow
def test_a_lost_ray_node_costs_its_parts_in_hand(cluster: Any, text: Path, tmp_path: Path) -> None:
    """The other node does them; the last test on the cluster, as the cluster has one node afterwards."""
    folder = tmp_path / "t.parts"

    def lose() -> None:
        _wait_for(lambda: _num_done(folder) >= 5)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    loser = threading.Thread(target=lose)
    loser.start()
    trained = train_on_ray(cluster.address, text, folder)
    loser.join()
    assert trained == one_pass([str(text)], Request([EOT]), "reference")[0]
