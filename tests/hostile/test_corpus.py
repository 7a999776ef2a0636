"""Every hostile file is refused in one line that names it, in bounded memory, without a traceback, and runs no code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import (  # noqa: F401 (they fill the corpus)
    corpus_checkpoints,
    corpus_files,
    corpus_imports,
    corpus_several_files,
)
from tests.hostile.corpus import CASES

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 3000
PROGRESS = re.compile(r"warning: |resum|[\d.]+/[\d.]+ kB  ")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run the corpus once in a process of its own with limited memory; return how each case ended."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.run_corpus", str(tmp_path_factory.mktemp("hostile"))],
        cwd=ROOT, capture_output=True, text=True, timeout=MAX_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {record["name"]: record for record in records}


def test_the_corpus_is_large():
    """There are at least 100 cases, each with a name of its own."""
    assert len({case.name for case in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_file_is_refused_in_one_line(case, outcomes):
    """Exit code 2, one error line that names the file, no traceback, and nothing of the file was executed."""
    outcome = outcomes[case.name]
    lines = outcome["stderr"].splitlines()
    errors = [line for line in lines if not PROGRESS.match(line)]
    assert outcome["code"] == 2, outcome
    assert len(errors) == 1, outcome
    assert case.blames in errors[0], outcome
    assert "Traceback" not in outcome["stderr"]
    assert all(len(line) < 2_100 and line.isprintable() for line in lines)
    assert not outcome["code_has_run"]
