"""Lines for people on stderr, and one live line below them on a terminal."""

from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path

import pytest

from cli.terminal import (
    LIVE,
    LiveLine,
    clock,
    compiling_shown,
    framed,
    is_live,
    note,
    plain,
    print_record,
    records_as,
    working,
)
from tests.cli.commands import call, call_in_terminal, lines_on_screen
from tests.cli.test_progress import terminal
from transformerlm.utils import kernel


@pytest.fixture(autouse=True)
def _at_rest(monkeypatch):
    """Begin without a live line, so that one may be drawn at once, and leave none."""
    monkeypatch.setenv("COLUMNS", "40")
    LIVE._drawn_at = 0.0
    yield
    LIVE.show(None)


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows after this text."""
    return [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]


def test_a_note_stands_above_the_live_line(monkeypatch):
    """The live line is erased, the note written, and the live line drawn again below it."""
    stream = terminal(monkeypatch)
    LIVE.show(lambda: "step 1/2")
    note("a word")
    assert screen(stream.getvalue()) == ["a word", "step 1/2"]
    LIVE.show(None)
    assert screen(stream.getvalue()) == ["a word", ""]
    note("the end")
    assert stream.getvalue().endswith("the end\n")


def test_a_live_line_never_wraps(monkeypatch):
    """A terminal cannot erase a line that has wrapped, so it is cut at the width."""
    stream = terminal(monkeypatch)
    LIVE.show(lambda: "x" * 100)
    assert screen(stream.getvalue()) == ["x" * 39]


def test_a_live_line_moves_while_nothing_happens(monkeypatch):
    """A thread redraws it, and ends when there is no live line any more."""
    terminal(monkeypatch)
    monkeypatch.setattr("cli.terminal._TICK_SECONDS", 0.01)
    monkeypatch.setattr("cli.terminal._IDLE_SECONDS", 0.01)
    line, drawn, enough = LiveLine(), [], threading.Event()

    def words() -> str:
        drawn.append(len(drawn))
        if len(drawn) > 3:
            enough.set()
        return str(len(drawn))

    line.show(words)
    ticker = line._ticker
    assert enough.wait(60)
    line.show(None)
    ticker.join(60)
    assert not ticker.is_alive()


def test_what_takes_time_is_named_on_a_terminal_only(monkeypatch):
    """The words appear with the seconds so far and vanish at the end, even after an error; elsewhere there are none."""
    stream = terminal(monkeypatch)
    with pytest.raises(ValueError, match="x"), working("importing"):
        raise ValueError("x")
    assert "importing  0:00" in stream.getvalue()
    assert screen(stream.getvalue()) == [""]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with working("importing"):
        pass
    assert sys.stderr.getvalue() == ""


def test_a_function_that_is_compiled_is_named_on_a_terminal(monkeypatch):
    """The live line names it while it is compiled, then says again what it said before; later nobody listens."""
    stream = terminal(monkeypatch)
    monkeypatch.setattr("cli.terminal._REDRAW_SECONDS", 0)
    with working("reading the text"), compiling_shown():
        (listener,) = kernel._listeners
        listener("table_kernels.count_pieces", False)
        assert screen(stream.getvalue()) == ["compiling count_pieces, this once  0:00"]
        listener("table_kernels.count_pieces", True)
        assert screen(stream.getvalue()) == ["reading the text  0:00"]
    assert kernel._listeners == []


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), ("TERM", "dumb")])
def test_some_terminals_have_no_live_line(name, value, monkeypatch):
    """Only the first process of a run shows one; a terminal that cannot erase shows none."""
    terminal(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    assert is_live()
    monkeypatch.setenv(name, value)
    assert not is_live()


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("reentrant call")])
def test_a_terminal_that_takes_nothing_stops_no_work(error, monkeypatch):
    """A closed terminal, or a signal handler that runs while a line is written, ends nothing."""

    class Gone(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stderr", Gone())
    note("lost")


def test_a_sample_is_framed_within_80_columns():
    """Line breaks stay, long lines wrap at words, several empty lines become one, and control characters are gone."""
    text = 'Once upon a time, "Ada" ' + "met a fox and " * 8 + "\n\n\n\tIndented \x1b[31mred\x07\n" + "x" * 200
    lines = framed("step 1,200", text).splitlines()
    assert lines[0].startswith("── step 1,200 ───")
    assert all(len(line) < 80 for line in lines)
    assert lines[1].startswith('   Once upon a time, "Ada" met a fox')
    assert lines.count("") == 1
    assert "Indented \ufffd[31mred\ufffd" in framed("", text)
    assert "".join("".join(lines[1:]).split()).endswith("x" * 200)


def test_a_frame_is_ascii_where_the_terminal_is(monkeypatch):
    """In an encoding without the rule's character, dashes appear, not question marks."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert framed("step 1", "a").startswith("-- step 1 ---")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (41.6, "0:42"), (725, "12:05"), (11220, "3:07:00")])
def test_clock(seconds, text):
    """Times are minutes and seconds, with hours where there are any."""
    assert clock(seconds) == text


def test_a_hostile_name_is_one_line():
    """A message that quotes a file's bytes has no control characters and a limited length."""
    assert plain("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert len(plain("x" * 10**6)) < 3_000


# --- results in a real pseudo-terminal ---------------------------------------------------------------------------

WORDS = {
    "train_tokenizer": "280 tokens, ",
    "make_data": "train.npy: ",
    "plan": "parameters    ",
    "eval": "  bits/byte   ",
    "infer": "Ada",
}


def arguments_of(name: str, pipeline, folder: Path) -> list[object]:
    """Return what a command needs to do something small with the session's run."""
    files = pipeline.files
    return {
        "train_tokenizer": ["--input", files.text, "--output_dir", folder / "tok", "--tokenizer.vocab_size=280"],
        "make_data": ["--input", files.text, "--tokenizer", files.tokenizer, "--train", folder / "train.npy"],
        "plan": ["--config", pipeline.train_toml, "--calibration_steps=0"],
        "eval": ["--checkpoint", pipeline.run, "--input", files.valid, "--resamples=0"],
        "infer": ["--checkpoint", pipeline.run, "--prompt=Ada", "--sampling.max_new_tokens=4"],
    }[name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("name", WORDS)
def test_on_a_terminal_results_are_words_and_in_a_pipe_json(name, pipeline, tmp_path):
    """A person reads no JSON and nothing twice; a pipe gets only JSON lines."""
    done = call_in_terminal(name, *arguments_of(name, pipeline, tmp_path / "one"))
    lines = lines_on_screen(done.stdout)
    assert done.code == 0, done.stdout
    assert sum(WORDS[name] in line for line in lines) == 1, lines
    assert '{"' not in done.stdout
    assert not lines[-1], "a live line is left"
    piped = call(name, *arguments_of(name, pipeline, tmp_path / "two"))
    assert piped.code == 0
    assert piped.records


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("option", ["--output.format=json", "--logging.backend=json"])
def test_json_on_a_terminal_is_a_word_away(option, pipeline, tmp_path):
    """JSON that was asked for is written, even on a terminal."""
    done = call_in_terminal("infer", *arguments_of("infer", pipeline, tmp_path), option)
    (line,) = (line for line in lines_on_screen(done.stdout) if line.startswith("{"))
    assert json.loads(line)["text.prompt"] == "Ada"


@pytest.mark.parametrize(("form", "at_terminal", "in_pipe"), [("auto", 0, 1), ("json", 1, 1), ("text", 0, 0)])
def test_records_are_written_where_they_are_wanted(form, at_terminal, in_pipe, monkeypatch, capsys):
    """On a terminal a person has read them as words; who asks for JSON, or for none, gets that everywhere."""
    for has_read, expected in ((True, at_terminal), (False, in_pipe)):
        monkeypatch.setattr("logger.has_read_it", lambda has_read=has_read: has_read)
        with records_as(form):
            print_record({"event": "x"})
        assert capsys.readouterr().out == '{"event": "x"}\n' * expected
    print_record({"event": "as before"})
    assert "as before" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "said"), [(BrokenPipeError(), 0), (OSError(28, "No space left on device"), 1)])
def test_records_that_files_hold_as_well_end_no_work(error, said, monkeypatch, caplog):
    """A closed stdout is left in silence, another error is said once; what has only stdout fails there."""

    class Broken(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Broken())
    with records_as("json", in_files=True):
        for number in range(3):
            print_record({"number": number})
    assert len(caplog.records) == said
    with records_as("json"), pytest.raises(type(error)):
        print_record({"event": "x"})
