"""docs/distributed.md and its examples: the plan computes the table, and what can be started here is started."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from config.io import load_config
from config.plan import PlanConfig
from config.train import TrainConfig
from tests.cli.commands import call
from tests.pages import blocks
from tests.training.tiny_run import read_records, write_tiny_files
from transformerlm.models.estimates import count_parameters
from transformerlm.models.settings import ModelSettings
from transformerlm.training.planning.machine import Machine
from transformerlm.training.planning.micro_batch import memory_by_part
from transformerlm.training.planning.plan import shard_size_for

ROOT = Path(__file__).parents[1]
PAGE, EXAMPLES = ROOT / "docs/distributed.md", ROOT / "docs/examples"
GPUS = (1, 8, 64, 256, 1000)
TINY = shlex.split("""--model.d_model=32 --model.num_layers=2 --model.num_heads=2 --model.d_ff=64
    --model.context_length=16 --model.vocab_size=400 --training.batch_size=4 --training.max_steps=4
    --training.log_interval=1 --training.device=cpu --training.precision=fp32
    --checkpoint.interval=2 --samples.interval=0""")


# --- the table ---------------------------------------------------------------------------------------------------


def cell(overrides: dict[str, str], num_gpus: int) -> str:
    """Return what the plan says of a model on GPUs of 80 GB: who shares it, and the memory of each."""
    options = overrides | {"machine.num_gpus": str(num_gpus), "machine.memory_gb": "80GB"}
    config = load_config(PlanConfig, EXAMPLES / "large.toml", options)
    assert config.machine is not None
    machine = Machine.of(config.machine)
    shard_size = shard_size_for(config, machine, precision="bf16")
    ranks = {"num_ranks": num_gpus, "shard_size": shard_size}
    memory = memory_by_part(config, micro_batch_size=1, precision="bf16", device=machine.device, **ranks)
    fits = memory["total"] <= machine.memory_bytes
    return f"{shard_size}: {memory['total'] / 1e9:.0f} GB" if fits else "no"


def row_of(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> str:
    """Return the table's row of a model."""
    sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "d_ff": d_ff}
    overrides = {f"model.{name}": str(size) for name, size in sizes.items()}
    model = load_config(TrainConfig, EXAMPLES / "large.toml", overrides).model
    parameters = count_parameters(ModelSettings(**model.model_dump()))
    cells = [f"{parameters / 1e9:.1f} B", *map(str, sizes.values()), *(cell(overrides, number) for number in GPUS)]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_what_fits_is_what_the_plan_computes():
    """Each row of the page is made again from the sizes in it."""
    rows = re.findall(r"^\| [\d.]+ B \|.*\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        sizes = [int(one) for one in row.split(" | ")[1:5]]
        assert row_of(*sizes) == row


def test_the_plan_of_the_page_says_what_the_page_shows():
    """The transcript below the page's command is what the command prints."""
    shown = blocks(PAGE)
    (place,) = [at for at, block in enumerate(shown) if block.language == "bash" and "large.toml --gpus" in block.text]
    command = shlex.split(shown[place].text)
    assert command[0] == "transformerlm-plan"
    done = call("plan", *[str(ROOT / word) if word.endswith(".toml") else word for word in command[1:]])
    assert done.code == 0
    for line in shown[place + 1].text.splitlines():
        assert line == "..." or line in done.stderr.splitlines()


def test_the_large_model_is_one_that_can_be_trained():
    """The example is a file of transformerlm-train, and says what its numbers are."""
    config = load_config(TrainConfig, EXAMPLES / "large.toml")
    assert config.parallel.shard == "auto"
    assert config.training.batch_size * config.model.context_length == 4_194_304


# --- the examples ------------------------------------------------------------------------------------------------


def test_the_commands_that_make_shards_are_accepted():
    """No test runs them as they stand, so their options are held here."""
    shell = "".join(block.text for block in blocks(PAGE) if block.language == "bash")
    lines = re.findall(r"^transformerlm-make-data (.*)$", shell, flags=re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        arguments = [str(ROOT / word) if word.endswith(".toml") else word for word in shlex.split(line)]
        done = call("make_data", *arguments, "--print-config")
        assert done.code == 0, done.stderr


def torchrun_of(text: str) -> tuple[Any, list[str]]:
    """Return the options of a script's torchrun, as torch reads them, and the command that it starts."""
    joined = re.sub(r"\\\n\s*", " ", text)
    (line,) = re.findall(r"^(?:.*\s)?torchrun (.*)$", joined, flags=re.MULTILINE)
    found = get_args_parser().parse_args(shlex.split(line))
    return found, [found.training_script, *found.training_script_args]


@pytest.mark.parametrize("name", ["train.k8s.yaml", "train.sky.yaml"])
def test_the_torchrun_of_an_example_is_one_that_torch_and_we_accept(name):
    """torch knows each option, what is not torch's is a valid command of ours, and a restart finds the run again."""
    options, command = torchrun_of((EXAMPLES / name).read_text(encoding="utf-8"))
    assert options.no_python
    assert options.max_restarts > 0
    assert options.signals_to_handle == "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
    assert command[0] == "transformerlm-train"
    arguments = [str(ROOT / word) if word.endswith(".toml") else word for word in command[1:]]
    done = call("train", *arguments, "--print-config")
    assert done.code == 0, done.stderr
    assert any(word.startswith("--logging.run_name=") for word in arguments)


def test_the_pods_of_the_job_are_those_that_meet():
    """The Service is headless and is the pods' subdomain; torchrun waits for as many pods as there are, at pod 0."""
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((EXAMPLES / "train.k8s.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options, _ = torchrun_of(container["args"][0])
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert (job["kind"], job["spec"]["completionMode"], service["kind"]) == ("Job", "Indexed", "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == subdomain
    assert options.rdzv_endpoint.partition(":")[0] == f"{name}-0.{subdomain}"
    assert int(options.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


# --- what can be started here ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a script, with our commands on the path and one thread each."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return os.environ | more | {"RUNS_DIR": str(folder)}


def data_of(files: Any) -> list[str]:
    """Return the options by which a tiny run finds its files."""
    return [f"--data.train={files.train}", f"--data.valid={files.valid}", f"--data.tokenizer={files.tokenizer}"]


@pytest.mark.slow
def test_the_command_for_a_laptop_runs(files, tmp_path):
    """Two processes train on the CPU, and end with the losses of one process."""
    ours = [block.text for block in blocks(PAGE) if block.why.startswith("tests/test_distributed_docs.py")]
    (text,) = [text for text in ours if text.startswith("torchrun ")]
    options = [*TINY, *data_of(files), f"--runs_dir={tmp_path}", "--logging.run_name=two"]
    done = subprocess.run(
        [*shlex.split(text), *options], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [*TINY, *data_of(files), f"--runs_dir={tmp_path}", "--logging.run_name=one"]
    assert call("train", "--config", ROOT / "config/resources/train.toml", *alone).code == 0
    two, one = (
        [record["metrics.loss"] for record in read_records(tmp_path / name) if "metrics.loss" in record]
        for name in ("two", "one")
    )
    assert two == pytest.approx(one, rel=1e-6)
    assert len(two) == 4


@pytest.mark.slow
def test_the_pods_of_the_job_train_together(files, tmp_path):
    """The script of the container, started as pod 0 and as pod 1 with one process each, makes one run."""
    text = (EXAMPLES / "train.k8s.yaml").read_text(encoding="utf-8").partition("            - |\n")[2]
    script = "".join(line for line in text.splitlines(keepends=True) if line.startswith(" " * 14))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for before, after in {
        "--nproc-per-node=8": "--nproc-per-node=1",
        "transformerlm-0.transformerlm:29500": f"127.0.0.1:{port}",
        "--runs_dir=/work/runs": shlex.join([f"--runs_dir={tmp_path}", *TINY, *data_of(files)]),
    }.items():
        assert before in script
        script = script.replace(before, after)
    pods = [
        subprocess.Popen(
            ["bash", "-c", script],
            cwd=ROOT,
            env=environment(tmp_path) | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [pod.communicate(timeout=300)[1] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(ends)[-3000:]
    steps = [record["step"] for record in read_records(tmp_path / "k8s") if "metrics.loss" in record]
    assert steps == [1, 2, 3, 4]
