"""What is said of versions, source, commit and command line, also where some of it cannot be found out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from transformerlm.utils import environment
from transformerlm.utils.environment import (
    HOME,
    PACKAGES,
    commit_of,
    installed_version,
    package_commit,
    source_files,
    source_sha256,
    without_secrets,
    working_directory,
)

ROOT = Path(__file__).parents[2]


def make_source(home: Path) -> Path:
    """Write two packages of ours, and files that are no part of the source."""
    for name in ("cli/a.py", "transformerlm/utils/b.py", "transformerlm/utils/b.pyc", "other/c.py", "setup.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"# {name}\n")
    return home


def test_the_source_is_that_of_all_packages_in_order() -> None:
    """Every package of the distribution is in it, and the sum is the same each time."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(PACKAGES) == sorted(settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert HOME == ROOT
    assert Path(environment.__file__) in source_files()
    assert source_sha256() == source_sha256()


def test_each_byte_and_name_of_the_source_counts_and_nothing_else(tmp_path: Path) -> None:
    """A changed, moved or added file has another sum; bytecode and the files of others have no part in it."""
    home = make_source(tmp_path / "one")
    first = source_sha256(home)
    assert source_sha256(make_source(tmp_path / "two")) == first
    for name in ("transformerlm/utils/b.pyc", "other/c.py", "setup.py"):
        (home / name).write_text("changed")
    assert source_sha256(home) == first
    (home / "cli/new.py").touch()
    added = source_sha256(home)
    (home / "cli/new.py").rename(home / "cli/newer.py")
    moved = source_sha256(home)
    (home / "cli/a.py").write_text("# cli/A.py\n")
    assert len({first, added, moved, source_sha256(home)}) == 4


def test_source_that_cannot_be_read_has_no_sum(tmp_path: Path) -> None:
    """A name that leads nowhere is no error."""
    (make_source(tmp_path) / "cli/gone.py").symlink_to("nowhere")
    assert source_sha256(tmp_path) is None


def git(directory: Path, *arguments: str) -> str:
    """Run git as nobody in particular."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout of one commit with two files."""
    monkeypatch.setattr(environment, "_GIT_SECONDS", 300.0)
    git(tmp_path, "init", "-q")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_checkout_has_a_commit_and_may_be_dirty(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file that git knows makes it dirty, a new one does not; variables of another checkout are ignored."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    (checkout / "new.txt").touch()
    with monkeypatch.context() as patch:
        patch.delenv("GIT_DIR")
        commit = git(checkout, "rev-parse", "HEAD")
    assert commit_of(checkout) == {"commit": commit, "dirty": False}
    (checkout / "a.txt").write_text("changed")
    assert commit_of(checkout) == {"commit": commit, "dirty": True}
    assert commit_of(checkout, "b.txt") == {"commit": commit, "dirty": False}


def test_packages_that_a_checkout_does_not_know_are_not_of_its_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed into an environment inside the user's own checkout, our packages are at no commit."""
    (checkout / "transformerlm").mkdir()
    (checkout / "transformerlm/__init__.py").touch()
    monkeypatch.setattr(environment, "HOME", checkout)
    assert package_commit() == {"commit": None, "dirty": None}
    git(checkout, "add", "transformerlm")
    git(checkout, "commit", "-q", "-m", "second")
    assert package_commit() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize("why", ["no checkout", "no commit", "no git", "too slow"])
def test_without_a_commit_it_is_none(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository, an empty one, no git and a git that does not answer all give None."""
    if why == "no commit":
        git(tmp_path, "init", "-q")
    if why == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    if why == "too slow":
        (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(environment, "_GIT_SECONDS", 0.05)
    assert commit_of(tmp_path) == {"commit": None, "dirty": None}


def test_a_directory_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory may be gone while a program runs in it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert working_directory() == str(gone)
    gone.rmdir()
    assert working_directory() is None


def test_a_distribution_that_is_missing_has_no_version() -> None:
    """It is None, not an error."""
    assert installed_version("no-such-distribution") is None
    assert installed_version("numpy")


def test_values_of_secret_options_are_hidden() -> None:
    """Whatever is named after a secret has `***` in place of its value, joined or not; everything else is as typed."""
    words = ["train", "--wandb.api_key=abc", "--hub.token", "abc", "--password", "abc", "--key=abc", "-token=abc"]
    words += [
        "--proxy=https://ada:abc@example.org/x",
        "--hub.token",
        "--data.tokenizer=abcd",
        "--training.eval_tokens=9",
    ]
    assert without_secrets(words) == [
        "train",
        "--wandb.api_key=***",
        "--hub.token",
        "***",
        "--password",
        "***",
        "--key=***",
        "-token=***",
        "--proxy=https://***@example.org/x",
        "--hub.token",
        "--data.tokenizer=abcd",
        "--training.eval_tokens=9",
    ]
