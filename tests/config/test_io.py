"""TOML files, options and defaults become one configuration, and a configuration becomes TOML."""

from __future__ import annotations

import tomllib

import pytest

from config.bench_infer import BenchInferConfig
from config.errors import ConfigError
from config.io import SHIPPED, dump_origins, dump_settings, dump_toml, load_config, read_layers, read_toml, validate
from config.make_data import MakeDataConfig
from config.train import TrainConfig
from tests.config.helpers import SCHEMAS, SMALL, TRAIN, errors_of, raw_errors


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_toml_loads_and_round_trips(name, tmp_path):
    """Every shipped TOML is valid, and `--print-config` output parses back to an equal object."""
    config = load_config(SCHEMAS[name], SHIPPED / f"{name}.toml")
    path = tmp_path / "again.toml"
    path.write_text(dump_toml(config))
    assert load_config(SCHEMAS[name], path) == config


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_toml_names_its_schema(name):
    """Every shipped TOML has the `#:schema` line with which editors check it, and that schema is current."""
    from config.io import dump_json_schema

    first = (SHIPPED / f"{name}.toml").read_text().splitlines()[0]
    assert first == f"#:schema {name}.schema.json"
    expected = dump_json_schema(SCHEMAS[name]) + "\n"
    assert (SHIPPED / f"{name}.schema.json").read_text() == expected, "run the command with --print-schema again"


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
    """The command line overrides the file, and an error in it names the option."""
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
    """A text key takes its word unchanged, even if it looks like a number."""
    assert load_config(TrainConfig, TRAIN, {"logging.run_name": "2024"}).logging.run_name == "2024"


def test_none_unsets_an_optional_key(tmp_path):
    """The command line can unset an optional key that the file sets."""
    path = tmp_path / "train.toml"
    path.write_text(TRAIN.read_text().replace("[training]", '[training]\nmax_time = "90s"'))
    assert load_config(TrainConfig, path).training.max_time == "90s"
    assert load_config(TrainConfig, path, {"training.max_time": "none"}).training.max_time is None
    with pytest.raises(ConfigError, match=r'--model\.d_model: expected an integer .* found "none"'):
        load_config(TrainConfig, path, {"model.d_model": "none"})


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


# --- several sources ---------------------------------------------------------------------------------------------


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
    """`dump_origins` writes the same configuration, with a source beside each value."""
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


@pytest.mark.parametrize("part", ["a", '"a b"', '"a\\"b"', "'a'"])
@pytest.mark.parametrize("place", ["{} = 1", "[{}]", "[[ {} ]]", "x = {{ y = 1, {} = 1 }}"])
def test_a_key_of_many_parts_is_refused_and_a_text_of_many_dots_is_not(part, place, tmp_path):
    """tomllib would take days for the one; the other is a prompt like any."""
    (path := tmp_path / "a.toml").write_text(place.format(" . ".join([part] * 40)))
    with pytest.raises(ConfigError, match="expected keys of at most 32 parts, found a longer one"):
        read_toml(path)
    prompts = [" ".join(f"{number}." for number in range(40)), ".".join("abc" * 20)]
    path.write_text(dump_settings({"samples.prompts": prompts, "logging.dataset": prompts[1]}))
    assert read_toml(path)["samples"] == {"prompts": prompts}


@pytest.mark.parametrize("text", ["C:\\\\temp", "C:\\\\new", "D:\\Data", "C:\\users"])
def test_a_windows_path_in_double_quotes_is_recognised(text, tmp_path):
    """Whether or not TOML takes the backslash for an escape, the error says how to write such a path."""
    text = SMALL.replace("a.npy", text.replace("\\\\", "\\")).partition("[schedule]")[0].replace("30", "32")
    lines = raw_errors(text, tmp_path=tmp_path)
    assert len(lines) == 1
    assert r"a Windows path is written 'C:\data' (single quotes) or C:/data" in lines[0]


def test_settings_under_dotted_keys_become_tables(tmp_path):
    """Paths become text, dotted keys become tables, and reading gives the same settings."""
    text = dump_settings({"runs_dir": tmp_path, "model.d_model": 8, "samples.sampling.top_p": 0.5, "model.norm": "x"})
    tables = {"model": {"d_model": 8, "norm": "x"}, "samples": {"sampling": {"top_p": 0.5}}}
    assert tomllib.loads(text) == {"runs_dir": str(tmp_path), **tables}
