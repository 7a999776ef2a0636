"""The command line: all unknown options are reported at once, each with what to write instead."""

from __future__ import annotations

import re

import pytest

from tests.cli.commands import SCHEMAS, call, shipped


def refusals(name: str, *arguments: object) -> list[str]:
    """Return the lines by which a command refuses its arguments, without its name and the last line."""
    done = call(name, *arguments)
    assert (done.code, done.stdout) == (2, "")
    *lines, last = done.stderr.splitlines()
    prog = last.partition(": see ")[0]
    assert last == f"{prog}: see {prog} --help"
    return [line.removeprefix(f"{prog}: ") for line in lines]


def test_all_unknown_words_are_told_at_once():
    """Options, settings without dashes, files without an option; the value of an unknown option is not one of them."""
    words = ["--no_such=1", "--lr", "3", "max_steps=10", "model.d_model=8", "x.toml", "infer", "foo", "-q", "--dtype=x"]
    assert refusals("train", "--config", shipped("train"), *words) == [
        "--no_such is not a known option",
        "--lr is not a known option (did you mean --optimizer.learning_rate?)",
        "max_steps=10 needs -- before it: --training.max_steps=10",
        "model.d_model=8 needs -- before it: --model.d_model=8",
        "x.toml: a file of settings is given as --config x.toml",
        "infer: a file of settings is given as --config infer",
        "foo is not a known word; a setting is given as --section.key=value, a file as --config FILE.toml",
        "-q is not a known option; a value that begins with - is joined to its option: --key=-q",
        "--dtype is not a known option (did you mean --training.precision?)",
    ]


@pytest.mark.parametrize("value", ["-x", "--x", "-1x"])
def test_a_prompt_that_begins_with_a_dash(value):
    """It is joined to its option; otherwise the error says how."""
    done = call("infer", "--config", shipped("infer"), f"--prompt={value}", "--print-config=origin")
    assert f'prompt = [ "{value}", ]  # command line\n' in done.stdout
    line = refusals("infer", "--config", shipped("infer"), "--prompt", value)[0]
    assert line.startswith("argument --prompt: expected at least one argument")
    assert line.endswith(f"; a value that begins with - is joined to it: --prompt={value}")


def test_a_flag_before_a_free_word_does_not_take_it(tmp_path):
    """Of commands that take words without an option; a word that is a truth value is the flag's."""
    for flag, truth in (["--dry-run"], "true"), (["--dry-run", "false"], "false"), (["--dry-run=false"], "false"):
        done = call("fit", *flag, "book.txt", "--time=1m", "--print-config")
        assert f"dry_run = {truth}\n" in done.stdout, done.stderr
        assert 'text = [ "book.txt", ]' in done.stdout.replace("[\n    ", "[ ").replace(",\n]", ", ]")


def test_a_flag_before_the_first_word_does_not_take_it(tmp_path):
    """As of commands that take many words."""
    done = call("runs_list", "--reverse", tmp_path, "--print-config")
    assert "reverse = true\n" in done.stdout, done.stderr
    assert f'runs_dir = "{tmp_path}"' in done.stdout


def test_an_option_at_the_end_without_its_value():
    """There is no value to speak of."""
    assert refusals("infer", "--checkpoint") == ["argument --checkpoint: expected one argument"]


def test_several_files_and_texts_of_toml_are_laid_on_each_other(tmp_path):
    """`--config` twice and `--toml` count in their order, then the options; `--print-config=origin` says which did."""
    over = tmp_path / "over.toml"
    over.write_text("seed = 5\nnum_samples = 2\n")
    arguments = ["--config", shipped("infer"), "--config", over, "--toml", 'num_samples = 3\nprompt = ["[a]"]']
    lines = call("infer", *arguments, "--batch_size=4", "--print-config=origin").stdout.splitlines()
    assert "seed = 5  # over.toml:1" in lines
    assert "num_samples = 3  # --toml" in lines
    assert 'prompt = [ "[a]", ]  # --toml' in lines
    assert "batch_size = 4  # command line" in lines
    assert any(line.startswith('checkpoint = "runs/first"  # infer.toml:') for line in lines)


def test_help_shows_devices_in_words():
    """No message shows a regular expression."""
    for name in SCHEMAS:
        text = call(name, "--help-all").stdout
        assert not re.search(r"matching|\\d|\^[(\[]|\[A-Z", text), name
    done = call("train", "--config", shipped("train"), "--training.device=gpu")
    expected = "expected auto, cpu, mps, cuda or cuda:N"
    assert done.stderr == f'--training.device: {expected}, found "gpu" (a string)\n'
