"""What is wrong with a configuration, all at once: each line has the key, what was expected and what was found."""

from __future__ import annotations

import pytest

from config.errors import ConfigError
from config.eval import EvalConfig
from config.infer import InferConfig
from config.io import SHIPPED, load_config
from config.layers import options_layer
from config.train import TrainConfig
from tests.config.helpers import SMALL, TRAIN, errors_of, raw_errors


def test_all_errors_at_once(tmp_path):
    """A file with many mistakes gets one line for each, which names the key and the fix."""
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
    """A key as nanoGPT spells it is answered with our name for it."""
    lines = errors_of(TRAIN.read_text().replace("[training]", f"[training]\n{key} = 1"), tmp_path)
    assert len(lines) == 1
    assert "did you mean" in lines[0]


def test_a_relation_broken_by_the_command_line_names_it(tmp_path):
    """The file by itself is right, so the error names the option."""
    lines = errors_of(TRAIN.read_text(), tmp_path, overrides={"model.num_heads": "3"})
    assert lines == ["train.toml with --model.num_heads: model: d_model (256) is not divisible by num_heads (3)"]


def test_an_error_names_its_line(tmp_path):
    """Each error has the line of its key, or of its table for a missing key, whatever strings look like."""
    text = SMALL.replace('tokenizer = "t"\n', "")
    lines = [line.split(" ")[0] + line.split(" ")[1].rstrip(":") for line in raw_errors(text, tmp_path=tmp_path)]
    assert lines == [
        "a.toml:4:model",
        "a.toml:7:data.tokenizer",
        "a.toml:22:logging.run_name",
        "a.toml:23:logging.dataset",
    ]


def test_relations_of_two_sections_are_told_together(tmp_path):
    """A section with an error of its own does not hide that two others contradict each other."""
    text = SMALL.partition("[logging]")[0]
    assert raw_errors(text, tmp_path=tmp_path) == [
        "a.toml:4: model: d_model (30) is not divisible by num_heads (4)",
        "a.toml:14: schedule.warmup_steps (20) exceeds training.max_steps (10); lower it, or give a share of the run, "
        'such as schedule.warmup_steps = "5%"',
    ]


def test_a_file_for_another_command_is_named(tmp_path):
    """One line says which command the file is for, and which of its keys this command does not know."""
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
    """If the number itself is right, the error shows how to write it."""
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, TRAIN, snippets=[f"{key} = {value}"])
    (line,) = caught.value.lines
    assert line.endswith(end)


@pytest.mark.parametrize(("text", "number"), [(".5", 0.5), ("-.5e-1", -0.05), ("1.", 1.0), ("2.e-4", 2e-4)])
def test_a_number_may_be_written_as_python_writes_it(text, number):
    """On the command line, where TOML has no say."""
    layer = options_layer(TrainConfig, {"optimizer.learning_rate": text})
    assert layer.tree == {"optimizer": {"learning_rate": number}}


def test_a_list_that_is_too_long_is_told_its_limit():
    """The message says how many items there may be, and how many there are."""
    with pytest.raises(ConfigError, match="expected a list of at most 2 paths, found a list of 3"):
        load_config(EvalConfig, None, {"input": ["a"], "compare": ["a", "b", "c"]})
