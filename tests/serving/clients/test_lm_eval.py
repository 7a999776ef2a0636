"""lm-eval's `local-completions` measures over HTTP what our adapter measures in the same process."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarking.test_lm_eval import TASK
from tests.serving.command import CONTEXT, ENVIRONMENT, WAIT, Server, save_random_model, serving
from tests.training.tiny_run import TinyFiles
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.document_ids import KEY, DocumentIds
from transformerlm.interop.hf_export import write_hf
from transformerlm.tokenizer import Tokenizer

HAS_HARNESS = all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "aiohttp", "tenacity"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_HARNESS, reason="needs the extra serve-test")]

KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n',
    "loglikelihood_rolling": 'doc_to_target: "{{question}}{{choices[0]}}"\nmetric_list: [{metric: bits_per_byte}]\n',
    "generate_until": 'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: ["\\n", "sea"], max_gen_toks: 12}\n'
    "metric_list: [{metric: exact_match}]\n",
}


def write_tasks(folder: Path) -> list[str]:
    """Write 24 documents and a task of each kind over them; return the names of the tasks."""
    rng = random.Random(1)
    things = ["the sea.", "a tree.", "two 🍎.", "Ada sees a tree and the sea.", "xqz"]
    documents = [
        {
            "question": f"{rng.choice(['Ada', 'Émile', 'Zoë'])} {rng.choice(['sees', 'likes'])} ",
            "choices": rng.sample(things, 3),
        }
        for _ in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
    for kind, rest in KINDS.items():
        head = TASK.format(name=f"tiny_{kind}", data=folder / "data.jsonl", kind=kind)
        (folder / f"{kind}.yaml").write_text(head + rest, encoding="utf-8")
    return [f"tiny_{kind}" for kind in KINDS]


def evaluate(module: str, model: str, arguments: str, tasks: list[str], folder: Path, out: str) -> dict[str, Any]:
    """Run the harness without a network; return each task's results, and the answers of the model to each document."""
    command = [sys.executable, "-P", "-m", module, "run", "--model", model, "--model_args", arguments]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder), "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(folder / out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        command, env=ENVIRONMENT | offline, capture_output=True, text=True, timeout=4 * WAIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (folder / out).rglob("results*.json")
    found: dict[str, Any] = {"results": json.loads(written.read_text(encoding="utf-8"))["results"]}
    for task in tasks:
        (samples,) = (folder / out).rglob(f"samples_{task}*.jsonl")
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        found[task] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return found


def numbers(answers: Any) -> list[float]:
    """Return all numbers in answers, which the harness writes as text in places."""
    if isinstance(answers, list):
        return [number for one in answers for number in numbers(one)]
    return [] if answers in (True, False, "True", "False") else [float(answers)]


def test_results_are_those_of_the_adapter(server: Server, untrained: Path, tmp_path: Path):
    """Multiple choice, a rolling likelihood and greedy texts of 24 documents: equal accuracy, bits and texts."""
    tasks = write_tasks(tmp_path)
    url = f"{server.url}/v1/completions"
    over_http = f"model=run,base_url={url},num_concurrent=4,max_length={CONTEXT}"
    there = evaluate("lm_eval", "local-completions", over_http, tasks, tmp_path, "there")
    here = evaluate("benchmarking.lm_eval", "transformerlm", f"checkpoint={untrained}", tasks, tmp_path, "here")
    choice, rolling, generate = tasks
    accuracies = [one["results"][choice]["acc,none"] for one in (there, here)]
    assert accuracies[0] == accuracies[1]
    assert 0 < accuracies[0] < 1
    bits = [one["results"][rolling]["bits_per_byte,none"] for one in (there, here)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    for task in (choice, rolling):
        assert numbers(there[task]) == pytest.approx(numbers(here[task]), abs=1e-3)
        assert len(numbers(there[task])) == (72 if task == choice else 24)
    assert there[generate] == here[generate]
    assert len({str(one) for one in there[generate]}) > 1


def test_a_token_before_each_text_is_read_on_both_ways(files: TinyFiles, tmp_path: Path):
    """With the tokenizer of an export, which adds it, choices and greedy texts are those of the adapter."""
    pytest.importorskip("transformers")
    end = Tokenizer.from_directory(files.tokenizer).special_token_ids["<|endoftext|>"]
    state = {KEY: DocumentIds(end, (end,), starts_texts=True).to_state()}
    run = save_random_model(tmp_path / "run", files, state=state)
    write_hf(resolve(run), tmp_path / "hf", verify=False)
    choice, _, generate = write_tasks(tmp_path)
    with serving(run, tmp_path / "server") as server:
        over_http = f"model=run,base_url={server.url}/v1/completions,num_concurrent=4,max_length={CONTEXT}"
        over_http += f",tokenizer_backend=huggingface,tokenizer={tmp_path / 'hf'},add_bos_token=True"
        there = evaluate("lm_eval", "local-completions", over_http, [choice, generate], tmp_path, "there")
    ours = ("benchmarking.lm_eval", "transformerlm", f"checkpoint={run}")
    here = evaluate(*ours, [choice, generate], tmp_path, "here")
    assert numbers(there[choice]) == pytest.approx(numbers(here[choice]), abs=1e-3)
    assert there[generate] == here[generate]
