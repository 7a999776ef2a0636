"""`transformerlm-runs` hands over to the command of its first word, and says what words there are."""

from __future__ import annotations

import pytest

from cli.runs import schemas_of_words
from tests.cli.commands import call

WORDS = list(schemas_of_words())


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_a_command(word):
    """What follows the word is the command's own: its help, its version, its schema."""
    done = call("runs", word, "--help")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: transformerlm-runs {word} ")
    assert call("runs", word, "--print-schema").stdout == call(f"runs_{word}", "--print-schema").stdout


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_the_words(word):
    """Each has a line, and a command line of a terminal's width."""
    done = call("runs", word)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: transformerlm-runs {'|'.join(WORDS)} ")
    for known in WORDS:
        assert f"\n  {known:<9}" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) < 80


def test_the_version_is_that_of_all_commands():
    """`transformerlm-runs --version` needs no word."""
    assert call("runs", "--version").stdout == call("train", "--version").stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"expected one of {', '.join(WORDS)} first, found nothing"),
        (["--sort=age"], f"expected one of {', '.join(WORDS)} first, found --sort"),
        (["lst"], "lst is not one of its words (did you mean list?)"),
        (["zzz"], f"zzz is not one of its words; there are {', '.join(WORDS)}"),
    ],
)
def test_what_is_no_word(words, line):
    """A typo is answered with the word that was meant, nothing with all of them."""
    done = call("runs", *words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == f"transformerlm-runs: {line}\ntransformerlm-runs: see transformerlm-runs --help\n"


def test_a_shell_completes_words_and_options():
    """One script completes the words and the options of each, whichever word prints it."""
    script = call("runs", "--print-completion", "bash").stdout
    assert "complete -o default -F _transformerlm_runs transformerlm-runs" in script
    assert call("runs", "list", "--print-completion=bash").stdout == script
    done = call("runs", "--print-completion", "tcsh")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("--print-completion: expected one of bash, zsh, fish, found 'tcsh'")
