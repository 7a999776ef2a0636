"""`transformerlm-make-data`: token files that training opens, a JSON line for each, and refusals before any work."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, call
from transformerlm.token_files.dataset import TokenDataset


@pytest.fixture
def arguments(pipeline, tmp_path):
    """Return a command line for the pipeline's text and tokenizer."""
    return ["--input", pipeline.files.text, "--tokenizer", pipeline.files.tokenizer, "--train", tmp_path / "train.npy"]


def test_it_writes_both_splits_and_a_line_for_each(arguments, pipeline, tmp_path):
    """Training and validation file open with the numbers that the lines name, and hold all documents between them."""
    done = call("make_data", *arguments, "--valid", tmp_path / "valid.npy", "--valid_fraction=0.2")
    assert done.code == 0
    assert [record["event"] for record in done.records] == ["data_made", "data_made"]
    for record in done.records:
        dataset = TokenDataset(record["path"])
        dataset.check()
        assert (record["tokens"], record["bytes"]) == (dataset.num_tokens, dataset.num_bytes)
    text = pipeline.files.text.read_text()
    assert sum(record["documents"] for record in done.records) == text.count("<|endoftext|>") + 1
    assert "documents" in done.stderr


def test_outputs_are_not_written_over_by_accident(arguments, tmp_path):
    """An existing file is refused, and replaced with `--overwrite`."""
    call("make_data", *arguments)
    before = (tmp_path / "train.npy").stat().st_mtime_ns
    again = call("make_data", *arguments)
    assert (again.code, again.stdout) == (2, "")
    assert "overwrite" in again.stderr
    assert (tmp_path / "train.npy").stat().st_mtime_ns == before
    assert call("make_data", *arguments, "--overwrite").code == 0


def test_the_sources_of_the_documentation_run(pipeline, tmp_path, monkeypatch):
    """The TOML of docs/usage.md makes a token file of three sources; stderr and the sidecar tell their shares."""
    section = (ROOT / "docs/usage.md").read_text(encoding="utf-8").partition("### Several sources with weights")[2]
    (tmp_path / "mixed.toml").write_text(re.search(r"```toml\n(.*?)```", section, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/books").mkdir(parents=True)
    (tmp_path / "data/stories.txt").write_text("<|endoftext|>".join(f"story {number}" for number in range(40)))
    for name in ("first", "second"):
        (tmp_path / f"data/books/{name}.txt.gz").write_bytes(gzip.compress(f"the {name} book".encode()))
    articles = [json.dumps({"body": f"article {number}"}) for number in range(40)]
    (tmp_path / "data/articles.jsonl").write_text("\n".join(articles))
    done = call("make_data", "--config", "mixed.toml", "--tokenizer", pipeline.files.tokenizer)
    assert done.code == 0, done.stderr
    dataset = TokenDataset("data/mixed.npy")
    assert [(source["weight"], source["documents"]) for source in dataset.metadata["mixture"]] == [
        (2.5, 2 * 37 + 19),  # 3 of 40 are held out
        (1.0, 2),
        (0.5, 19),
    ]
    assert re.search(r"  data/stories\.txt: \d\d\.\d% of the tokens, 93 documents\n", done.stderr)
    plain = call("make_data", "--config", "mixed.toml", "--sources=[]", "--input=data/stories.txt", "--overwrite",
                 "--tokenizer", pipeline.files.tokenizer)  # fmt: skip
    assert plain.code == 0, plain.stderr
    assert "mixture" not in TokenDataset("data/mixed.npy").metadata


def tools(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """Write shell programs, and return an environment in which they come first."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_the_tasks_of_the_documented_job_array_share_the_work(arguments, tmp_path):
    """Two tasks at once, and a late one: one writes the file, the others have nothing left to do, and all end well."""
    (tmp_path / "data.toml").write_text(
        "".join(f"{key[2:]} = {json.dumps(str(value))}\n" for key, value in batched(arguments)).replace(
            f'"{arguments[1]}"', f'["{arguments[1]}"]'
        )
    )
    environment = tools(tmp_path / "bin", {"transformerlm-make-data": f'exec {sys.executable} -m cli.make_data "$@"'})
    script = ["bash", ROOT / "docs/examples/make-data-array.sbatch", tmp_path / "data.toml"]

    def start(task: int) -> subprocess.Popen[str]:
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "3"}
        return subprocess.Popen(
            script, cwd=ROOT, env=environment | array, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = [start(3), start(4)]
    ends = [process.communicate(timeout=300) for process in first]
    late = start(5)
    ends.append(late.communicate(timeout=300))
    assert [process.returncode for process in (*first, late)] == [0, 0, 0], ends
    events = [json.loads(line)["event"] for stdout, _ in ends for line in stdout.splitlines()]
    assert sorted(events) == ["data_made", "share_done", "share_done"]
    assert not (tmp_path / "train.npy.parts").exists()
    shared = (tmp_path / "train.npy").read_bytes()
    assert call("make_data", *arguments, "--overwrite").code == 0
    assert (tmp_path / "train.npy").read_bytes() == shared


def test_the_documented_ray_job_starts_a_cluster_and_ends_it(tmp_path):
    """The head first, with the job's own port and folder, then the other nodes, then the command on the head."""
    log = tmp_path / "log"
    environment = tools(
        tmp_path / "bin",
        {
            "scontrol": "printf 'localhost\\nother\\n'",
            "srun": f'echo "$@" >> {log}; case "$*" in *block*) exec sleep 600;; esac; '
            f"until [ $(wc -l < {log}) -ge 3 ]; do sleep 0.05; done; exit 3",
        },
    )
    job = {"SLURM_JOB_ID": "70123", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[1-4]"}
    script = ["bash", ROOT / "docs/examples/make-data-ray.sbatch", "data.toml"]
    done = subprocess.run(
        script, env=environment | job | {"RAY_START_SECONDS": "5"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stderr  # the command's own code
    head, others, command = sorted(log.read_text().splitlines(), key=lambda line: ("--head" not in line, line))
    assert "--nodelist=localhost ray start --head" in head
    assert "--port=20123" in head
    assert "--temp-dir=/tmp/ray-70123 --block" in head
    assert "--nodes=3 --ntasks=3 --exclude=localhost ray start --address=127.0.0.1:20123" in others
    assert command.endswith("--config data.toml --cluster.on=ray --cluster.address=127.0.0.1:20123")


def batched(items):
    """Return the items in pairs."""
    return zip(items[::2], items[1::2], strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tokenizer=nowhere"], "nowhere"),
        (["--input=nowhere.txt"], r"nowhere\.txt"),
        (["--separator=<sep>"], "<sep>"),
        (["--train=x.bin"], r"must end in \.npy"),
        (["--valid_fraction=0.5"], "go together"),
        (["--cluster.share=1/2"], 'share = "1/2" does nothing with on = "local"'),
        (["--cluster.on=share", "--cluster.share=3/2"], "expected one of 1/2 to 2/2, found 3/2"),
        (["--cluster.on=share", "--overwrite"], "overwrite is not for"),
        (["--cluster.on=ray", "--max_tokens=10"], "are for cluster"),
        (["--cluster.on=share"], "expected a share such as"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_and_exit_2(changes, message, arguments, tmp_path, monkeypatch):
    """Inputs that are missing or do not fit together are refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    done = call("make_data", *arguments, *changes)
    assert (done.code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message.replace("\\", "") in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--input=a.txt", '--sources=[{input=["a.txt"]}]'], "--sources: expected either input or sources, found both"),
        ([], "input is required where there are no sources"),
        (["--sources=[]"], "--sources: input is required where there are no sources"),
        (['--sources=[{input=["no.txt"]}]'], "sources.0: input: expected a text file, found nothing at no.txt"),
        (['--sources=[{input=["a.txt"], weight=0}]'], "sources.0.weight: expected a number > 0"),
        (['--sources=[{input=["a.txt"], weight=nan}]'], "sources.0.weight: expected a number > 0"),
        (['--sources=[{input=["a.txt"], weigth=2}]'], "sources.0.weigth is not a known key (did you mean weight?)"),
        (["--sources=a.txt"], "sources.0: expected a table, found"),
    ],
    ids=str,
)
def test_sources_that_cannot_work_are_one_line_and_exit_2(changes, message, arguments, tmp_path, monkeypatch):
    """Sources with input, neither of them, and mistakes in a source are errors, each named by its place."""
    monkeypatch.chdir(tmp_path)
    done = call("make_data", *arguments[2:], *changes)
    assert (done.code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_each_input_may_have_a_token_file_of_its_own(pipeline, tmp_path):
    """`outputs = "per-input"`: files of the inputs' names in one folder, the same as those of single commands."""
    text = pipeline.files.text.read_text()
    for name in ("one.txt", "two.md"):
        (tmp_path / name).write_text(text + name)
    shared = ["--tokenizer", pipeline.files.tokenizer]
    done = call("make_data", "--input", tmp_path / "one.txt", tmp_path / "two.md", *shared, "--outputs=per-input",
                "--train", tmp_path / "tokens", "--valid", tmp_path / "held", "--valid_fraction=0.2")  # fmt: skip
    assert done.code == 0, done.stderr
    names = [f"{name}.{ending}" for name in ("one", "two") for ending in ("documents.npy", "json", "npy")]
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "held").iterdir()) == names
    assert len(done.records) == 4
    call("make_data", "--input", tmp_path / "two.md", *shared, "--train", tmp_path / "a.npy", "--valid",
         tmp_path / "b.npy", "--valid_fraction=0.2")  # fmt: skip
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "tokens/two.npy").read_bytes()
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "held/two.npy").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--input=a.txt", "--train=tokens.npy"], 'train is a folder with outputs = "per-input", found "tokens.npy"'),
        (["--input", "a.txt", "a.md"], "expected names that differ, found a.txt and a.md, which would both be a.npy"),
        (["--input", "a.txt", "b.txt"], "tokens/b.npy: expected no such file yet"),
        (['--sources=[{input=["a.txt"]}]'], 'max_tokens and outputs = "per-input" are for input'),
    ],
    ids=str,
)
def test_outputs_for_each_input_are_checked_before_any_is_written(changes, message, pipeline, tmp_path, monkeypatch):
    """Two inputs of one name, an existing file, and a train that is not a folder: exit 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.md", "b.txt", "tokens/b.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--train=tokens", "--outputs=per-input", "--tokenizer", pipeline.files.tokenizer]
    done = call("make_data", *arguments, *changes)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_input_that_is_too_short_for_a_split_is_named(pipeline, tmp_path):
    """Of many, each with its own files, one may have a single document; the folders may have a dot in their names."""
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    (tmp_path / "b.txt").write_text("one")
    held = ["--train", tmp_path / "train", "--valid", tmp_path / "valid.v2", "--valid_fraction=0.3"]
    given = ["--tokenizer", pipeline.files.tokenizer, "--outputs=per-input", "--input", tmp_path / "a.txt"]
    done = call("make_data", *given, tmp_path / "b.txt", *held)
    assert done.code == 2
    assert f"{tmp_path / 'b.txt'}: valid_fraction: expected at least one document on each side" in done.stderr
    assert (tmp_path / "valid.v2/a.npy").exists()


def test_a_sample_of_so_many_tokens_is_taken_and_blank_documents_are_told(arguments, pipeline, tmp_path):
    """`max_tokens` bounds the file; how many documents had no text is said on stderr and in the line."""
    done = call("make_data", *arguments, "--max_tokens=2000")
    assert done.code == 0, done.stderr
    assert 1000 < done.records[0]["tokens"] <= 2000
    (tmp_path / "blank.txt").write_text("one<|endoftext|> \n<|endoftext|>\t<|endoftext|>\n<|endoftext|>two")
    done = call("make_data", *arguments, "--input", tmp_path / "blank.txt", "--overwrite")
    assert done.records[0]["empty_documents"] == 3
    assert "documents of white space alone, left out: 3" in done.stderr
    (tmp_path / "blank.txt").write_text("one<|endoftext|>\ntwo<|endoftext|>\n")  # as most files end: not worth a word
    done = call("make_data", *arguments, "--input", tmp_path / "blank.txt", "--overwrite")
    assert (done.code, "white space alone" in done.stderr) == (0, False)
