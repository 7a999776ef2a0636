"""Run the whole corpus in one process that may not have much more memory than it started with.

    python -m tests.hostile.run_corpus FOLDER

writes a JSON line for each case to stdout: how the command ended, and what it said on stderr.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch

from tests.cli.commands import call
from tests.hostile import (  # noqa: F401 (they fill the corpus)
    corpus_checkpoints,
    corpus_files,
    corpus_imports,
    corpus_several_files,
)
from tests.hostile.corpus import CASES, make_good

MORE_BYTES = 1 << 29


def main(home: Path) -> None:
    """Write the good files, see that they are good, limit the memory, and run every case."""
    torch.set_num_threads(1)
    good = make_good(home / "good")
    results = sys.stdout
    warm_up(home, good)
    limit_memory()
    for number, case in enumerate(CASES):
        folder = home / str(number)
        folder.mkdir()
        arguments = case.build(folder, good)
        start = time.perf_counter()
        outcome = call(case.command, *arguments)
        record = {
            "name": case.name,
            "code": outcome.code,
            "stderr": outcome.stderr,
            "code_has_run": bool(list(folder.rglob("code-has-run"))) or Path("code-has-run").exists(),
            "seconds": time.perf_counter() - start,
        }
        results.write(json.dumps(record) + "\n")


def warm_up(home, good) -> None:
    """Run each command on the good files: they pass, so it is the lie that is refused; and all modules are loaded."""
    from tests.hostile.corpus import copy_checkpoint, evaluate, infer, make_data, resume, train_tokenizer

    copy_checkpoint(home, good)
    for command, arguments in (
        ("infer", infer(good.checkpoint)),
        ("infer", infer(home / "run")),
        ("eval", evaluate(good.checkpoint, good)),
        ("make_data", make_data(home, good)),
        ("train_tokenizer", train_tokenizer(home, good.files.text)),
        ("train", resume(home, good)),
        ("import_", good_import(home, good)),
    ):
        outcome = call(command, *arguments)
        assert outcome.code == 0, (command, outcome.stderr)


def good_import(home, good) -> list[str]:
    """Return the arguments of an import that is in order."""
    from transformerlm.interop.hf_export import write_hf

    write_hf(good.checkpoint, home / "hf", verify=False)
    return [f"--source={home / 'hf'}", f"--output={home / 'imported'}", "--verify=false"]


def limit_memory() -> None:
    """Let the process have half a gigabyte more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
