"""`transformerlm-infer`: prompts from three places, JSON lines or streamed text, the same for the same seed."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys

import pytest

from logger import NoopLogger
from tests.cli.commands import ROOT, call, shipped
from tests.training.tiny_run import VOCAB_SIZE

KEYS = {
    "event",
    "params.max_new_tokens",
    "params.temperature",
    "params.p",
    "params.top_k",
    "params.min_p",
    "params.stop_at_eos",
    "params.allow_special",
    "params.eos_token_id",
    "params.seed",
    "text.prompt",
    "text.output",
    "metrics.latency_ms",
}


@pytest.fixture
def infer(pipeline):
    """Return a function that calls the command on the pipeline's run, on the CPU, with few tokens."""

    def run(*arguments, stdin="", checkpoint=pipeline.run):
        usual = ["--checkpoint", checkpoint, "--device=cpu", "--sampling.max_new_tokens=8"]
        return call("infer", *usual, *arguments, stdin=stdin)

    return run


def outputs(outcome) -> list[str]:
    """Return the generated texts of JSON lines."""
    assert outcome.code == 0, outcome.stderr
    return [record["text.output"] for record in outcome.records]


def test_a_json_line_a_sample(infer):
    """A line holds prompt, output, every sampling parameter and the latency; nothing else is on stdout."""
    done = infer("--prompt", "Ada", "Bob")
    assert done.code == 0
    assert [record["text.prompt"] for record in done.records] == ["Ada", "Bob"]
    for record in done.records:
        assert set(record) == KEYS
        assert record["metrics.latency_ms"] > 0
        assert record["params.eos_token_id"] == VOCAB_SIZE - 1


@pytest.mark.parametrize("stdin", ["Ada\nBob sees\n", "Ada\r\nBob sees"], ids=["lines", "windows, no end"])
def test_prompts_come_from_stdin_when_there_are_none(infer, stdin):
    """Each line of stdin is a prompt, without its line end; an unfinished last line counts."""
    done = infer(stdin=stdin)
    assert [record["text.prompt"] for record in done.records] == ["Ada", "Bob sees"]
    assert outputs(done) == outputs(infer("--prompt", "Ada", "Bob sees"))


def test_no_prompt_at_all_gives_no_output(infer):
    """An empty stdin is no prompt: nothing on stdout, exit 0."""
    done = infer(stdin="")
    assert (done.code, done.stdout) == (0, "")


def test_the_empty_prompt_starts_a_new_document(infer):
    """`--prompt ""` generates from <|endoftext|>, which is not part of the text."""
    for done in (infer("--prompt", ""), infer("--prompt="), infer(stdin="\n")):
        (record,) = done.records
        assert record["text.prompt"] == ""
        assert record["text.output"]
        assert "<|endoftext|>" not in record["text.output"]


def test_the_seed_decides(infer):
    """The same seed gives the same samples, another one others; several samples of a prompt differ."""
    several = ["--prompt=Ada", "--num_samples=3", "--sampling.temperature=2.0"]
    first, again, other = (outputs(infer(*several, f"--seed={seed}")) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) > 1
    seeds = [record["params.seed"] for record in infer(*several, "--seed=5").records]
    assert seeds == [5, 6, 7]
    assert outputs(infer("--prompt=Ada", "--sampling.temperature=2.0", "--seed=2"))[0] == first[1]
    greatest = infer("--prompt=Ada", "--num_samples=2", f"--seed={2**63 - 1}").records
    assert [record["params.seed"] for record in greatest] == [2**63 - 1, 0]  # as transformerlm-serve counts on


def test_temperature_zero_needs_no_seed(infer):
    """The most likely token is the same for every seed."""
    greedy = ["--prompt=Ada", "--sampling.temperature=0.0"]
    assert outputs(infer(*greedy, "--seed=1")) == outputs(infer(*greedy, "--seed=2"))


def test_text_format_is_prompt_and_output(infer):
    """`--output.format=text` prints the prompt and what follows it, samples parted by a line."""
    expected = [record["text.prompt"] + record["text.output"] for record in infer("--prompt", "Ada", "Émile").records]
    done = infer("--prompt", "Ada", "Émile", "--output.format=text")
    assert done.code == 0
    assert done.stdout == f"{expected[0]}\n\n{'-' * 72}\n{expected[1]}\n"


def test_a_terminal_shows_where_the_models_part_begins(infer, monkeypatch):
    """There the prompt is bold, in text format alone, unless NO_COLOR or a dumb terminal asks for plain text."""
    arguments = ["--prompt=Ada", "--output.format=text"]
    plain = infer(*arguments).stdout
    monkeypatch.setattr(io, "StringIO", type("Terminal", (io.StringIO,), {"isatty": lambda stream: True}))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert infer(*arguments).stdout == plain.replace("Ada", "\x1b[1mAda\x1b[0m", 1)
    assert infer("--prompt=", "--output.format=text").stdout.count("\x1b") == 0
    monkeypatch.setenv("TERM", "dumb")
    assert infer(*arguments).stdout == plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert infer(*arguments).stdout == plain


def test_every_name_of_a_checkpoint_works(infer, pipeline, tmp_path):
    """A run, its newest checkpoint, `latest`, and a copy by itself give the same text."""
    copy = tmp_path / "copy"
    shutil.copytree(pipeline.run / "checkpoints/step-00000012", copy)
    places = [pipeline.run, pipeline.run / "checkpoints", pipeline.run / "checkpoints/latest", copy]
    texts = [outputs(infer("--prompt=Ada", checkpoint=place)) for place in places]
    assert all(text == texts[0] for text in texts)


def test_a_long_prompt_keeps_its_end(infer):
    """A prompt beyond the context is continued from its end, with a warning and whole in the record."""
    prompt = "Ada sees a tree.\n" * 20
    done = infer("--prompt", prompt)
    assert re.search(r"^warning: the prompt has \d+ tokens, more than context_length 16; .*\n$", done.stderr, re.M)
    assert done.records[0]["text.prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere: no such checkpoint or run directory"),
        (["--checkpoint=."], "found neither"),
        (["--device=cuda:99"], "cuda:99"),
        (["--sampling.temperature=-1.0"], "--sampling.temperature: expected a number >= 0"),
        (["--sampling.top_p=1.5"], "--sampling.top_p"),
        (["--sampling.top_k=0"], "--sampling.top_k"),
        (["--speculative=2", "--reproducible"], "speculative: expected 0 with reproducible = true, found 2"),
        (["--speculative=2", "--sampling.min_tokens=1"], "speculative: expected 0 with penalties or min_tokens"),
        (
            ["--sampling.min_tokens=3", "--sampling.stop_at_eos=false"],
            "min_tokens: expected 0 with stop_at_eos = false, found 3: no token ends a text there",
        ),
        (["--sampling.top_k=5", "--sampling.top_p=0"], "top_p = 0 keeps the most likely token alone, so top_k = 5"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_and_exit_2(arguments, message, infer, tmp_path, monkeypatch):
    """A missing checkpoint, device or value is named in one line; nothing is on stdout."""
    monkeypatch.chdir(tmp_path)
    done = infer("--prompt=x", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_checkpoint_is_refused(infer, pipeline, tmp_path):
    """A checkpoint whose file has changed is not used: exit 2, and the file is named."""
    copy = tmp_path / "copy"
    shutil.copytree(pipeline.run / "checkpoints/step-00000012", copy)
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    done = infer("--prompt=x", checkpoint=copy)
    assert (done.code, done.stdout) == (2, "")
    assert "tokenizer/merges.txt is damaged" in done.stderr


def test_the_shipped_toml_runs(infer, pipeline):
    """The shipped file generates from a run that is named on the command line, and reads its prompts from stdin."""
    arguments = ["--config", shipped("infer"), "--checkpoint", pipeline.run, "--sampling.max_new_tokens=3"]
    done = call("infer", *arguments, stdin="Ada\n\n")
    assert done.code == 0
    assert [record["text.prompt"] for record in done.records] == ["Ada", ""]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_real_process_streams_and_survives_a_closed_pipe(pipeline):
    """`transformerlm-infer ... | head -1`: the first line comes, the rest is dropped without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.infer", "--checkpoint", pipeline.run, "--prompt", "Ada", "--num_samples=1000000"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert '"text.prompt": "Ada"' in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=600) in (0, 1)
    assert len(process.stderr.read().splitlines()) == 1
    process.stderr.close()


def test_samples_generated_together_are_those_generated_alone(infer):
    """`batch_size` changes neither texts nor their order, for prompts of different lengths and several samples."""
    prompts = ["--prompt", "Ada", "", "Bob sees the tree and", "--num_samples=2", "--seed=3"]
    together, alone = (outputs(infer(*prompts, f"--batch_size={size}")) for size in (4, 1))
    assert together == alone
    assert len(together) == 6


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_reproducible_texts_are_the_same_in_any_batch_and_streamed(infer, precision):
    """Where rounding differs between one row and several, `reproducible` makes it the same."""
    options = ["--prompt", "Return the", "--num_samples=3", "--reproducible", f"--precision={precision}"]
    together, alone = (outputs(infer(*options, f"--batch_size={size}")) for size in (8, 1))
    assert together == alone
    shown = infer(*options, "--output.format=text").stdout
    assert all(text in shown for text in alone)


def test_drafted_tokens_leave_the_likeliest_text_as_it_is(infer):
    """`speculative` gives the same text at temperature 0, and some text at others, as JSON and as text."""
    greedy = ["--prompt", "Ada", "Ada sees Ada sees", "--sampling.temperature=0.0"]
    assert outputs(infer(*greedy, "--speculative=4")) == outputs(infer(*greedy))
    for form in ("json", "text"):
        assert infer("--prompt=Ada", "--speculative=2", f"--output.format={form}").code == 0


@pytest.mark.parametrize("precision", ["bf16", "int8", "auto"])
def test_weights_of_fewer_bits_generate(infer, precision):
    """Each precision answers each prompt."""
    assert len(outputs(infer("--prompt", "Ada", "Bob", f"--precision={precision}"))) == 2


def test_special_tokens_in_a_prompt_are_tokens_where_that_is_asked_for(infer):
    """`allow_special` makes the token of its text: as a prompt by itself it is the start of a document."""
    prompt = ["--prompt=<|endoftext|>", "--sampling.temperature=0.0"]
    assert outputs(infer(*prompt, "--allow_special")) == outputs(infer("--prompt=", *prompt[1:]))
    assert outputs(infer(*prompt)) != outputs(infer(*prompt, "--allow_special"))


def test_noop_writes_no_line(infer):
    """JSON lines are log lines and are left out; text that was asked for is shown."""
    assert infer("--prompt=Ada", "--logging.backend=noop").stdout == ""
    assert infer("--prompt=Ada", "--logging.backend=noop", "--output.format=text").stdout.startswith("Ada")


def test_no_file_is_written_that_nobody_reads(infer, monkeypatch):
    """A machine may have no directory to write to; only W&B with `log_outputs` needs a file."""
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: 1 / 0)
    assert infer("--prompt=Ada").code == 0


def test_lines_of_a_backend_hold_the_beginnings_of_long_texts(infer, pipeline, monkeypatch):
    """Prompt and output are cut there, and whole on stdout."""
    import cli.infer

    logged = []
    logger = type("Log", (NoopLogger,), {"write": lambda self, record: logged.append(record)})()
    monkeypatch.setattr(cli.infer, "_make_logger", lambda config: logger)
    prompt = "Ada sees. " * 200
    (shown,) = infer("--prompt", prompt).records
    assert shown["text.prompt"] == prompt
    assert logged[0]["text.prompt"] == prompt[:1000] + "..."
    assert logged[0]["text.output"] == shown["text.output"]


def test_a_line_that_is_no_utf8_is_named_after_those_before_it_are_answered(infer):
    """Its number and the byte are in the error, exit 2; the terminal's encoding does not matter."""
    lines = b"Ada\n\xc3\x89mile\nBob caf\xe9\nnever\n"
    done = infer(stdin=io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
    assert [record["text.prompt"] for record in done.records] == ["Ada", "Émile"]
    assert done.code == 2
    assert "stdin: line 3: expected a prompt in UTF-8, found the byte 0xe9 after 7 others" in done.stderr


def test_a_file_is_one_prompt(infer, tmp_path):
    """Lines and all, but for the end of its last line; prompts of the command line come first."""
    (tmp_path / "a.txt").write_bytes("Émile\n\nsees\n".encode())
    (tmp_path / "b.txt").write_bytes(b"Bob\r\n")
    done = infer("--prompt_file", tmp_path / "a.txt", tmp_path / "b.txt", "--prompt=Ada")
    assert [record["text.prompt"] for record in done.records] == ["Ada", "Émile\n\nsees", "Bob"]


def test_a_prompt_file_that_cannot_be_read_is_named_before_the_model_is_loaded(infer, tmp_path):
    """Missing, or not UTF-8: exit 2 with the way out, whatever the checkpoint."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bare.txt").write_bytes("Ada".encode("utf-16le"))
    (tmp_path / "mark.txt").write_bytes("Ada".encode("utf-16"))
    (tmp_path / "packed.txt").write_bytes(b"\x1f\x8b\x08\0")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, message in (
        ("a.txt", "expected a prompt in UTF-8, found the byte 0xe9 after 3 others (iconv -f ENCODING -t utf-8"),
        ("b.txt", "No such file"),
        ("bare.txt", "expected UTF-8 text, found what may be UTF-16 (if so, iconv -f utf-16le -t utf-8"),
        ("mark.txt", "expected UTF-8 text, found UTF-16 (iconv -f utf-16 -t utf-8"),
        ("packed.txt", "expected UTF-8 text, found gzip data"),
        ("picture.txt", "expected UTF-8 text, found a picture"),
    ):
        done = infer("--prompt_file", tmp_path / name, checkpoint=tmp_path / "nowhere")
        assert (done.code, done.stdout) == (2, "")
        assert f"{name}: {message}" in done.stderr


@pytest.mark.parametrize("stdin", [None, ""])
def test_where_stdin_has_no_line_a_word_says_so(stdin, infer):
    """A service may have no stdin, and a pipe may be empty: nothing is written, and it is said why."""
    done = infer(stdin=stdin)
    assert (done.code, done.stdout) == (0, "")
    assert "no prompt: stdin has no line" in done.stderr
