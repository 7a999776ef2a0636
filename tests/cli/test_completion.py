"""The scripts of completions, asked as a shell asks them when Tab is pressed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from cli.completion import SHELLS, Completed, completion_script
from cli.options import Guide, build_parser
from config.commands import COMMANDS
from config.keys import iter_keys
from tests.cli.commands import ROOT, SCHEMAS, call, script_of

PREFIX = "transformerlm-"
COMPLETED = [Completed(name, iter_keys(schema)) for name, schema in COMMANDS.items() if name.startswith(PREFIX)]
# How bash splits a line: the `=` of `--key=value` is a word of its own.
ASK = """
{script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
function=$(complete -p {command} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
CASES = [
    (["transformerlm-train", "--training.dev"], ["--training.device"]),
    (["transformerlm-train", "--training.device", ""], ["auto", "cpu", "mps", "cuda"]),
    (["transformerlm-train", "--training.device", "=", "c"], ["cpu", "cuda"]),
    (["transformerlm-train", "--training.device", "="], ["auto", "cpu", "mps", "cuda"]),
    (["transformerlm-train", "--training.compile", "=", "t"], ["true"]),
    (["transformerlm-train", "--training.compile", "--optimizer.n"], ["--optimizer.name"]),
    (["transformerlm-train", "--data.train", "x"], []),  # files, by bash itself
    (["transformerlm-infer", "--seed", "3", "--output.f"], ["--output.format"]),
    (["transformerlm-import", "--format", ""], ["hf", "tokenizer_json", "gpt2", "tiktoken"]),
    (["transformerlm", "tr"], ["train-tokenizer", "train"]),
    (["transformerlm", "plan", "--cal"], ["--calibration_steps"]),
    (["transformerlm", "make-data", "--outputs", "=", "p"], ["per-input"]),
    (["transformerlm", "--v"], ["--version"]),
    (["transformerlm-runs", "l"], ["list"]),
    (["transformerlm-runs", "list", "--so"], ["--sort"]),
    (["transformerlm", "runs", "li"], ["list"]),
    (["transformerlm", "runs", "list", "--output.format", "=", "j"], ["json"]),
]


@pytest.fixture(scope="module")
def script() -> str:
    """Return what `transformerlm --print-completion bash` prints."""
    return call("overview", "--print-completion", "bash").stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("words", "expected"), CASES, ids=lambda value: " ".join(value))
def test_bash_completes_options_and_what_they_take(words, expected, script):
    """Bash completes keys, words of a key with and without `=`, and the commands of `transformerlm`."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = ASK.format(script=script, words=quoted, command=words[0])
    done = subprocess.run(["bash", "-uc", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("transformerlm-train --training.dev", ["--training.device"]),
        ("transformerlm-train --training.device=c", ["--training.device=cpu", "--training.device=cuda"]),
        ("transformerlm make-data --outputs ", ["one", "per-input"]),
        ("transformerlm tr", ["train", "train-tokenizer"]),
        ("transformerlm-runs l", ["list"]),
        ("transformerlm runs list --rev", ["--reverse"]),
    ],
)
def test_fish_completes_them_too(line, expected, tmp_path):
    """Fish completes the same, and shows the meaning beside each."""
    program = tmp_path / "ask.fish"  # as an argument it would be too long
    program.write_text(f"{call('overview', '--print-completion', 'fish').stdout}\ncomplete -C '{line}'")
    done = subprocess.run(["fish", "--no-config", program], capture_output=True, text=True, check=True)
    assert sorted(one.partition("\t")[0] for one in done.stdout.splitlines()) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_its_script():
    """The script is valid zsh, whatever the descriptions hold."""
    done = subprocess.run(
        ["zsh", "-n"], input=completion_script("zsh", COMPLETED), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_command_prints_its_own(name, shell):
    """`--print-completion` holds each option that the parser knows, needs no TOML, and is only for that command."""
    done = call(name, "--print-completion", shell)
    assert (done.code, done.stderr) == (0, "")
    keys = list(iter_keys(SCHEMAS[name]))
    parser = build_parser(keys, Guide(name, ""))
    for option in {one for action in parser._actions for one in action.option_strings} - {"-h"}:
        assert (f"-l {option[2:]} " if shell == "fish" else option) in done.stdout
    others = [one.program for one in COMPLETED if one.program != script_of(name)[0]]
    assert [other for other in others if f" {other}\n" in done.stdout] == []


def test_what_is_no_program_has_none():
    """The script of a `python -m` command would complete `python`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarking.bench_train", "--print-completion=bash"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    line = "python -m benchmarking.bench_train: only the programs transformerlm-... have completions\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
