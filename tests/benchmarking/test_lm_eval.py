"""Tests of the harness's launcher; those of a whole run need the extra `eval`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarking import lm_eval
from config.extras import how_to_install
from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.training.trainer import TrainConfig

ROOT = Path(__file__).parents[2]
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{[good, bad]}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n',
    "loglikelihood_rolling": 'doc_to_target: "{{question}} {{good}}"\nmetric_list: [{metric: bits_per_byte}]\n',
    "generate_until": 'doc_to_target: "{{good}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 12}\n'
    "metric_list: [{metric: exact_match}]\n",
}


def test_a_missing_harness_is_named_with_its_extra(monkeypatch, capsys):
    """Without lm-eval the launcher ends with 2 and the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        lm_eval.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"lm-eval is not installed: {how_to_install('eval')}\n"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_HARNESS, reason="needs the extra eval")
def test_the_harness_runs_tasks_of_local_files_on_a_checkpoint(tmp_path):
    """A trained checkpoint answers all kinds of requests, without a network."""
    from cli.train import train

    files = write_tiny_files(tmp_path)
    config = tiny_config(files, tmp_path, {"training.max_steps": 150, "optimizer.learning_rate": 1e-2})
    train(TrainConfig.model_validate(config.model_dump()))
    documents = [
        {"question": f"{name} sees", "good": "the sea.", "bad": "xqz vvv."} for name in ("Ada", "Bob", "Zoë") * 2
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for kind, rest in KINDS.items():
        text = TASK.format(name=f"tiny_{kind}", data=tmp_path / "data.jsonl", kind=kind) + rest
        (tmp_path / f"{kind}.yaml").write_text(text)
    command = [sys.executable, "-m", "benchmarking.lm_eval", "run", "--model", "transformerlm"]
    command += ["--model_args", f"checkpoint={tmp_path / 'run'}", "--tasks", ",".join(f"tiny_{kind}" for kind in KINDS)]
    command += ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "results.json")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert results["tiny_multiple_choice"]["acc,none"] == 1.0
    assert 0 < results["tiny_loglikelihood_rolling"]["bits_per_byte,none"] < 4
    assert "exact_match,none" in results["tiny_generate_until"]
