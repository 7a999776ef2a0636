"""The house keeps its floors, names and sizes: what CONTRIBUTING says about the code as a whole, held by `ast`."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import keyword
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "benchmarking": 9,
    "cli": 8,
    "transformerlm.serving": 7,
    "databuilder": 6,
    "transformerlm.inference": 6,
    "transformerlm.evaluation": 6,
    "transformerlm.interop": 6,
    "transformerlm.experiments": 6,
    "transformerlm.training": 5,
    "transformerlm.checkpoints": 4,
    "transformerlm.models": 3,
    "transformerlm.tokenizer": 3,
    "transformerlm.token_files": 3,
    "logger": 2,
    "profiling": 2,
    "transformerlm.distributed": 2,
    "transformerlm.utils": 1,
    "config": 0,
}
PACKAGES = sorted({room.split(".")[0] for room in FLOORS})
# The libraries each room may use besides the standard one; what is not named here may use what pyproject names.
CORE = {"torch", "numpy", "regex", "pydantic", "tomli_w", "safetensors"}
ALLOWED = {
    "config": {"pydantic", "pydantic_core", "tomli_w"},
    "logger": {"wandb", "tensorboard"},
    "profiling": {"torch"},
    "transformerlm.distributed": {"torch", "ray"},
    "transformerlm.tokenizer": {"regex", "numpy", "numba", "llvmlite"},
    "transformerlm.models": {"torch", "triton"},
    "transformerlm.token_files": {"numpy"},
    "transformerlm.checkpoints": {"torch", "safetensors"},
    "transformerlm.training": {"torch", "numpy", "triton"},
    "transformerlm.inference": {"torch", "numpy", "numba", "llvmlite"},
    "transformerlm.serving": {"starlette", "uvicorn", "prometheus_client", "h11", "pydantic", "torch"},
    "transformerlm.experiments": {"numpy", "pydantic", "pydantic_core", "matplotlib", "optuna"},
    "transformerlm.interop": {
        "torch",
        "numpy",
        "safetensors",
        "pydantic",
        "transformers",
        "tokenizers",
        "tiktoken",
        "gguf",
    },
    "databuilder": {"numpy"},
    "transformerlm.utils": {"torch", "numpy", "pyarrow", "numba", "llvmlite", "triton"},
    "cli": {"pydantic"},
}
MAX_FILE_LINES = 500
MAX_BODY_LINES = 40


def source_files() -> list[Path]:
    """Return every Python file of the product, relative to the root."""
    return sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


FILES = source_files()


def each_file(check: Callable[[Path], None]) -> Callable[[], None]:
    """Make one test of a check of one file; a test a file would be thousands, and each costs more than its check."""

    def test() -> None:
        failures = []
        for path in FILES:
            try:
                check(path)
            except (AssertionError, pytest.fail.Exception) as failure:
                failures.append(f"{path.as_posix()}: {failure}")
        assert not failures, "\n\n".join(failures)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def imports_from(path: Path) -> list[ast.ImportFrom]:
    """Return a file's `from ... import ...`."""
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom)]


def module_of(path: Path) -> str:
    """Return a file's dotted module name."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def room_of(module: str) -> str | None:
    """Return the room that a module is in; None for one outside the product, or for the package itself."""
    return next((room for room in FLOORS if module == room or module.startswith(room + ".")), None)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every import of a file with its line, those in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else str(node.module)


@each_file
def test_rooms_see_lower_floors_only(path):
    """A room imports only rooms on lower floors; rooms on one floor do not see each other."""
    room = room_of(module_of(path))
    if room is None:
        return
    for line, module in imports_of(path):
        other = room_of(module)
        if other is None and module.split(".")[0] in PACKAGES:
            pytest.fail(f"{path}:{line}: {module} is a package without a floor; import from one of its rooms")
        if other not in (None, room):
            assert FLOORS[other] < FLOORS[room], f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {module}"


@each_file
def test_rooms_use_their_libraries_only(path):
    """`config` needs no torch, numpy or wandb, `models` only torch, `tokenizer` no torch; wandb stays in its files."""
    room = room_of(module_of(path))
    for line, module in imports_of(path):
        library = module.split(".")[0]
        if library in PACKAGES or library in sys.stdlib_module_names:
            continue
        if room in ALLOWED:
            assert library in ALLOWED[room], f"{path}:{line}: {room} imports {library}"
        elif room != "benchmarking":  # which compares us with others
            assert library in CORE, f"{path}:{line}: {library} is no core dependency"
        if library == "wandb":
            assert path.name.startswith("wandb_"), f"{path}:{line}: wandb outside of logger/wandb_*"
        if library == "ray":
            assert path.name == "ray_work.py", f"{path}:{line}: ray outside of distributed/ray_work.py"


@each_file
def test_optional_and_heavy_libraries_are_imported_where_they_are_used(path):
    """Extras are imported in functions; so are, in `cli`, torch, numpy and the rooms that bring them."""
    for node in tree_of(path).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] not in (
                "wandb",
                "tensorboard",
                "matplotlib",
                "transformers",
                "pyarrow",
                "gguf",
                "litgpt",
                "ray",
                "optuna",
            ), f"{path}:{node.lineno}: {name}"
            if room_of(module_of(path)) == "cli":
                assert room_of(name) in ("cli", "config", None), f"{path}:{node.lineno}: {name} at the top"
                assert name.split(".")[0] not in ("torch", "numpy"), f"{path}:{node.lineno}: {name} at the top"


def test_there_is_no_import_cycle():
    """Modules import each other in one direction, functions' imports included."""
    edges = {module_of(path): {name for _, name in imports_of(path) if name in MODULES} for path in FILES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done:
            return
        for other in edges[module] - {module}:
            visit(other, (*above, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_nvtx_variables_are_read_in_one_file():
    """Only profiling/nvtx.py holds the string `TRANSFORMERLM_NVTX`."""
    readers = {
        path.as_posix()
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and node.value in ("TRANSFORMERLM_NVTX", "TRANSFORMERLM_NVTX_LEVEL")
    }
    assert readers == {"profiling/nvtx.py"}


def test_the_diagram_of_the_rooms_is_true():
    """docs/architecture.md has every room on its floor, and each arrow is an import that there is."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    diagram = page.partition("```mermaid\n")[2].partition("```")[0]
    drawn = {}
    for floor, body in re.findall(r"subgraph floor(\d) .*?\n(.*?)    end\n", diagram, flags=re.DOTALL):
        drawn |= dict.fromkeys(body.split(), int(floor))
    assert drawn == {room: floor for room, floor in FLOORS.items() if (ROOT / room.replace(".", "/")).is_dir()}
    imports = {(room_of(module_of(path)), room_of(module)) for path in FILES for _, module in imports_of(path)}
    arrows = re.findall(r"^    (\S+) --> (\S+)$", diagram, flags=re.MULTILINE)
    assert len(arrows) > len(drawn)
    assert [arrow for arrow in arrows if arrow not in imports] == []


def test_planning_is_used_before_a_run():
    """No file of training outside planning/ imports from planning/."""
    for path in FILES:
        if path.parent.as_posix() == "transformerlm/training":
            for line, module in imports_of(path):
                assert "training.planning" not in module, f"{path}:{line}: {module}"


# --- plain in front, fast behind a door --------------------------------------------------------------------------

FAST_FILES = [path for path in FILES if path.parent.name == "fast" and path.name != "__init__.py"]
each_fast_file = pytest.mark.parametrize("path", FAST_FILES, ids=[path.as_posix() for path in FAST_FILES])


@functools.cache
def front_names(module: str) -> dict[Path, set[str]]:
    """Return the files outside `fast/` that import a fast module, each with the names that it uses of it."""
    package, _, last = module.rpartition(".")
    found: dict[Path, set[str]] = {}
    for path in FILES:
        if path.parent.name == "fast":
            continue
        tree, aliases = tree_of(path), set()
        for node in imports_from(path):
            if node.module == module:
                found.setdefault(path, set()).update(alias.name for alias in node.names)
            if node.module == package:
                aliases |= {alias.asname or alias.name for alias in node.names if alias.name == last}
        for node in ast.walk(tree) if aliases else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                found.setdefault(path, set()).add(node.attr)
    return found


@each_fast_file
def test_a_fast_file_has_one_door(path):
    """One file of the room at most imports a fast file, and nothing outside the room does."""
    fronts = front_names(module_of(path))
    assert len(fronts) <= 1, f"{path}: imported by {', '.join(map(str, fronts))}"
    for front in fronts:
        assert room_of(module_of(front)) == room_of(module_of(path)), f"{path}: imported by {front}"


@each_fast_file
def test_a_fast_file_names_its_plain_twin(path):
    """Its head names the twin of all that its front file uses, the test that holds them equal, and what it pays."""
    head = ast.get_docstring(tree_of(path)) or ""
    twins = dict(re.findall(r"^Twin of `(\w+)`: `([\w.]+)`$", head, flags=re.MULTILINE))
    served = re.search(r"^Part of: ([\w, ]+)$", head, flags=re.MULTILINE)
    names = set().union(*front_names(module_of(path)).values())
    for other in served[1].split(", ") if served else ():
        imported = {name for _, name in imports_of(path.with_name(f"{other}.py"))}
        assert module_of(path) in imported, f"{path}: {other}"
    assert not (served and names), f"{path}: a part of other fast files, and used from outside"
    offered = {node.name for node in public_definitions(path)}
    assert set(twins) <= offered, f"{path}: {set(twins) - offered}"
    assert names & offered <= set(twins), f"{path}: no twin for {names & offered - set(twins)}"
    assert twins or served, f"{path}: neither `Twin of ...` nor `Part of: ...`"
    tests, gain = (re.search(rf"^{word}: (.+)$", head, flags=re.MULTILINE) for word in ("Test", "Pays"))
    if twins:
        assert tests is not None, f"{path}: no line `Test: ...`"
        assert all((ROOT / name).is_file() for name in tests[1].split(", ")), f"{path}: {tests[1]}"
        assert gain is not None, f"{path}: no line `Pays: ...`"
        assert re.search(r"\d", gain[1]), f"{path}: a gain without a number"


def test_a_hand_over_is_marked():
    """Each front file marks the line at which it hands over to a fast file."""
    fronts = {front for path in FAST_FILES for front in front_names(module_of(path))}
    marked = {path for path in FILES if re.search(r"# hand-over\b", (ROOT / path).read_text(encoding="utf-8"))}
    assert fronts <= marked, fronts - marked


@each_fast_file
def test_a_plain_twin_has_the_same_signature(path):
    """The twin is there, outside of `fast/`, and takes parameters of the same names; the head says what is added."""
    head = ast.get_docstring(tree_of(path)) or ""
    added = re.search(r"^Beyond the twin: `(\w+)`", head, flags=re.MULTILINE)
    for name, twin in re.findall(r"^Twin of `(\w+)`: `([\w.]+)`$", head, flags=re.MULTILINE):
        module, _, attribute = twin.rpartition(".")
        assert ".fast." not in twin, f"{path}: {twin}"
        plain = getattr(importlib.import_module(module), attribute)
        fast = getattr(importlib.import_module(module_of(path)), name)
        if inspect.isfunction(plain) and inspect.isfunction(fast):
            assert keywords_of(fast) - {added and added[1]} == keywords_of(plain), f"{path}: {name}"


# --- size and form -----------------------------------------------------------------------------------------------


@each_file
def test_files_are_not_too_long(path):
    """No file passes 500 lines."""
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, methods and inner ones too."""
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@each_file
def test_functions_are_not_too_long(path):
    """No function's body passes 40 lines, its docstring not counted."""
    for function in functions_of(path):
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        lines = (function.end_lineno or 0) - body[0].lineno + 1 if body else 0
        assert lines <= MAX_BODY_LINES, f"{path}:{function.lineno}: {function.name} has {lines} lines"


def public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield what a module offers: functions and classes, and the methods of public classes, without an underscore."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree_of(path).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (inner for inner in node.body if isinstance(inner, kinds) and inner.name[0] != "_")


@each_file
def test_public_names_have_docstrings(path):
    """Every module, and every public class, function and method says what it is, beginning with one sentence."""
    if path.name != "__init__.py" or (ROOT / path).read_text().strip():
        assert ast.get_docstring(tree_of(path)), f"{path}: no module docstring"
    documented = {node.name for node in public_definitions(path) if ast.get_docstring(node)} | {"forward", "backward"}
    for node in public_definitions(path):
        docstring = ast.get_docstring(node)  # an override need not repeat that of its base
        assert docstring or node.name in documented, f"{path}:{node.lineno}: {node.name} has no docstring"
        if docstring:
            assert docstring.split("\n\n")[0].rstrip().endswith((".", ":", "?")), f"{path}:{node.lineno}: {node.name}"


@each_file
def test_public_functions_are_annotated(path):
    """Every parameter and result of a function with a public name has a type."""
    for node in public_definitions(path):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
        assert not bare, f"{path}:{node.lineno}: {node.name}: no type for {', '.join(bare)}"
        assert node.returns is not None, f"{path}:{node.lineno}: {node.name}: no return type"


@each_file
def test_library_code_does_not_print_or_quit(path):
    """Only commands and benchmarks write to the terminal or end the process."""
    if room_of(module_of(path)) in ("cli", "benchmarking"):
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "quit"), f"{path}:{node.lineno}: {node.func.id}()"


@each_file
def test_nothing_happens_at_import_time(path):
    """A module's top level defines and imports; its calls build constants and run nothing."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    allowed = (ast.Import, ast.ImportFrom, *functions, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in tree_of(path).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, allowed) or is_docstring, f"{path}:{node.lineno}: {ast.unparse(node)[:60]}"


# --- names -------------------------------------------------------------------------------------------------------


def keywords_of(function) -> set[str]:
    """Return the names of a function's parameters."""
    return set(inspect.signature(function).parameters) - {"self"}


def test_model_keys_are_the_model_keywords():
    """[model] of the TOML and `ModelSettings` have the same names, in the same order, with the same defaults."""
    from config.schemas import ModelConfig
    from transformerlm.models.settings import ModelSettings

    parameters = inspect.signature(ModelSettings).parameters
    assert list(ModelConfig.model_fields) == list(parameters) == [field.name for field in fields(ModelSettings)]
    for name, field in ModelConfig.model_fields.items():
        default = parameters[name].default
        assert (default is inspect.Parameter.empty) == field.is_required(), name
        assert field.is_required() or default == field.default, name


def test_schedule_keys_are_the_schedule_keywords():
    """[schedule] and `learning_rate` have the same names, except for the two numbers in other sections."""
    from config.schemas import ScheduleConfig
    from transformerlm.training.schedule import learning_rate

    others = {"step", "learning_rate", "max_steps"}
    assert set(ScheduleConfig.model_fields) == keywords_of(learning_rate) - others


def test_sampling_keys_are_the_predictor_keywords():
    """[sampling] holds names that `Predictor.stream`, `generate.stream` and `SamplingParams` know."""
    from config.schemas import InferSamplingConfig, SamplingConfig
    from transformerlm.inference.generate import stream
    from transformerlm.inference.predictor import Predictor
    from transformerlm.inference.sampling_params import SamplingParams

    keys, all_keys = set(SamplingConfig.model_fields), set(InferSamplingConfig.model_fields)
    assert all_keys == keywords_of(Predictor.stream) - {"prompt", "seed", "allow_special", "speculative"}
    assert keys - {"stop_at_eos"} <= keywords_of(stream)
    assert keys - {"stop_at_eos", "max_new_tokens"} == keywords_of(SamplingParams)


def test_data_keys_are_the_builder_keywords():
    """make-data's keys that reach `build_dataset` are called the same there, or the same with `_path`."""
    from config.make_data import MakeDataConfig
    from databuilder.dataset_builder import build_dataset

    keys = {"inputs", "train_path", "valid_path", "num_workers"}
    same = keywords_of(build_dataset) - keys - {"progress", "tokenizer"}
    assert same <= set(MakeDataConfig.model_fields)


def test_weights_have_the_documented_names():
    """The names in a checkpoint are these, for every choice of layers."""
    import re

    from transformerlm.models.transformer import TransformerLM

    pattern = re.compile(
        r"(token_embeddings|lm_head|ln_final|layers\.\d+\.(ln[12]|ffn\.w[123]"
        r"|attn\.(q|k|v|output)_proj|attn\.[qk]_norm))\.weight"
    )
    for choices in ({}, {"qk_norm": True, "num_kv_heads": 1}, {"ffn": "silu"}, {"norm_position": "post"}):
        model = TransformerLM(
            vocab_size=8, context_length=4, d_model=8, num_layers=2, num_heads=2, device="meta", **choices
        )
        for name in model.state_dict():
            assert pattern.fullmatch(name), name


def test_every_command_is_four_things():
    """A console script of pyproject has a module in cli, a schema in config and a shipped TOML of its name.

    One with several words has these for each word.
    """
    from config.commands import COMMANDS

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts
    assert scripts.pop("transformerlm") == "cli.entry:transformerlm"
    for script, target in scripts.items():
        verb = script.removeprefix("transformerlm-").replace("-", "_")
        verb += "_" * keyword.iskeyword(verb)  # no module can be called `import`
        assert target == f"cli.entry:{verb}", script
        assert f'\n{verb} = partial(run, "cli.{verb}")\n' in (ROOT / "cli/entry.py").read_text(), script
        words = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{script} ")]
        paths = [f"cli/{verb}.py", f"config/{verb}.py"]
        for one in [f"{verb}_{word}" for word in words] or [verb]:
            paths += [f"cli/{one}.py", f"config/{one}.py", f"config/resources/{one}.toml"]
        for path in paths:
            assert (ROOT / path).is_file(), f"{script}: {path} is missing"


def test_every_test_file_mirrors_a_source_file():
    """tests/<room>/test_<file>.py stands for a file of that room, so that one finds the tests of a file at once."""
    for path in sorted((ROOT / "tests").glob("*/**/test_*.py")):
        whole = ("browser", "clients", "golden", "gpu", "hostile", "released", "torture")
        if path.parent.name in whole or path.name == "test_mutations.py":
            continue  # promises of the whole, not of one file
        room, name = path.parent.relative_to(ROOT / "tests"), path.name.removeprefix("test_")
        homes = [ROOT / room, ROOT / "transformerlm" / room]
        names = {name, f"{name.removesuffix('.py')}/__init__.py"}
        is_function = any(
            f"def {name.removesuffix('.py')}(" in (home / "__init__.py").read_text()
            for home in homes
            if (home / "__init__.py").is_file()
        )
        assert is_function or any((home / one).is_file() for home in homes for one in names), path


def test_every_test_says_what_it_shows():
    """Each test function has a docstring that states a behaviour."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"


def test_every_file_has_its_line_in_the_architecture():
    """docs/architecture.md says what each file of the product is, in the table of its room, and names no other file."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("\n## The files\n")[2]
    described = []
    for section in page.split("\n### ")[1:]:
        room = section.partition("\n")[0]
        described += [Path(room) / name for name in re.findall(r"^\| `(\S+\.py)` \| \S.*\|$", section, flags=re.M)]
    assert [path.as_posix() for path in FILES if path.name != "__init__.py" and path not in described] == []
    assert [path.as_posix() for path in described if path not in FILES] == []
    assert len(set(described)) == len(described)
