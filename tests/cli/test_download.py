"""`transformerlm-download`: files of a recipe or of a repository, a JSON line for each, and one line for a mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.commands import ROOT, call
from tests.databuilder.hub_server import as_the_hub, status

STORIES = {f"TinyStoriesV2-GPT4-{split}.txt": f"A {split} story.\n".encode() * 50 for split in ("train", "valid")}


@pytest.fixture
def server():
    """Return a hub that has the files of a recipe, and one more."""
    with as_the_hub({**STORIES, "data/more.txt": b"more"}) as running:
        yield running


def test_a_recipes_files_come_once(server, tmp_path):
    """Each file has a line on stdout and one on stderr; the second call fetches nothing."""
    options = ["--recipe=tinystories", f"--output_dir={tmp_path}"]
    done = call("download", *options)
    assert done.code == 0, done.stderr
    assert [(record["event"], record["fetched"], record["checked"]) for record in done.records] == [
        ("downloaded", True, "sha256")
    ] * 2
    for name, data in STORIES.items():
        assert (tmp_path / name).read_bytes() == data
    assert "downloaded, checked by sha256" in done.stderr
    again = call("download", *options)
    assert [record["fetched"] for record in again.records] == [False, False]
    assert "there already" in again.stderr


def test_any_file_of_a_repository_keeps_its_path(server, tmp_path):
    """Files of a model or data set have the same paths below output_dir as in the repository."""
    done = call("download", "--repo=me/it", "--files", "data/more.txt", "--repo_type=model", f"--output_dir={tmp_path}")
    assert done.code == 0, done.stderr
    assert (tmp_path / "data/more.txt").read_bytes() == b"more"
    assert done.records[0]["url"] == f"{server.endpoint}/me/it/resolve/main/data/more.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected recipe, or repo and files, found neither whole"),
        (["--repo=a/b"], "found neither whole"),
        (["--recipe=tinystories", "--repo=a/b"], "found both"),
        (["--recipe=tinystories", "--revision=v1"], "revision is for repo"),
        (["--recipe=tinystories", "--repo_type=model"], "repo_type is for repo"),
        (["--recipe=stories"], 'expected one of "tinystories", "openwebtext_sample"'),
        (["--repo=a/b", "--files", "../x"], "expected a file's path in the repository"),
        (["--repo=a/b", "--files", "/etc/passwd"], "expected a file's path in the repository"),
        (["--repo=a/b", "--files", "a\\..\\b"], "expected a file's path in the repository"),
        (["--repo=a/../b", "--files", "x"], "repo"),
        (["--repo=a/b", "--files", "x", "x"], "files holds a file twice"),
        (["--repo=a/b", "--files", "x", "--sha256", "0" * 64, "1" * 64], "sha256 needs one for each of files (1)"),
        (["--repo=a/b", "--files", "gone.txt"], "404 Not Found"),
    ],
)
def test_what_cannot_be_is_one_line(server, tmp_path, arguments, message):
    """Mistakes end with exit code 2 before anything is written."""
    done = call("download", f"--output_dir={tmp_path / 'out'}", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_server_that_fails_is_exit_1(server, tmp_path):
    """Running out of retries is not the caller's mistake."""
    server.head_faults = [status(500)]
    done = call("download", "--repo=a/b", "--files", "data/more.txt", f"--output_dir={tmp_path}", "--retries=0")
    assert done.code == 1
    assert "500 Internal Server Error (1 failures in a row)" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_part_and_the_command_goes_on(server, tmp_path):
    """An interrupted download ends with 130; the same command fetches the rest."""
    data = os.urandom(3_000_000)
    server.files["big.bin"] = data
    process = None

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:2_000_000])
        handler.wfile.flush()
        part = tmp_path / "big.bin.part"
        while not (part.exists() and part.stat().st_size == 2_000_000) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait()
        return True

    server.faults = [stall]
    arguments = ["--repo=a/b", "--files", "big.bin", f"--output_dir={tmp_path}"]
    command = [sys.executable, "-m", "cli.download", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "big.bin").exists()
    assert call("download", *arguments).code == 0
    assert [headers.get("Range") for headers in server.seen("GET")] == [None, "bytes=2000000-"]
    assert (tmp_path / "big.bin").read_bytes() == data
