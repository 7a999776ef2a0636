"""Configuration errors: all at once, each with its key, what was expected and what was found."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from config.bench_infer import BenchInferConfig
from config.bench_tokenizer import BenchTokenizerConfig
from config.bench_train import BenchTrainConfig
from config.eval import EvalConfig
from config.export import ExportConfig
from config.import_ import ImportConfig
from config.infer import InferConfig
from config.init import InitConfig
from config.io import SHIPPED, ConfigError, dump_origins, dump_settings, dump_toml, load_config, read_layers, validate
from config.keys import iter_keys
from config.make_data import MakeDataConfig
from config.plan import PlanConfig
from config.quickstart import QuickstartConfig
from config.schemas import duration_seconds
from config.train import TrainConfig
from config.train_tokenizer import TrainTokenizerConfig

SCHEMAS = {
    "bench_infer": BenchInferConfig,
    "bench_tokenizer": BenchTokenizerConfig,
    "bench_train": BenchTrainConfig,
    "train_tokenizer": TrainTokenizerConfig,
    "make_data": MakeDataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "import_": ImportConfig,
    "infer": InferConfig,
    "init": InitConfig,
    "plan": PlanConfig,
    "quickstart": QuickstartConfig,
}
TRAIN = SHIPPED / "train.toml"


def errors_of(text: str, tmp_path: Path, schema=TrainConfig, overrides=None) -> list[str]:
    """Return the error lines that a TOML text gives, without the numbers of the lines."""
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    return [re.sub(r"^train\.toml:\d+", "train.toml", line) for line in caught.value.lines]


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_toml_loads_and_round_trips(name, tmp_path):
    """Every shipped TOML is valid, and `--print-config` output parses back to an equal object."""
    config = load_config(SCHEMAS[name], SHIPPED / f"{name}.toml")
    path = tmp_path / "again.toml"
    path.write_text(dump_toml(config))
    assert load_config(SCHEMAS[name], path) == config


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_toml_names_its_schema(name):
    """Every shipped TOML carries the `#:schema` line by which editors check it, and that schema is the current one."""
    from config.io import dump_json_schema

    first = (SHIPPED / f"{name}.toml").read_text().splitlines()[0]
    assert first == f"#:schema {name}.schema.json"
    expected = dump_json_schema(SCHEMAS[name]) + "\n"
    assert (SHIPPED / f"{name}.schema.json").read_text() == expected, "run the command with --print-schema again"


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_described(name):
    """Every key has a description, a type in words, and a default that is valid TOML or `none`."""
    for key in iter_keys(SCHEMAS[name]):
        assert key.description, key.name
        assert key.expected, key.name
        if key.default not in (None, "none"):
            tomllib.loads(f"value = {key.default}")


def test_all_errors_at_once(tmp_path):
    """A file with many mistakes is answered by one line for each, naming the key and the repair."""
    text = (
        TRAIN.read_text()
        .replace("num_heads = 4", 'n_heads = 4\nnum_heads = "4"')
        .replace("d_model = 256", "d_model = true")
    )
    lines = errors_of(text.replace("max_steps = 1000", "max_steps = 1e4").replace("3e-3", "nan"), tmp_path)
    assert lines == [
        "train.toml: model.d_model: expected an integer >= 1 and <= 1048576, found true",
        'train.toml: model.num_heads: expected an integer >= 1 and <= 65536, found "4" (a string); write 4',
        "train.toml: model.n_heads is not a known key (did you mean num_heads?)",
        "train.toml: training.max_steps: expected an integer >= 1, found 10000.0 (a float); write 10000",
        "train.toml: optimizer.learning_rate: expected a number > 0 and <= 1000.0, found nan (a float)",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("d_model = 256", "d_model = 250", "train.toml: model: d_model (250) is not divisible by num_heads (4)"),
        (
            "num_heads = 4",
            "num_heads = 4\nnum_kv_heads = 3",
            "train.toml: model: num_heads (4) is not divisible by num_kv_heads (3)",
        ),
        (
            "num_heads = 4",
            "num_heads = 4\nrope_scaling = { low_freq_factor = 4.0 }",
            "train.toml: model.rope_scaling: low_freq_factor: expected less than high_freq_factor, found 4 and 4",
        ),
        (
            "num_heads = 4",
            "num_heads = 4\nrope_scaling = { factor = 0.5 }",
            "train.toml: model.rope_scaling.factor: expected a number >= 1 and <= 1000000.0, found 0.5 (a float)",
        ),
        (
            "num_heads = 4",
            "num_heads = 4\nrope_scaling = { factors = 8.0 }",
            "train.toml: model.rope_scaling.factors is not a known key (did you mean factor?)",
        ),
        (
            "num_heads = 4",
            "num_heads = 4\nposition = 'none'\nrope_scaling = {}",
            'train.toml: model: rope_scaling does nothing with position = "none"',
        ),
        (
            'warmup_steps = "10%"',
            "warmup_steps = 5000",
            "train.toml: schedule.warmup_steps (5000) exceeds training.max_steps (1000); lower it, or give a share of "
            'the run, such as schedule.warmup_steps = "5%"',
        ),
        ("1e-4", "1e-2", "train.toml: schedule.min_learning_rate (0.01) exceeds optimizer.learning_rate (0.003)"),
        (
            'warmup_steps = "10%"',
            'warmup_steps = "a"',
            'train.toml: schedule.warmup_steps: expected an integer >= 0 or a share such as "5%", found "a" (a string)',
        ),
        (
            'name = "cosine"\nwarmup_steps = "10%"',
            'name = "wsd"\ndecay_steps = "95%"\nwarmup_steps = "5.5%"',
            "train.toml: schedule: warmup_steps + decay_steps: expected at most 100% of the run, found 5.5% + 95%",
        ),
        ('"cosine"', '"wsd"', 'train.toml: schedule: name = "wsd" needs decay_steps >= 1, found 0'),
        (
            "batch_size = 16",
            "batch_size = 16\nmicro_batch_size = 5",
            "train.toml: training: batch_size (16) is not divisible by micro_batch_size (5)",
        ),
        (
            "batch_size = 16",
            'batch_size = 16\nmicro_batch_size = "all"',
            'train.toml: training.micro_batch_size: expected an integer >= 1 or "auto", found "all" (a string)',
        ),
        ('"first"', '"../x"', None),
        ('"data/train.npy"', '""', "train.toml: data.train: expected a path, found an empty string"),
        (
            "[optimizer]",
            "[optimizer]\nmomentum = 0.9",
            'train.toml: optimizer: momentum = 0.9 does nothing with name = "adamw"',
        ),
        (
            'name = "adamw"\nlearning_rate = 3e-3\nbeta1 = 0.9',
            'name = "sgd"\nlearning_rate = 3e-3\nbeta1 = 0.8',
            'train.toml: optimizer: beta1 = 0.8 does nothing with name = "sgd"',
        ),
        (
            '"adamw"',
            '"adam"',
            'train.toml: optimizer.name: expected one of "adamw", "muon", "sgd", found "adam" (a string)',
        ),
        ("[schedule]", "[shedule]", "train.toml: shedule is not a known key (did you mean schedule?)"),
        (
            "eval_tokens = 32768",
            'max_time = "2 minutes"',
            'train.toml: training.max_time: expected a duration such as "90s", "2m" or "1.5h", found "2 minutes"',
        ),
    ],
)
def test_relations_and_ranges(old, new, line, tmp_path):
    """Relations between keys are refused with both numbers, each in the section that holds them."""
    text = TRAIN.read_text()
    assert old in text
    lines = errors_of(text.replace(old, new, 1), tmp_path)
    if line is not None:
        assert line in lines


@pytest.mark.parametrize("key", ["lr", "n_embd", "max_iters", "block_size"])
def test_words_of_other_projects_are_translated(key, tmp_path):
    """A key as nanoGPT spells it is answered with our word for it."""
    lines = errors_of(TRAIN.read_text().replace("[training]", f"[training]\n{key} = 1"), tmp_path)
    assert len(lines) == 1
    assert "did you mean" in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"a = ",
        b"[a]\n[a]",
        b"x = 1\nx = 2",
        b"v = " + b"[" * 5000,
        b"n = " + b"9" * 5000,
        b"#" * 1_000_001,
    ],
    ids=["not UTF-8", "cut", "duplicate table", "duplicate key", "deep", "huge integer", "huge file"],
)
def test_files_that_are_not_toml(content, tmp_path):
    """A file that is not TOML is refused in one line that names it."""
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert len(caught.value.lines) == 1
    assert str(path) in caught.value.lines[0]


def test_missing_file_and_directory(tmp_path):
    """A wrong path is one line."""
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"no such file|found a directory"):
            load_config(TrainConfig, path)


def test_overrides_win_and_name_themselves(tmp_path):
    """The command line beats the file, and an error in it names the option."""
    config = load_config(
        TrainConfig, TRAIN, {"model.d_model": "512", "training.device": "cpu", "samples.prompts": ["a", "1"]}
    )
    assert (config.model.d_model, config.training.device, config.samples.prompts) == (512, "cpu", ["a", "1"])
    lines = errors_of(TRAIN.read_text(), tmp_path, overrides={"model.d_model": "abc", "training.compile": "yes"})
    assert lines == [
        '--model.d_model: expected an integer >= 1 and <= 1048576, found "abc" (a string)',
        '--training.compile: expected true or false or "auto", found "yes" (a string)',
    ]


def test_override_of_text_is_taken_as_written():
    """A text key takes the words as they are, also when they look like a number."""
    assert load_config(TrainConfig, TRAIN, {"logging.run_name": "2024"}).logging.run_name == "2024"


def test_none_unsets_an_optional_key(tmp_path):
    """The command line can take back what the file sets, where there may be nothing."""
    path = tmp_path / "train.toml"
    path.write_text(TRAIN.read_text().replace("[training]", '[training]\nmax_time = "90s"'))
    assert load_config(TrainConfig, path).training.max_time == "90s"
    assert load_config(TrainConfig, path, {"training.max_time": "none"}).training.max_time is None
    with pytest.raises(ConfigError, match=r'--model\.d_model: expected an integer .* found "none"'):
        load_config(TrainConfig, path, {"model.d_model": "none"})


def test_a_relation_broken_by_the_command_line_names_it(tmp_path):
    """The file alone is right, so the error says which option it met."""
    lines = errors_of(TRAIN.read_text(), tmp_path, overrides={"model.num_heads": "3"})
    assert lines == ["train.toml with --model.num_heads: model: d_model (256) is not divisible by num_heads (3)"]


def test_override_list_as_toml():
    """A list of numbers can be given as words or as one TOML list."""
    bench = SHIPPED / "bench_infer.toml"
    assert load_config(BenchInferConfig, bench, {"batch_size": ["1", "2"]}).batch_size == [1, 2]
    assert load_config(BenchInferConfig, bench, {"batch_size": ["[1, 2]"]}).batch_size == [1, 2]


@pytest.mark.parametrize("prompt", ['["a"]', "[]", "[1, 2, 3]", "none", "true", '{"a": 1}', "-x"])
def test_a_prompt_that_looks_like_toml_is_a_text(prompt):
    """The words of a list of texts are the texts; a list in TOML has an option of its own."""
    assert load_config(TrainConfig, TRAIN, {"samples.prompts": [prompt]}).samples.prompts == [prompt]
    snippets = ['samples.prompts = ["a", "b"]', "[model]\nd_model = 512"]
    config = load_config(TrainConfig, TRAIN, {"model.num_heads": "8"}, snippets=snippets)
    assert (config.samples.prompts, config.model.d_model, config.model.num_heads) == (["a", "b"], 512, 8)


def test_a_mistake_in_a_text_of_toml_names_the_option():
    """What `--toml` gives is refused as a file is."""
    for snippet, line in {
        "a = ": "--toml: not valid TOML: Invalid value (at end of document)",
        "model.d_model = true": "--toml: model.d_model: expected an integer >= 1 and <= 1048576, found true",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(TrainConfig, TRAIN, snippets=[snippet])
        assert caught.value.lines == [line]


def test_an_empty_run_name_is_none(tmp_path):
    """`run_name = ""` is the default, the time of the start."""
    path = tmp_path / "train.toml"
    path.write_text(TRAIN.read_text().replace('run_name = "first"', 'run_name = ""'))
    assert load_config(TrainConfig, path).logging.run_name is None


# --- several sources ---------------------------------------------------------------------------------------------

SMALL = """\
[model]  # "d_model" and lines such as [data] in a comment or in a text are none
vocab_size = 300
context_length = 16
d_model = 30
num_layers = 1
num_heads = 4
[data]
train = "a.npy"
tokenizer = "t"
[training]
max_steps = 10
batch_size = 4
[schedule]
warmup_steps = 20
[samples]
prompts = [
    "[model]",
    \'\'\'
d_model = 3
[training]\'\'\', "a",
]
[logging]
run_name = "?"
dataset.x = 1
"""


def raw_errors(*texts: str, tmp_path: Path, schema=TrainConfig, overrides=None) -> list[str]:
    """Return the error lines of files called a.toml, b.toml, ..., just as a user sees them."""
    paths = [tmp_path / f"{letter}.toml" for letter, _ in zip("abc", texts, strict=False)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(schema, paths, overrides)
    return caught.value.lines


def test_an_error_names_its_line(tmp_path):
    """Each error has the line of its key, a missing key that of its table, whatever texts look like."""
    text = SMALL.replace('tokenizer = "t"\n', "")
    lines = [line.split(" ")[0] + line.split(" ")[1].rstrip(":") for line in raw_errors(text, tmp_path=tmp_path)]
    assert lines == [
        "a.toml:4:model",
        "a.toml:7:data.tokenizer",
        "a.toml:22:logging.run_name",
        "a.toml:23:logging.dataset",
    ]


def test_relations_of_two_sections_are_told_together(tmp_path):
    """A section that is wrong in itself does not hide that two others do not fit together."""
    text = SMALL.partition("[logging]")[0]
    assert raw_errors(text, tmp_path=tmp_path) == [
        "a.toml:4: model: d_model (30) is not divisible by num_heads (4)",
        "a.toml:14: schedule.warmup_steps (20) exceeds training.max_steps (10); lower it, or give a share of the run, "
        'such as schedule.warmup_steps = "5%"',
    ]


def test_of_two_files_the_later_one_counts(tmp_path):
    """Tables are merged, keys replaced, and an error names the file that has the key."""
    text = SMALL.partition("[schedule]")[0].replace("d_model = 30", "d_model = 32")
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text("training.max_steps = 50\n")
    config = load_config(TrainConfig, [tmp_path / "a.toml", tmp_path / "b.toml"])
    assert (config.training.max_steps, config.training.batch_size) == (50, 4)
    assert raw_errors(text, "\ntraining.max_steps = 0", tmp_path=tmp_path) == [
        "b.toml:2: training.max_steps: expected an integer >= 1, found 0 (an integer)"
    ]


def test_origins_say_where_each_value_is_from(tmp_path, monkeypatch):
    """`dump_origins` is the same configuration, with a source beside each value."""
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "a.toml").write_text(
        SMALL.partition("[schedule]")[0].replace("d_model = 30", "d_model = 32").replace("a.npy", "$DATA/a.npy")
    )
    snippets = ["samples.prompts = ['a # b', 'c']"]
    layers = read_layers(TrainConfig, tmp_path / "a.toml", {"model.num_heads": "8"}, snippets=snippets)
    config = validate(TrainConfig, layers)
    text = dump_origins(config, layers)
    (tmp_path / "b.toml").write_text(text)
    assert load_config(TrainConfig, tmp_path / "b.toml") == config
    lines = text.splitlines()
    for line in (
        "model.d_model = 32  # a.toml:4",
        "model.num_heads = 8  # command line",
        "# model.d_ff: none  # default",
        'data.train = "/data/a.npy"  # a.toml:8; environment: DATA',
        'samples.prompts = [ "a # b", "c", ]  # --toml',
    ):
        assert line in lines


def test_origins_hold_a_list_of_tables():
    """A table of a list is written inline, so that each key is one line."""
    layers = read_layers(MakeDataConfig, SHIPPED / "make_data.toml", {"input": [], "sources": ["[{input = ['a']}]"]})
    text = dump_origins(validate(MakeDataConfig, layers), layers)
    assert [table["input"] for table in tomllib.loads(text)["sources"]] == [["a"]]


def test_a_file_for_another_command_is_named(tmp_path):
    """One line says whose file it is, and what this command does not know of it."""
    lines = raw_errors((SHIPPED / "export.toml").read_text(), tmp_path=tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith("a.toml: expected a file for transformerlm-train, found one for transformerlm-export (")
    lines = raw_errors(TRAIN.read_text(), tmp_path=tmp_path, schema=InferConfig)
    assert len(lines) == 1
    assert lines[0].startswith("a.toml: expected a file for transformerlm-infer, found one for transformerlm-train (")
    assert lines[0].endswith("); its run is given as --checkpoint runs/first")


@pytest.mark.parametrize(
    ("key", "value", "end"),
    [
        ("training.max_steps", "1e4", "found 10000.0 (a float); write 10000"),
        ("training.max_steps", '"10"', 'found "10" (a string); write 10'),
        ("training.max_steps", "1e-3", "found 0.001 (a float)"),
        ("training.max_steps", '"ten"', 'found "ten" (a string)'),
        ("training.max_steps", '"1e999"', 'found "1e999" (a string)'),
        ("training.max_steps", "true", "found true"),
        ("training.micro_batch_size", "4.0", "found 4.0 (a float); write 4"),
        ("schedule.warmup_steps", '"5"', 'found "5" (a string); write 5'),
        ("optimizer.learning_rate", '"3e-3"', 'found "3e-3" (a string); write 3e-3'),
        ("optimizer.learning_rate", "nan", "found nan (a float)"),
        ("optimizer.learning_rate", '"nan"', 'found "nan" (a string)'),
    ],
)
def test_a_number_of_another_type_is_told_how_it_is_written(key, value, end):
    """Where the number itself is right, the error shows it as it has to be written."""
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, TRAIN, snippets=[f"{key} = {value}"])
    (line,) = caught.value.lines
    assert line.endswith(end)


@pytest.mark.parametrize("text", ["C:\\\\temp", "C:\\\\new", "D:\\Data", "C:\\users"])
def test_a_windows_path_in_double_quotes_is_recognised(text, tmp_path):
    """Whether TOML takes the backslash for an escape or not, the refusal says how such a path is written."""
    text = SMALL.replace("a.npy", text.replace("\\\\", "\\")).partition("[schedule]")[0].replace("30", "32")
    lines = raw_errors(text, tmp_path=tmp_path)
    assert len(lines) == 1
    assert r"a Windows path is written 'C:\data' (single quotes) or C:/data" in lines[0]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2m", 120), ("1.5h", 5400), ("1d", 86400)])
def test_duration(text, seconds):
    """A duration is a number and a unit."""
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "0s", "-1s", "1e3s", "2 m", "nan s", "9" * 20 + "s"])
def test_bad_duration(text):
    """A duration without a unit, or not positive, is refused."""
    with pytest.raises(ValueError, match="expected a duration"):
        duration_seconds(text)


def test_tokenizer_vocab_size_holds_bytes_and_specials():
    """A vocabulary smaller than the bytes and special tokens is refused with both numbers."""
    with pytest.raises(ConfigError, match=r"vocab_size \(256\) is below 256 bytes \+ 1 special tokens"):
        load_config(TrainTokenizerConfig, SHIPPED / "train_tokenizer.toml", {"tokenizer.vocab_size": "256"})


def test_valid_goes_with_valid_fraction():
    """A validation file without a fraction, and outputs that collide, are refused."""
    with pytest.raises(ConfigError, match="valid and valid_fraction go together"):
        load_config(MakeDataConfig, SHIPPED / "make_data.toml", {"valid_fraction": "0"})
    with pytest.raises(ConfigError, match="same file"):
        load_config(MakeDataConfig, SHIPPED / "make_data.toml", {"valid": "data/train.npy"})


def test_config_room_is_light():
    """The config room imports neither torch nor numpy nor wandb."""
    import subprocess
    import sys

    code = "import sys, config.train, config.infer, cli.utils; print({'torch', 'numpy', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_default_holds_beside_other_keys_of_its_table(tmp_path):
    """`samples.sampling.max_new_tokens` is 64 where the file sets another key of that table, as the reference says."""
    config = load_config(PlanConfig, SHIPPED / "plan.toml", {"samples.sampling.temperature": "0.5"})
    assert config.samples.sampling.max_new_tokens == 64


def test_a_list_that_is_too_long_is_told_its_limit():
    """The message says how many items there may be, and how many there are."""
    with pytest.raises(ConfigError, match="expected a list of at most 2 paths, found a list of 3"):
        load_config(EvalConfig, None, {"input": ["a"], "compare": ["a", "b", "c"]})


def test_settings_under_dotted_keys_become_tables(tmp_path):
    """Paths are text, tables are made, and what is written is read as it was."""
    text = dump_settings({"runs_dir": tmp_path, "model.d_model": 8, "samples.sampling.top_p": 0.5, "model.norm": "x"})
    tables = {"model": {"d_model": 8, "norm": "x"}, "samples": {"sampling": {"top_p": 0.5}}}
    assert tomllib.loads(text) == {"runs_dir": str(tmp_path), **tables}
