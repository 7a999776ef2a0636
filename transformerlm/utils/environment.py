"""What a program runs in: versions, processor, source, commit, command line.

Nothing here raises or needs torch: what cannot be found out is None.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2]
"""The directory that our packages are in: a checkout, or `site-packages`."""
PACKAGES = ("benchmarking", "cli", "config", "databuilder", "logger", "profiling", "transformerlm")
_GIT_SECONDS = 3.0
# The last word of a key that holds a secret: `api_key` and `token`, but not `tokenizer` or `eval_tokens`.
_SECRET = re.compile(r"(?:^|[._-])(?:api_?key|auth|credentials?|key|pass|passphrase|passw(?:or)?d|secret|token)$", re.I)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_HIDDEN = "***"


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the processor's name according to the operating system."""
    for line in cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpuinfo() -> list[str]:
    """Return the lines in which Linux describes the processors; none on another system."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def working_directory() -> str | None:
    """Return the working directory; None if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


# --- source ------------------------------------------------------------------------------------------------------


def source_sha256(home: Path = HOME) -> str | None:
    """Return a sha256 of the `.py` files of our packages in `home`; None if one cannot be read.

    It is taken over each file's path, size and bytes, in the order of the paths. It does not depend on how the packages
    were installed.
    """
    digest = hashlib.sha256()
    try:
        for path in source_files(home):
            data = path.read_bytes()
            digest.update(f"{path.relative_to(home).as_posix()}\0{len(data)}\0".encode())
            digest.update(data)
    except OSError:
        return None
    return digest.hexdigest()


def source_files(home: Path = HOME) -> list[Path]:
    """Return the `.py` files of our packages in `home`, in the order of their paths."""
    found = (path for package in PACKAGES for path in (home / package).rglob("*.py"))
    return sorted(found, key=lambda path: path.relative_to(home).as_posix())


def package_commit() -> dict[str, Any]:
    """Return the `commit` that our packages are at, and whether they are `dirty`; None where they are no checkout.

    Packages that pip installed inside of the user's own checkout do not belong to it.
    """
    if _git(HOME, "ls-files", "--error-unmatch", "--", f"{PACKAGES[-1]}/__init__.py") is None:
        return {"commit": None, "dirty": None}
    return commit_of(HOME, *PACKAGES)


def commit_of(directory: Path, *paths: str) -> dict[str, Any]:
    """Return the `commit` of a checkout, and whether its tracked files (below `paths`) differ from it: `dirty`.

    Both are None where the directory is no checkout, git is missing or does not answer in time.
    """
    text = _git(directory, "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--", *paths)
    lines = (text or "").splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), None)
    if commit is None or commit == "(initial)":
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}


def _git(directory: Path, *arguments: str) -> str | None:
    """Return what git says; None if it fails. It takes no lock and starts no program that the checkout names."""
    # A program that git started, such as a hook, inherits variables that mean another checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_GIT_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


# --- command -----------------------------------------------------------------------------------------------------


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line with `***` for the value of each option that is named after a secret.

    Such a name ends in `password`, `token`, `api_key` or the like. A name and password in an address are hidden, too.
    """
    return [_PASSWORD_IN_URL.sub(f"{_HIDDEN}@", word) for word in _hidden(words)]


def _hidden(words: Sequence[str]) -> Iterator[str]:
    is_value = False
    for word in words:
        name, joined, _ = word.partition("=")
        is_secret = name.startswith("-") and _SECRET.search(name) is not None
        if is_value and not word.startswith("--"):
            yield _HIDDEN
        elif is_secret and joined:
            yield f"{name}={_HIDDEN}"
        else:
            yield word
        is_value = is_secret and not joined
