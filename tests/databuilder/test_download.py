"""Downloads from a server that fails in every way: the file is whole and correct, or there is none."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from databuilder import download
from databuilder.download import RECIPES, Download, checksum_of
from databuilder.hub import Hub, HubFile
from tests.databuilder.hub_server import (
    HubServer,
    as_the_hub,
    cut_after,
    serving,
    silent,
    slowly,
    status,
    wrong_bytes,
)
from tests.small_disk import files_of_at_most
from transformerlm.utils.lock import try_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*; trying again in")
DATA = random.Random(0).randbytes(300_000)
FILE = HubFile("me/texts", "data/a.txt")


@pytest.fixture
def server() -> Iterator[HubServer]:
    """Return a hub that has one file."""
    with as_the_hub({FILE.path: DATA}) as running:
        yield running


@pytest.fixture
def task(tmp_path: Path) -> Download:
    """Return the task to download it; between retries it does not wait but records how long it would."""
    waits: list[float] = []
    return Download(FILE, tmp_path / "new" / "a.txt", wait=waits.append)


def _run(task: Download, **options: Any) -> download.DownloadReport:
    return task.run(Hub.from_environment(**options))


def _names(task: Download) -> list[str]:
    return sorted(path.name for path in task.path.parent.iterdir()) if task.path.parent.exists() else []


def _waits(task: Download) -> list[float]:
    return task.wait.__self__


def test_a_file_comes_whole_and_checked(server: HubServer, task: Download) -> None:
    """The file is written under its name, by its sha256, with progress from 0 to its size; nothing else is left."""
    seen: list[tuple[int, int]] = []
    report = _run(replace(task, progress=lambda *now: seen.append(now)))
    assert report == (task.path, len(DATA), "sha256", True)
    assert task.path.read_bytes() == DATA
    assert _names(task) == ["a.txt"]
    assert seen[0] == (0, len(DATA))
    assert seen[-1] == (len(DATA), len(DATA))
    assert server.requests[0][:2] == ("HEAD", "/datasets/me/texts/resolve/main/data/a.txt")


def test_a_file_that_is_there_and_right_is_not_fetched_again(server: HubServer, task: Download) -> None:
    """The second time only the hub's checksum is asked for."""
    _run(task)
    assert not _run(task).fetched
    assert len(server.seen("GET")) == 1


def test_another_file_is_replaced_only_when_asked_for(server: HubServer, task: Download) -> None:
    """A file with other content is refused, and replaced with `overwrite`."""
    task.path.parent.mkdir()
    task.path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"found another file \(overwrite replaces it\)"):
        _run(task)
    assert task.path.read_text() == "mine"
    assert _run(replace(task, overwrite=True)).fetched
    assert task.path.read_bytes() == DATA


@pytest.mark.parametrize("names_checksum", [True, False])
def test_cut_connections_go_on_where_they_were(server: HubServer, task: Download, names_checksum: bool) -> None:
    """Each retry asks only for the rest, of exactly the same version, and the whole is correct."""
    server.names_checksum = names_checksum
    server.faults = [cut_after(100_000), cut_after(50_000), cut_after(0)]
    assert _run(task).checked == ("sha256" if names_checksum else "size")
    assert task.path.read_bytes() == DATA
    etag = f'"{hashlib.md5(DATA).hexdigest()}-1"'
    ranges = [(headers.get("Range"), headers.get("If-Range")) for headers in server.seen("GET")]
    assert ranges == [(None, None), ("bytes=100000-", etag), ("bytes=150000-", etag), ("bytes=150000-", etag)]
    assert _waits(task) == [1.0, 2.0, 4.0]


def test_each_retry_is_told(server: HubServer, task: Download) -> None:
    """A warning says what went wrong, and for how long the download waits."""
    server.faults = [cut_after(100_000)]
    with pytest.warns(UserWarning, match=r"connection cut after 100,000; trying again in 1 s"):
        _run(task)


def test_the_next_process_goes_on(server: HubServer, task: Download) -> None:
    """After a stop, also by Ctrl-C, the part stays, and the same call in a new process fetches only the rest."""
    server.faults = [cut_after(200_000)]
    with pytest.raises(OSError, match=r"cut after 200,000 \(1 failures in a row; the same command goes on from here\)"):
        _run(replace(task, retries=0))
    assert _names(task) == ["a.txt.part", "a.txt.part.json"]

    def interrupt(done: int, total: int) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(replace(task, progress=interrupt))
    reached = task.path.with_name("a.txt.part").stat().st_size
    assert reached > 200_000
    server.requests.clear()
    assert _run(task).fetched
    assert [headers.get("Range") for headers in server.seen("GET")] in ([f"bytes={reached}-"], [])
    assert task.path.read_bytes() == DATA
    assert _names(task) == ["a.txt"]


def test_a_server_that_knows_no_ranges_sends_all_again(server: HubServer, task: Download) -> None:
    """An answer with the whole file starts again, and the earlier bytes are not kept in front."""
    server.knows_ranges = False
    server.faults = [cut_after(100_000)]
    _run(task)
    assert task.path.read_bytes() == DATA


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server: HubServer, task: Download) -> None:
    """Repeated bytes are not progress: the number of failures is bounded."""
    server.knows_ranges = False
    server.faults = [cut_after(100_000)] * 50
    with pytest.raises(OSError, match="6 failures in a row"):
        _run(task)
    assert len(server.seen("GET")) == 6


def test_failures_with_progress_between_them_are_not_counted_together(
    server: HubServer, task: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long download over a bad line gets through, however often it is cut."""
    monkeypatch.setattr(download, "BLOCK_BYTES", 10_000)
    server.faults = [cut_after(20_000)] * 14
    _run(replace(task, retries=1))
    assert task.path.read_bytes() == DATA
    assert set(_waits(task)) == {1.0}


@pytest.mark.parametrize("names_checksum", [True, False])
def test_a_file_that_has_changed_on_the_hub_begins_anew(
    server: HubServer, task: Download, names_checksum: bool
) -> None:
    """A part of an older version is discarded, whether its checksum or only its ETag shows it."""
    server.names_checksum = names_checksum
    server.faults = [cut_after(100_000)]
    with pytest.raises(OSError, match="cut after"):
        _run(replace(task, retries=0))
    server.files[FILE.path] = new = DATA[::-1]
    _run(task)
    assert task.path.read_bytes() == new


def test_a_file_that_changes_between_two_answers_is_noticed(server: HubServer, task: Download) -> None:
    """If the version changes after the hub reported its facts, If-Range brings the new bytes, unmixed."""
    new = DATA[::-1]

    def change(handler: Any) -> bool:
        server.files[FILE.path] = new
        return False

    server.faults = [cut_after(100_000), change]
    _run(task)
    assert task.path.read_bytes() == new


def test_without_a_version_nothing_is_resumed(server: HubServer, task: Download) -> None:
    """Bytes without a known version are fetched again."""
    server.names_checksum = server.names_etag = False
    server.faults = [cut_after(100_000)]
    _run(task)
    assert [headers.get("Range") for headers in server.seen("GET")] == [None, None]
    assert task.path.read_bytes() == DATA


def test_wrong_bytes_are_fetched_again_and_never_kept(server: HubServer, task: Download) -> None:
    """Bytes with another sha256 never get the file's name; a server that keeps sending them is given up."""
    server.faults = [wrong_bytes]
    _run(task)
    assert task.path.read_bytes() == DATA
    other = replace(task, path=task.path.with_name("b.txt"), retries=2)
    server.faults = [wrong_bytes] * 9
    with pytest.raises(OSError, match=r"expected sha256 .* found wrong bytes"):
        _run(other)
    assert not other.path.exists()
    assert len(server.faults) == 6


def test_a_damaged_part_is_found_out(server: HubServer, task: Download) -> None:
    """A part whose bytes have changed on this disk is discarded after the checksum."""
    server.faults = [cut_after(100_000)]
    with pytest.raises(OSError, match="cut after"):
        _run(replace(task, retries=0))
    with task.path.with_name("a.txt.part").open("r+b") as part:
        part.write(b"damage")
    _run(task)
    assert task.path.read_bytes() == DATA


@pytest.mark.parametrize("record", ["", "[]", '{"version": 3, "etag": []}', "{" * 1000, "x" * 20_000])
def test_a_damaged_record_begins_anew(server: HubServer, task: Download, record: str) -> None:
    """The record beside a part is not trusted."""
    task.path.parent.mkdir()
    task.path.with_name("a.txt.part").write_bytes(b"x" * 1000)
    task.path.with_name("a.txt.part.json").write_text(record)
    _run(task)
    assert task.path.read_bytes() == DATA


def test_more_bytes_than_there_should_be_are_refused(server: HubServer, task: Download) -> None:
    """A server cannot fill the disk: no more than one byte beyond the size is taken."""
    server.faults = [lambda handler: handler.reply(200, DATA * 3)] * 3
    with pytest.raises(OSError, match="expected 300,000 bytes, found more"):
        _run(replace(task, retries=2))
    assert task.path.with_name("a.txt.part").stat().st_size == 0


@pytest.mark.parametrize("bad", ["bytes 0-9/300000", "bytes 100000-299999/300001", "nonsense"])
def test_a_range_that_was_not_asked_for_is_not_appended(server: HubServer, task: Download, bad: str) -> None:
    """An answer 206 with another range or size is discarded, and the file starts again."""
    server.faults = [cut_after(100_000), lambda handler: handler.reply(206, b"x" * 10, {"Content-Range": bad})]
    _run(task)
    assert task.path.read_bytes() == DATA


@pytest.mark.parametrize("code", [206, 416])
def test_a_part_that_was_not_asked_for_is_not_taken_for_the_file(server: HubServer, task: Download, code: int) -> None:
    """Without a range in the request only status 200 is the file, even if no checksum would show it."""
    server.names_checksum = False
    server.faults = [lambda handler: handler.reply(code, b"x" * len(DATA))]
    _run(task)
    assert task.path.read_bytes() == DATA


def test_a_file_that_only_looks_like_a_part_is_not_touched(server: HubServer, task: Download) -> None:
    """A file called NAME.part without its record is somebody else's."""
    part = task.path.with_name("a.txt.part")
    part.parent.mkdir()
    part.write_text("precious")
    with pytest.raises(FileExistsError, match="found another file; move it away"):
        _run(task)
    assert part.read_text() == "precious"


def test_a_range_beyond_the_end_begins_anew(server: HubServer, task: Download) -> None:
    """Status 416 discards the part."""
    server.faults = [cut_after(100_000), status(416)]
    _run(task)
    assert task.path.read_bytes() == DATA


@pytest.mark.parametrize("code", [500, 502, 503, 429, 408])
@pytest.mark.parametrize("where", ["faults", "head_faults"])
def test_errors_that_may_pass_are_retried(server: HubServer, task: Download, code: int, where: str) -> None:
    """5xx, 429 and 408 are retried, after longer and longer waits."""
    setattr(server, where, [status(code)] * 4)
    _run(task)
    assert task.path.read_bytes() == DATA
    assert _waits(task) == [1.0, 2.0, 4.0, 8.0]


def test_retry_after_is_honoured_within_bounds(server: HubServer, task: Download) -> None:
    """The server's wait is respected, as seconds or as a date; a wait of an hour ends the download instead."""
    server.faults = [
        status(429, retry_after="7"),
        status(503, retry_after="Thu, 01 Jan 1970 00:00:00 GMT"),
        status(429, retry_after="nonsense"),
    ]
    _run(task)
    assert _waits(task) == [7.0, 2.0, 4.0]
    server.faults = [status(429, retry_after="3600")]
    with pytest.raises(OSError, match=r"429 Too Many Requests \(asks to come back in 3,600 s\)"):
        _run(replace(task, path=task.path.with_name("b.txt")))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (404, FileNotFoundError, "404 Not Found .check repo, repo_type, revision"),
        (401, PermissionError, "401 Unauthorized .set HF_TOKEN to a token"),
        (403, PermissionError, "403 Forbidden"),
        (400, ValueError, "400 Bad Request"),
        (299, ValueError, "299"),
    ],
)
def test_errors_that_stay_end_at_once(
    server: HubServer, task: Download, code: int, error: type[Exception], message: str
) -> None:
    """A permanent error is one line at once, and leaves nothing behind."""
    server.head_faults = [status(code)]
    with pytest.raises(error, match=message) as caught:
        _run(task)
    assert "\n" not in str(caught.value)
    assert _waits(task) == []
    assert _names(task) == []


def test_slow_bytes_are_waited_for_and_silence_is_not(server: HubServer, task: Download) -> None:
    """A slow connection is not a failure; a silent one is given up after the timeout and retried."""
    server.faults = [slowly]
    _run(task)
    assert _waits(task) == []
    server.faults = [silent]
    other = replace(task, path=task.path.with_name("b.txt"))
    _run(other, timeout=2.0)
    assert _waits(task) == [1.0]
    assert other.path.read_bytes() == DATA


def test_no_server_is_one_line(task: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody answers, the error names the address after the retries."""
    with serving({}) as gone:
        endpoint = gone.endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(OSError, match=r"127\.0\.0\.1.*refused \(3 failures in a row\)"):
        _run(replace(task, retries=2))
    assert _names(task) == []


def test_the_callers_checksum_binds(server: HubServer, task: Download) -> None:
    """The file must have the given sha256; if the hub names another one, the download ends at once."""
    with pytest.raises(ValueError, match="expected sha256 00"):
        _run(replace(task, sha256="0" * 64))
    assert server.seen("GET") == []
    server.names_checksum = False
    with pytest.raises(OSError, match="found wrong bytes"):
        _run(replace(task, sha256="0" * 64, retries=0))
    assert _run(replace(task, sha256=hashlib.sha256(DATA).hexdigest())).checked == "sha256"


def test_gits_checksum_of_small_files_is_checked(server: HubServer, task: Download, tmp_path: Path) -> None:
    """Files that the hub keeps in git itself come with git's sha1 of their content as the ETag."""
    sha1 = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
    server.names_checksum = False
    headers = {"ETag": f'"{sha1}"', "X-Repo-Commit": "c" * 40, "Content-Length": str(len(DATA))}
    server.head_faults = [lambda handler: handler.reply(200, headers=headers)] * 2
    server.faults = [wrong_bytes]
    assert _run(task).checked == "git sha1"
    assert task.path.read_bytes() == DATA
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert checksum_of(tmp_path / "hello", "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_offline_uses_what_is_there(server: HubServer, task: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE sends no request: a file is used, checked by a given sha256; a missing one is an error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set: expected .*a\.txt to be there already"):
        _run(task)
    task.path.parent.mkdir()
    task.path.write_bytes(DATA)
    assert not _run(task).fetched
    assert _run(replace(task, sha256=hashlib.sha256(DATA).hexdigest())).checked == "sha256"
    with pytest.raises(ValueError, match="expected sha256 0"):
        _run(replace(task, sha256="0" * 64))
    assert server.requests == []


def test_two_downloads_of_one_file_do_not_mix(server: HubServer, task: Download) -> None:
    """While another process holds the part, a download is refused in one line."""
    part = task.path.with_name("a.txt.part")
    part.parent.mkdir()
    with part.open("a+b") as held:
        assert try_lock(held, part)
        with pytest.raises(FileExistsError, match="expected to be the only download"):
            _run(task)
    assert _run(task).fetched


def test_a_part_is_held_until_the_file_has_its_name(
    server: HubServer, task: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second download that took it over while it becomes the file would begin by emptying it."""
    pytest.importorskip("fcntl")
    move, taken = download.move_into_place, []

    def take_over(part: Path, path: Path) -> None:
        with part.open("a+b") as second:
            taken.append(try_lock(second, part))
        move(part, path)

    monkeypatch.setattr(download, "move_into_place", take_over)
    assert _run(task).fetched
    assert taken == [False]
    assert task.path.read_bytes() == DATA


def test_too_small_a_disk_is_refused_before_a_byte(
    server: HubServer, task: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The needed room is known beforehand; bytes that are already here do not count."""
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=150_000))
    with pytest.raises(OSError, match=r"expected 0\.3 MB free for the download, found 0\.1 MB"):
        _run(task)
    assert server.seen("GET") == []


@pytest.mark.skipif(os.name != "posix", reason="sets a limit on file sizes")
def test_a_full_disk_is_no_failure_of_the_server(server: HubServer, task: Download) -> None:
    """A write that fails is not retried, and the error names the part."""
    with files_of_at_most(100_000), pytest.raises(OSError, match="too large") as caught:
        _run(task)
    assert str(caught.value.filename).endswith("a.txt.part")
    assert _waits(task) == []
    assert _run(task).fetched
    assert task.path.read_bytes() == DATA


def test_an_empty_file_is_a_file(server: HubServer, task: Download) -> None:
    """An empty file is created without a request for its bytes."""
    server.files[FILE.path] = b""
    assert _run(task).bytes == 0
    assert task.path.read_bytes() == b""


def test_the_recipes_name_the_files_of_their_repositories() -> None:
    """Each recipe is a training and a validation file of a data set."""
    assert {name: [file.path for file in files] for name, files in RECIPES.items()} == {
        "tinystories": ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"],
        "openwebtext_sample": ["owt_train.txt.gz", "owt_valid.txt.gz"],
    }
    expected = "https://hub/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"
    assert RECIPES["tinystories"][1].url("https://hub") == expected
