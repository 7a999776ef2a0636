"""guidellm, unmodified, measures the server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.command import ENVIRONMENT, WAIT, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("guidellm") is None, reason="needs the extra serve-test"),
]


def test_it_measures_32_requests_and_counts_the_tokens_that_were_made(server: Server, untrained: Path, tmp_path: Path):
    """All of them succeed at 4 streams, with the tokenizer that we export and no network; each text has 16 tokens."""
    export = [sys.executable, "-P", "-m", "cli.export", f"--checkpoint={untrained}", f"--output={tmp_path / 'hf'}"]
    done = subprocess.run(export, env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    before = server.metric("generated_tokens_total")
    options = {
        "--backend": f"kind=openai_http,target={server.url},model=run,request_format=/v1/completions",
        "--profile": "kind=concurrent,streams=4",
        "--constraint": "kind=max_requests,count=32",
        "--tokenizer": f"kind=hf_auto,model={tmp_path / 'hf'}",
        "--data": "kind=synthetic_text,prompt_tokens=20,output_tokens=16",
        "--output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    command += [part for pair in options.items() for part in pair]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, env=ENVIRONMENT | offline, capture_output=True, text=True, timeout=4 * WAIT, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    [benchmark] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["benchmarks"]
    counts = benchmark["metrics"]["request_totals"]
    assert (counts["successful"], counts["errored"]) == (32, 0)
    tokens = benchmark["metrics"]["output_token_count"]["successful"]
    assert tokens["mean"] == 16
    assert server.metric("generated_tokens_total") >= before + 32 * 16
