"""The shipped TOML files by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.errors import ConfigError
from config.io import SHIPPED, read_toml
from config.shipped import find_config, shipped_files


def test_every_shipped_file_has_its_name():
    """The name is the file's below the resources, with the dashes of the commands and without the suffix."""
    files = shipped_files()
    assert set(files.values()) == set(SHIPPED.rglob("*.toml"))
    assert files["train"] == SHIPPED / "train.toml"
    assert files["train-tokenizer"] == SHIPPED / "train_tokenizer.toml"
    assert files["import"] == SHIPPED / "import_.toml"


def test_a_file_in_a_folder_of_the_resources_has_its_name(tmp_path, monkeypatch):
    """Recipes are found by folder and name."""
    (tmp_path / "recipes/small").mkdir(parents=True)
    (tmp_path / "recipes/small/train_15m.toml").touch()
    monkeypatch.setattr("config.shipped.SHIPPED", tmp_path)
    assert find_config(Path("recipes/small/train-15m")) == tmp_path / "recipes/small/train_15m.toml"


@pytest.mark.parametrize("name", ["make_data", "make-data"])
def test_both_spellings_are_found(name, tmp_path, monkeypatch):
    """The name may be that of the file or of the command; a folder of that name is not the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert find_config(Path(name)) == SHIPPED / "make_data.toml"


@pytest.mark.parametrize("name", ["train", "infer.toml", "nowhere.toml", "folder"])
def test_what_is_there_or_has_a_suffix_is_itself(name, tmp_path, monkeypatch):
    """A real file of that name wins, and a name with a suffix is never looked up."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").touch()
    (tmp_path / "infer.toml").touch()
    (tmp_path / "folder").mkdir()
    assert find_config(Path(name)) == Path(name)


def test_the_path_of_a_clone_is_answered_with_the_name():
    """Documents say `config/resources/train.toml`, which exists only in a clone."""
    for path, name in {"resources/train.toml": "train", "make-data.toml": "make-data", "import.toml": "import"}.items():
        with pytest.raises(ConfigError) as caught:
            find_config(Path(path))
        assert caught.value.lines == [f"{path}: no such file; --config {name} is the shipped one"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 5000 + ".toml", "/" + "x" * 5000])
def test_what_can_be_no_name_is_refused_as_any_other(name):
    """A name that is too long, or holds a NUL, is a configuration error, not a system error."""
    with pytest.raises(ConfigError, match=r"no such file|cannot be read"):
        read_toml(find_config(Path(name)))


def test_an_unknown_name_is_answered_with_those_that_there_are():
    """The error names the most likely file, then all."""
    with pytest.raises(ConfigError) as caught:
        find_config(Path("infr"))
    line = "--config infr: no such file, and no shipped one of that name (did you mean infer?); shipped: "
    assert caught.value.lines == [line + ", ".join(shipped_files())]
