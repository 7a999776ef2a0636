"""The package as others see it: its names, its type hints, its requirements, and what it says where it cannot start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import transformerlm

ROOT = Path(__file__).parents[1]


def python(code: str, *options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program as a user's Python does in a directory, with our checkout installed."""
    environment = os.environ | {"PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_names_are_the_objects_of_the_rooms():
    """Each name of `transformerlm` is that of its room; BPETokenizer is another word for Tokenizer."""
    from transformerlm.inference.generate import generate
    from transformerlm.inference.predictor import Predictor
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.tokenizer.bpe_trainer import train_bpe
    from transformerlm.tokenizer.tokenizer import Tokenizer

    found = {name: getattr(transformerlm, name) for name in transformerlm.__all__ if name != "__version__"}
    assert found == {
        "BPETokenizer": Tokenizer,
        "Predictor": Predictor,
        "Tokenizer": Tokenizer,
        "TransformerLM": TransformerLM,
        "generate": generate,
        "train_bpe": train_bpe,
    }
    rooms = {path.name for path in Path(transformerlm.__file__).parent.iterdir() if path.is_dir()}
    public = {name for name in dir(transformerlm) if not name.startswith("__")}
    assert set(transformerlm.__all__) - {"__version__"} <= public <= {*transformerlm.__all__, *rooms}
    with pytest.raises(AttributeError, match="no attribute 'tokeniser'"):
        transformerlm.tokeniser  # noqa: B018


def test_the_version_needs_no_library():
    """`__version__` is that of pyproject, and is there before torch and numpy are."""
    done = python(
        "import sys; from transformerlm import __version__ as v; print(v, {'torch', 'numpy'} & set(sys.modules))"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout == f"{project['version']} set()\n"


def test_the_types_are_shipped():
    """`py.typed` says to a user's mypy that our annotations count, and the names have their types."""
    assert (ROOT / "transformerlm/py.typed").is_file()


@pytest.mark.slow
def test_a_users_mypy_sees_the_types(tmp_path):
    """A name of `transformerlm` has its type, and a wrong call is found."""
    (tmp_path / "mine.py").write_text(
        "from transformerlm import BPETokenizer, __version__\n"
        "reveal_type(BPETokenizer.from_directory('t').encode('x'))\nlen(__version__)\n"
        "BPETokenizer.from_directory('t').encode(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "mine.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert 'Revealed type is "builtins.list[builtins.int]"' in done.stdout.replace(
        "list[int]", "builtins.list[builtins.int]"
    )
    assert 'mine.py:4: error: Argument 1 to "encode"' in done.stdout
    assert "Found 1 error" in done.stdout


def test_requirements_are_those_of_the_project():
    """requirements.txt has the names and bounds of pyproject's dependencies."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]


@pytest.mark.parametrize("file", ["config.py", "logger.py", "config/__init__.py", "profiling.py"])
def test_a_users_file_in_place_of_ours_is_named(file, tmp_path):
    """Importing the package is one sentence with the file and the way out; a command does not look at the file."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("x = 1\n")
    name = re.split(r"[/.]", file)[0]
    sentence = f"transformerlm has a package called {name}, and {path.resolve()} is found in its place: rename that"
    for code in ("import transformerlm.models", f"import {name}; import transformerlm"):
        last = python(code, cwd=tmp_path).stderr.splitlines()[-1]
        assert last.startswith(f"ImportError: {sentence}"), last
    done = python("from cli.entry import infer; infer()", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("transformerlm-infer: expected --config FILE.toml")


@pytest.mark.parametrize("file", ["config.py", "cli.py", "transformerlm.py"])
def test_python_m_does_not_look_at_a_users_file(file, tmp_path):
    """`python -m transformerlm` beside a `config.py` or `cli.py` is the command; its own name is Python's."""
    (tmp_path / file).write_text("x = 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "transformerlm", "infer", "--version"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    expected = "" if file == "transformerlm.py" else f"transformerlm {transformerlm.__version__}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_a_directory_that_is_no_package_hides_nothing(tmp_path):
    """A folder `config/` with other files in it is not found in place of ours."""
    (tmp_path / "config").mkdir()
    done = python("import transformerlm, config.io; print(config.__file__)", cwd=tmp_path)
    assert done.stdout == f"{ROOT / 'config/__init__.py'}\n", done.stderr


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 15)])
def test_another_python_is_told_in_one_line(version):
    """A command says which versions it needs and which it was started with, before anything can fail."""
    code = f"import sys; sys.version_info = {(*version, 1, 'final', 0)}; from cli.entry import train; train()"
    done = python(code)
    found = ".".join(map(str, version))
    line = f"transformerlm needs Python 3.11 to 3.14, found {found} ({sys.executable})\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
