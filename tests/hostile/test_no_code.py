"""Nothing in the tree can run code that a file brings along, held by `ast`; and no configuration can name code."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from config.reference import COMMANDS
from transformerlm.tokenizer.pretokenize import PATTERNS

ROOT = Path(__file__).parents[2]
ROOMS = ["benchmarking", "cli", "config", "databuilder", "logger", "profiling", "tests", "transformerlm"]
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# Modules that make objects out of bytes by running code, and those that run commands of a shell.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "yaml", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint"}
METHODS = {
    ("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "unsafe_load"), ("pd", "read_pickle"),
    ("types", "FunctionType"), ("runpy", "run_path"), ("runpy", "run_module"), ("zipfile", "extractall"),
}  # fmt: skip
# Tests make pickles to show that they are refused, send objects to worker processes, and run the README's examples.
ALLOWED_IN_TESTS = {
    "tests/hostile/corpus_checkpoints.py": {"import pickle"},
    "tests/hostile/corpus_files.py": {"import pickle"},
    "tests/hostile/corpus_imports.py": {"import pickle"},
    "tests/profiling/test_memory.py": {"import pickle"},  # the form of torch's memory snapshots
    "tests/test_examples.py": {"compile()", "exec()"},  # the notebook's cells
    "tests/test_docs.py": {"runpy.run_path()"},
    "tests/test_readme.py": {"compile()", "exec()"},
    "tests/tokenizer/test_pretokenize.py": {"import pickle"},
    "tests/tokenizer/test_tokenizer.py": {"import pickle"},
    "tests/torture/zygote.py": {"runpy.run_module()"},  # our own commands, without a new start of Python
    "tests/token_files/test_dataset.py": {"allow_pickle"},
    "tests/test_tour.py": {"runpy.run_path()"},
    "tests/checkpoints/test_optimizer_state.py": {"import pickle"},
}


def offences(source: str) -> Iterator[str]:
    """Yield what a source holds that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        function = node.func
        if isinstance(function, ast.Name) and function.id in CALLS:
            yield f"line {node.lineno}: {function.id}()"
        if isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if (owner, function.attr) in METHODS:
                yield f"line {node.lineno}: {owner}.{function.attr}()"
            if (owner, function.attr) == ("torch", "load") and not is_true(keywords.get("weights_only")):
                yield f"line {node.lineno}: torch.load() without weights_only=True"
        yield from (
            f"line {node.lineno}: {name}"
            for name in ("shell", "allow_pickle", "trust_remote_code")
            if name in keywords and not is_false(keywords[name])
        )


def is_true(node: ast.expr | None) -> bool:
    """Return whether an expression is the word True."""
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr | None) -> bool:
    """Return whether an expression is the word False."""
    return isinstance(node, ast.Constant) and node.value is False


def test_no_file_of_the_tree_runs_code_from_files():
    """No pickle, eval, exec, yaml, shell or unpickling torch.load in the product, nor, but for a few, in its tests."""
    failures = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        found = list(offences(path.read_text(encoding="utf-8")))
        if {line.partition(": ")[2] for line in found} != ALLOWED_IN_TESTS.get(name, set()):
            failures.append(f"{name}: {'; '.join(found) or 'nothing that the table allows'}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "import yaml",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "os.system(line)",
        "__import__(name)",
        "model = load(trust_remote_code=flag)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    """Each of the ways to run code from a file is found."""
    assert list(offences(source))


@pytest.mark.parametrize("source", ["torch.load(path, weights_only=True)", "np.load(path)"])
def test_the_search_lets_the_safe_ways_pass(source):
    """A reader that unpickles nothing is no offence."""
    assert not list(offences(source))


def leaves(annotation: object) -> Iterator[object]:
    """Yield the plain types that a field may hold."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        yield from map(type, typing.get_args(annotation))
    elif origin in (typing.Union, types.UnionType, list, typing.Annotated):
        for inner in typing.get_args(annotation)[: 1 if origin is typing.Annotated else None]:
            yield from leaves(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for field in annotation.model_fields.values():
            yield from leaves(field.annotation)
    else:
        yield annotation


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_holds_plain_values_only(command):
    """Every key of every command takes a number, a word, a path or a list of them: none can hold or name code."""
    assert set(leaves(COMMANDS[command])) <= {int, float, bool, str, Path, type(None)}


def test_patterns_are_chosen_by_name():
    """A tokenizer's split pattern is one of the built-in ones; their names are the only strings a file may give."""
    assert set(PATTERNS) == {"gpt2", "cl100k", "llama3", "qwen2", "smollm"}
