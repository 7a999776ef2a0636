"""The commands of docs/serving.md, tried with a server on a small run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from config.commands import COMMANDS
from tests.cli.conftest import pipeline  # noqa: F401 (a fixture)
from tests.cli.test_serve import WAIT, serving
from tests.pages import blocks
from tests.test_readme import ROOT
from transformerlm.serving.api_schema import IGNORED, CompletionRequest
from transformerlm.serving.engine import EngineStatus
from transformerlm.serving.metrics import PREFIX, Metrics

PAGE = ROOT / "docs/serving.md"


def lines_of(language: str, beginning: str) -> Iterator[str]:
    """Yield the page's lines in a language that begin so."""
    for block in blocks(PAGE):
        if block.language == language:
            yield from (line for line in block.text.splitlines() if line.startswith(beginning))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_the_commands_of_the_page_work(pipeline, tmp_path):  # noqa: F811
    """Each server of the page starts, and each of its requests is answered, with the key where there is one."""
    (tmp_path / "runs").mkdir()
    os.symlink(pipeline.run, tmp_path / "runs/first")
    starts = [shlex.split(line)[1:] for line in lines_of("bash", "transformerlm-serve")]
    assert len(starts) == 4
    asks = list(lines_of("bash", "curl"))
    assert len(asks) == 3
    for arguments in starts:
        has_key = any("key_env" in word for word in arguments)
        rest = [word for word in arguments if word not in ("--checkpoint", "runs/first")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SERVE_KEY", "a-key")
            with serving(tmp_path / "runs/first", *rest) as (_, url):
                port = url.rpartition(":")[2]
                for line in asks:
                    if ("SERVE_KEY" in line) == has_key:
                        command = line.replace(":8000", f":{port}").replace('"max_tokens": 20', '"max_tokens": 2')
                        answer = subprocess.run(
                            ["bash", "-c", command], capture_output=True, text=True, timeout=WAIT, check=True
                        ).stdout
                        assert answer
                        assert '"error"' not in answer


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openai") is None, reason="needs openai")
def test_the_python_of_the_page_works(pipeline, tmp_path):  # noqa: F811
    """openai's client gets a text."""
    [block] = [block for block in blocks(PAGE) if block.language == "py"]
    os.symlink(pipeline.run, tmp_path / "first")
    with serving(tmp_path / "first") as (_, url):
        source = block.text.replace("http://localhost:8000", url).replace("max_tokens=20", "max_tokens=2")
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_has_every_key_of_a_request():
    """The table names what the schema takes, and what is ignored, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("### What a request for completions may hold")[2].partition("\n\nA key")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(CompletionRequest.model_fields)
    assert all(f"`{key}`" in text for key in IGNORED)


def test_the_page_has_every_metric():
    """The table names what /metrics tells, and nothing else."""
    metrics = Metrics(lambda: EngineStatus(state="ok", facts=None))
    told = {
        f"{one.name.removeprefix(PREFIX)[1:]}{'_total' * (one.type == 'counter')}" for one in metrics.registry.collect()
    }
    table = PAGE.read_text(encoding="utf-8").partition("each with the prefix")[2]
    cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+?)(?:\{\w+\})?`", cells))
    assert named == told | {"model_step"}


def test_the_unit_waits_for_texts_to_end():
    """systemd gives the server more time than its texts get, and takes its exit code for what it is."""
    unit = (ROOT / "docs/examples/transformerlm-serve.service").read_text(encoding="utf-8")
    drain = COMMANDS["transformerlm-serve"].model_fields["timeouts"].default.drain
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > int(drain.removesuffix("s"))
    assert "SuccessExitStatus=143" in unit
    [start] = re.findall(r"ExecStart=\S+/(\S+) ", unit)
    assert start in COMMANDS
    assert Path(ROOT / "docs/serving.md").read_text().count("transformerlm-serve.service") == 2
