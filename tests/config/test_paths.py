"""Paths in a file or after `--key=`, where no shell has seen them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from config.commented_toml import commented_toml
from config.fit import FitConfig
from config.infer import InferConfig
from config.io import dump_settings, dump_toml, load_config
from config.make_data import MakeDataConfig
from config.paths import checked_path


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("HOME", os.sep + "home")
    monkeypatch.setenv("WHERE", "there")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.skipif(os.sep != "/", reason="HOME is of POSIX")
@pytest.mark.parametrize(
    ("text", "path"),
    {
        "~/runs": "/home/runs",
        "$HOME/runs": "/home/runs",
        "${HOME}": "/home",
        "a/$WHERE/b": "a/there/b",
        "a~b/~": "a~b/~",
        "./~": "./~",
        "cost$HOME": "cost$HOME",
        "a/$": "a/$",
        "./none": "./none",
        "$$HOME/$$": "$HOME/$",
        "a/$${HOME}": "a/${HOME}",
    }.items(),
)
def test_a_path_is_read_as_a_shell_reads_it(text, path):
    """`~` at the start, and a variable at the start of a part, are replaced; nothing else is."""
    assert checked_path(text) == path


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "None": 'found the word "None"; leave the key out',
        "null": 'found the word "null"',
        "$NOWHERE/x": r"found the variable \$NOWHERE, which is not set",
        "a/${NOWHERE}": r"found the variable \$\{NOWHERE\}",
        "C:\temp": r"the character '\\t'; in TOML a Windows path",
        "a\nb": r"the character '\\n'",
        "": "found an empty string",
        "a\0": "NUL",
        "x" * 4097: "at most 4,096 characters",
    }.items(),
    ids=repr,
)
def test_what_is_no_path_is_refused(text, message):
    """The refusal says what was found and what to write."""
    with pytest.raises(ValueError, match=message):
        checked_path(text)


def test_an_empty_variable_is_no_path(monkeypatch):
    """It would be the directory in which the command runs."""
    monkeypatch.setenv("NOTHING", "")
    with pytest.raises(ValueError, match=r"expected a path, found \$NOTHING, which is empty here"):
        checked_path("$NOTHING")
    assert checked_path("a/$NOTHING") == "a/"


def test_a_home_that_nobody_has_is_said(monkeypatch):
    """Python would make a directory called ~ of it."""
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(ValueError, match=r"found ~/runs, and who runs this has no home directory \(set HOME\)"):
        checked_path("~/runs")
    assert checked_path("a~/b") == "a~/b"


@pytest.mark.parametrize("name", ["none", "NULL", "a/none", "~", "~/a", "$$HOME/$${x}/$$"])
def test_a_path_is_written_as_it_can_be_read(name):
    """A file called none is `./none` in TOML, where the word alone means no path; names may begin with ~ and $."""
    config = load_config(FitConfig, None, {"text": [f"./{name}"], "dir": f"./{name}"})
    name = name.replace("$$", "$")
    again = FitConfig.model_validate(tomllib.loads(dump_toml(config)))
    assert (again.dir, again) == (Path(name), config)


def test_settings_hold_paths_as_they_can_be_read():
    """Those that one command writes for another name the same files, alone and in lists, with comments or not."""
    paths = [Path("$week.txt"), Path("~"), Path("a/$HOME")]
    tree = tomllib.loads(dump_settings({"text": paths, "dir": paths[0]}))
    assert [Path(checked_path(text)) for text in (*tree["text"], tree["dir"])] == [*paths, paths[0]]
    assert tomllib.loads(commented_toml({"text": paths, "dir": paths[0]}, {})) == tree


def test_all_names_of_files_are_read_so():
    """This holds for a path, and for each of a list of files, in any command."""
    assert str(InferConfig(checkpoint="$WHERE/a").checkpoint) == os.path.join("there", "a")
    files = {"tokenizer": "t", "train": "a.npy"}
    assert MakeDataConfig(input=["$WHERE/*.txt"], **files).input == ["there/*.txt"]
    with pytest.raises(ValidationError, match="NOWHERE"):
        MakeDataConfig(input=["a", "$NOWHERE/*.txt"], **files)


@pytest.mark.parametrize("text", ["caf\udce9.txt", "caf\udcc3\udca9.txt"])
def test_a_path_of_other_bytes_is_refused(text: str) -> None:
    """Python keeps invalid UTF-8 as lone surrogates, which neither TOML nor a JSON line can hold."""
    with pytest.raises(ValueError, match=r"expected text in UTF-8.*can be renamed.*PYTHONUTF8=1"):
        checked_path(text)
