"""Every command answers in the same way: options from its schema, one way to fail, no heavy import before the work."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cli.completion import COMMON
from cli.utils import Command, main
from config.errors import ConfigError
from config.io import dump_json_schema, dump_toml, load_config
from config.keys import iter_keys
from config.quickstart import QuickstartConfig
from tests.cli.commands import ROOT, SCHEMAS, call, module_of, script_of, shipped

each_command = pytest.mark.parametrize("name", SCHEMAS)

PROBE = """
import importlib, io, json, sys
from contextlib import redirect_stdout, redirect_stderr
heavy = ("torch", "numpy", "wandb", "matplotlib", "safetensors", "regex")
found = {}
for name in sys.argv[1:]:
    module = importlib.import_module(f"cli.{name}")
    toml = f"config/resources/{name}.toml"
    for arguments in (["--help"], ["--version"], ["--config", toml, "--print-config"], ["--print-schema"],
                      ["--config", toml, "--no-such-key=1"], ["--config", "nowhere.toml"], ["--config", toml, "--x"]):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                module.main(arguments)
            except SystemExit as done:
                found[f"{name} {' '.join(arguments)}"] = [done.code, [one for one in heavy if one in sys.modules]]
print(json.dumps(found))
"""


def test_answers_without_work_import_nothing_heavy():
    """`--help`, `--version`, `--print-config`, `--print-schema` and every error answer without torch or numpy."""
    done = subprocess.run([sys.executable, "-c", PROBE, *SCHEMAS], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == 7 * len(SCHEMAS)
    for call_, (code, modules) in found.items():
        assert modules == [], call_
        assert code == (2 if "nowhere" in call_ or "--no-such" in call_ or call_.endswith("--x") else 0), call_


@each_command
def test_help_lists_every_key(name):
    """`--help-all` names each key with its description and its default, and the options that all commands have."""
    done = call(name, "--help-all")
    text = " ".join(done.stdout.split())
    assert (done.code, done.stderr) == (0, "")
    for key in iter_keys(SCHEMAS[name]):
        assert (f" {key.name.split('.')[1]}: " if key.in_list else f"--{key.name} ") in text, key.name
        default = "required" if key.default is None else f"default: {' '.join(key.default.split())}"
        squeezed = text.replace(" ", "")
        assert key.description.replace(" ", "") in squeezed, key.name
        assert default.replace(" ", "") in squeezed, key.name
    for option in COMMON:
        assert f"--{option}" in text


@each_command
def test_help_is_short(name, monkeypatch):
    """`--help` fits about one screen: at most ten keys, examples, and where the rest is."""
    monkeypatch.setenv("COLUMNS", "100")
    done = call(name, "--help")
    assert (done.code, done.stderr) == (0, "")
    short = getattr(module_of(name), "SHORT", None)
    if short is None:
        assert name == "quickstart"  # all its keys are needed
        return
    keys = [key.name for key in iter_keys(SCHEMAS[name])]
    assert set(short) <= set(keys)
    assert len(set(short)) == len(short) <= 10
    shown = re.findall(r"^  --([\w.]+) (?:VALUE|\[true)", done.stdout, flags=re.MULTILINE)
    assert tuple(shown) == short
    assert len(done.stdout.splitlines()) < 65
    assert (f"--help-all lists all {len(keys)} settings" in done.stdout) == (len(short) < len(keys))
    assert str(shipped(name)) in done.stdout


@each_command
def test_the_examples_of_help_run_when_pasted(name, tmp_path, monkeypatch):
    """The command accepts each example, given the files that the commands before it have made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.toml").write_bytes(shipped("train").read_bytes())
    script = " ".join(script_of(name))
    lines = re.findall(r"^  # .+\n  (.+)$", call(name, "--help").stdout, flags=re.MULTILINE)
    assert len(lines) >= 2 or name == "quickstart"
    for line in lines:
        program, _, arguments = f"{line} ".partition(f"{script} ")
        assert program == "" or program.endswith("/") or program == "uv run "
        done = call(name, *shlex.split(arguments), "--print-config")
        assert done.code == 0, (line, done.stderr)


def test_help_shows_config_in_brackets_where_it_can_be_left_out():
    """A command with a default file, or one whose first word is enough, needs no `--config`."""
    for name, usage in {
        "quickstart": "transformerlm-quickstart [--config FILE.toml] [--key=value ...]",
        "init": "transformerlm-init DIR [--config FILE.toml] [--key=value ...]",
        "train": "transformerlm-train --config FILE.toml [--key=value ...]",
    }.items():
        for option in ("--help", "--help-all"):
            assert call(name, option).stdout.startswith(f"usage: {usage}\n")


@each_command
def test_print_config_round_trips(name, tmp_path):
    """`--print-config` prints the shipped TOML's configuration as TOML that gives the same object, and runs nothing."""
    done = call(name, "--config", shipped(name), "--print-config")
    assert (done.code, done.stderr) == (0, "")
    again = tmp_path / "again.toml"
    again.write_text(done.stdout)
    assert load_config(SCHEMAS[name], again) == load_config(SCHEMAS[name], shipped(name))
    assert call(name, "--config", again, "--print-config").stdout == done.stdout


@each_command
def test_print_schema_and_version(name):
    """`--print-schema` is the schema that editors use; `--version` names the package; neither needs a TOML."""
    done = call(name, "--print-schema")
    assert done.stdout.rstrip("\n") == dump_json_schema(SCHEMAS[name])
    assert re.fullmatch(r"transformerlm \d+\.\d+\.\d+\n", call(name, "--version").stdout)


@each_command
def test_every_key_can_be_set_on_the_command_line(name):
    """`--key=value` and `--key value` set every key, except those of a list's tables, to the value in the file."""
    config = load_config(SCHEMAS[name], shipped(name))
    printed = call(name, "--config", shipped(name), "--print-config").stdout
    for key in [key for key in iter_keys(SCHEMAS[name]) if not key.in_list]:
        value = config.model_dump(mode="json")
        for part in key.name.split("."):
            value = None if value is None else value[part]  # a table that may be missing
        if value is None or value == []:
            continue
        words = [
            word if isinstance(word, str) else json.dumps(word) for word in ([value] if not key.is_list else value)
        ]
        separate = call(name, "--config", shipped(name), f"--{key.name}", *words, "--print-config")
        joined = call(name, "--config", shipped(name), f"--{key.name}={words[0]}", "--print-config")
        assert separate.stdout == printed, (key.name, separate.stderr)
        assert len(words) > 1 or joined.stdout == printed, (key.name, joined.stderr)


@each_command
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.toml"], r"nowhere\.toml: no such file"),
        (["--config"], r"expected one argument"),
        (["stray"], r"stray is not a known word; a setting is given as --section\.key=value"),
        (["--no-such-key", "3"], r"--no-such-key is not a known option"),
        (["--confg=x"], r"--confg is not a known option \(did you mean --config\?\)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_errors_are_lines_on_stderr_and_exit_2(name, arguments, message):
    """A wrong command line gives exit 2, its reason on stderr without traceback, and nothing on stdout."""
    if name in ("init", "runs_list", "runs_show", "runs_tail", "runs_verify"):  # its first word is a directory
        arguments = ["new", *arguments]
    if name in ("runs_compare", "runs_report") and arguments == ["stray"]:  # each of its words is a run
        message = r"stray: expected the directory of a run, found no such directory"
    done = call(name, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_all_errors_of_a_file_are_shown_at_once(tmp_path):
    """Each mistake of a TOML is one line that names file and key, with a suggestion; the exit code is 2."""
    bad = tmp_path / "train.toml"
    text = (
        shipped("train").read_text().replace("num_heads = 4", "n_head = 4").replace("d_model = 256", 'd_model = "256"')
    )
    bad.write_text(text)
    done = call("train", "--config", bad)
    assert done.code == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 3  # num_heads is missing, too
    assert all(re.match(r"train\.toml:\d+: model\.", line) for line in lines)
    assert "n_head is not a known key (did you mean num_heads?)" in done.stderr


def test_required_keys_are_asked_for_by_name():
    """Without a TOML every required key is named in a line of its own."""
    done = call("make_data", "--overwrite")
    assert done.code == 2
    assert [re.search(r"(\w+) is required", line)[1] for line in done.stderr.splitlines()] == [
        "input",
        "tokenizer",
        "train",
    ]


def test_a_command_alone_says_how_to_begin():
    """A command that needs a TOML and is given nothing names the shipped one."""
    done = call("make_data")
    assert done.code == 2
    expected = "transformerlm-make-data: expected --config FILE.toml; --config make-data is the shipped one\n"
    assert done.stderr == expected
    assert call("make_data", "--config", "make-data", "--print-config").code == 0
    assert call("init").stderr.startswith("transformerlm-init: expected DIR, or --config FILE.toml; --config init")


def test_the_name_of_a_shipped_file_is_enough(tmp_path, monkeypatch):
    """`--config train` finds it anywhere and says which file it took; a file of that name in the directory wins."""
    monkeypatch.chdir(tmp_path)
    done = call("train", "--config", "train", "--print-config")
    assert (done.code, done.stderr) == (0, f"--config train: {shipped('train')}\n")
    assert done.stdout == call("train", "--config", shipped("train"), "--print-config").stdout
    (tmp_path / "train").write_text(shipped("train").read_text().replace('"first"', '"mine"'))
    done = call("train", "--config", "train", "--print-config")
    assert (done.stderr, 'run_name = "mine"' in done.stdout) == ("", True)
    done = call("train", "--config", "trian")
    assert done.code == 2
    assert done.stderr.startswith(
        "--config trian: no such file, and no shipped one of that name (did you mean train?); shipped: "
    )


FAILURES = [
    (ConfigError(["a.toml: x is wrong", "a.toml: y is wrong"]), 2, "a.toml: x is wrong\na.toml: y is wrong\n"),
    (ValueError("bad\n  value"), 2, "error: bad value\n"),
    (FileNotFoundError(2, "No such file or directory", "x.npy"), 2, "error: x.npy: No such file or directory\n"),
    (FileExistsError("x: is there"), 2, "error: x: is there\n"),
    (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
    (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
    (ImportError("no wandb"), 1, "error: no wandb\n"),
    (RuntimeError("out of memory"), 1, "error: out of memory\n"),
    (MemoryError(), 1, "error: MemoryError\n"),
    (FloatingPointError("nan"), 1, "error: nan\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
]


@pytest.mark.parametrize(("error", "code", "text"), FAILURES, ids=lambda value: type(value).__name__)
def test_failures_have_their_codes_and_one_line(error, code, text, capsys):
    """The code is 2 for what the user can fix, 1 for failures, 130 for Ctrl-C; each has one line, without traceback."""

    def run(config):
        raise error

    with pytest.raises(SystemExit) as done:
        main(Command("test", QuickstartConfig, run), [])
    captured = capsys.readouterr()
    assert (done.value.code, captured.out, captured.err) == (code, "", text)


def test_a_traceback_can_be_asked_for(monkeypatch):
    """TRANSFORMERLM_TRACEBACK=1 lets the error through, for those who want to see where it came from."""
    monkeypatch.setenv("TRANSFORMERLM_TRACEBACK", "1")

    def run(config):
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        main(Command("test", QuickstartConfig, run), [])


def test_our_own_mistakes_are_not_hidden():
    """An error that no user can fix (KeyError, AssertionError) keeps its traceback."""

    def run(config):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        main(Command("test", QuickstartConfig, run), [])


def test_the_result_of_the_command_is_the_exit_code():
    """None and 0 end with 0, any other number with itself."""
    for result, code in ((None, 0), (0, 0), (143, 143)):
        with pytest.raises(SystemExit) as done:
            main(Command("test", QuickstartConfig, lambda config, result=result: result), [])
        assert done.value.code == code


def test_a_command_lets_its_threads_wait_politely():
    """It sets this before anything imports torch, unless the environment sets it."""
    program = (
        "import os; from cli.utils import Command, main; from config.quickstart import QuickstartConfig; "
        "main(Command('test', QuickstartConfig, lambda config: print(os.environ['OMP_WAIT_POLICY'])), [])"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, env=environment | given, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"{expected}\n", "")


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--config", "train", "--print-config"]], ids=str)
def test_a_reader_that_goes_away_does_no_harm(arguments):
    """`--help | head -1` ends without a word, even if the pipe is closed before the first line; a full disk has one."""
    command = [sys.executable, "-m", "cli.train", *arguments]
    said = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "check": False, "env": BUFFERED}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, **said)
    os.close(writer)
    assert (done.returncode, "ignored" in done.stderr, "error" in done.stderr) == (1, False, False), done.stderr
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, **said)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "error: stdout: No space left on device")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize(("words", "code"), [(["--text", "x"], 2), (["--print-config"], 0)], ids=["refused", "done"])
def test_the_exit_code_is_the_commands_own_if_nobody_reads_stderr(words, code):
    """A terminal that was closed, or `|& head`, must not make another code of it: 120 is Python's."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; sys.stderr.write('x'); from cli.train import main; main()", *words]
    command += ["--config", "train"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=writer, cwd=ROOT, check=False, env=BUFFERED)
    os.close(writer)
    assert done.returncode == code


# --- standard streams --------------------------------------------------------------------------------------------

STREAMS = """
import sys
from cli.terminal import note
from cli.utils import Command, main
from config.quickstart import QuickstartConfig
def run(config):
    note("to people")
    print("data " + chr(0x6f22) + chr(0xe9))
    sys.stdout.flush()
    open(sys.argv[1], "w").write(ascii(sys.stdin.read()))
main(Command("test", QuickstartConfig, run), [])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
@pytest.mark.parametrize("closed", ["", "2>&-", ">&-", "<&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_streams_that_are_closed_or_narrow_end_no_command(closed, encoding, tmp_path):
    """What a stream cannot take is lost: nothing of it goes to another stream, or to a file opened later."""
    file = tmp_path / "file"
    done = subprocess.run(
        ["sh", "-c", f'"$0" "$@" {closed}', sys.executable, "-c", STREAMS, str(file)],
        cwd=ROOT,
        input=b"caf\xe9",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == (b"" if "2>" in closed else b"to people\n")
    text = "data \u6f22\xe9\n".encode(encoding, errors="replace")
    assert done.stdout == (b"" if " >" in f" {closed}" else text)
    read = "" if "<" in closed else ascii(b"caf\xe9".decode(encoding, errors="replace"))
    assert file.read_text() == (read or "''")


def test_a_configuration_is_printed_whole_in_any_encoding():
    """A character that stdout cannot encode is written by its number, so that the TOML keeps its meaning."""
    prompt = "\u6f22\U0001f44d\xe9"
    done = subprocess.run(
        [sys.executable, "-m", "cli.infer", "--checkpoint=a", f"--prompt={prompt}", "--print-config"],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert tomllib.loads(done.stdout.decode("ascii"))["prompt"] == [prompt]


def test_defaults_file_and_command_line_win_in_that_order(tmp_path):
    """The command line overrides the file, the file the defaults."""
    toml = tmp_path / "quick.toml"
    toml.write_text('time = "5m"\n')
    printed = call("quickstart", "--config", toml, "--print-config").stdout
    assert printed == dump_toml(QuickstartConfig(time="5m"))
    printed = call("quickstart", "--config", toml, "--time=7m", "--print-config").stdout
    assert printed == dump_toml(QuickstartConfig(time="7m"))
