"""Settings that say something about a run are told from those that do not."""

from __future__ import annotations

import tomllib

from config.io import SHIPPED, dump_toml, load_config
from config.train import TrainConfig
from transformerlm.experiments.run_directories import config_of
from transformerlm.experiments.settings import batches_of, changed, defaults, has_effect, law_of


def test_the_defaults_are_those_of_training(tmp_path):
    """A configuration that sets nothing but what is required differs from them in what is required only."""
    required = {
        "model": {"vocab_size": 300, "context_length": 16, "d_model": 32, "num_layers": 1, "num_heads": 4},
        "data": {"train": "a.npy", "tokenizer": "t"},
        "training": {"max_steps": 10, "batch_size": 4},
    }
    (tmp_path / "config.toml").write_text(dump_toml(TrainConfig.model_validate(required)))
    config = config_of(tmp_path)
    names = {f"{section}.{key}" for section, keys in required.items() for key in keys}
    assert set(changed(config)) == names
    usual = defaults()
    assert (usual["samples.sampling.max_new_tokens"], usual["model.num_kv_heads"], usual["runs_dir"]) == (
        64,
        None,
        "runs",
    )
    assert not [key for key in usual if key.startswith("model.rope_scaling")]  # a table that may be absent


def test_a_table_that_may_be_absent_is_a_difference(tmp_path):
    """Its defaults are no defaults of a run without it."""
    overrides = {"model.rope_scaling.factor": "8.0"}
    (tmp_path / "config.toml").write_text(dump_toml(load_config(TrainConfig, SHIPPED / "train.toml", overrides)))
    assert changed(config_of(tmp_path))["model.rope_scaling.factor"] == 8.0


def test_the_law_of_a_run_is_what_changes_what_it_learns():
    """Not its seed, name, place, samples and checkpoints; a key that an older version did not know has its default."""
    config = {"model.d_model": 8, "training.seed": 3, "logging.run_name": "a", "samples.interval": 7, "runs_dir": "x"}
    assert law_of(config) == law_of({"model.d_model": 8, "model.qk_norm": False}) == {"model.d_model": 8}
    assert law_of(config) != law_of({"model.d_model": 8, "model.qk_norm": True})
    keys = tomllib.loads((SHIPPED / "train.toml").read_text())["optimizer"]
    assert all(has_effect(f"optimizer.{key}") for key in keys)
    assert has_effect("checkpoint.init_from")


def test_batches_are_equal_if_all_they_follow_from_is():
    """Seed, size, context, order and data; the path of the data counts only where their fingerprint is not known."""
    config = {"training.seed": 1, "training.batch_size": 4, "model.context_length": 8, "data.train": "a.npy"}
    assert batches_of(config) == batches_of(config | {"data.order": "draw", "model.d_model": 9})
    assert batches_of(config, "abc") == batches_of(config | {"data.train": "b.npy"}, "abc")
    for key, value in {"training.seed": 2, "training.batch_size": 5, "data.order": "epoch", "data.train": "b"}.items():
        assert batches_of(config) != batches_of(config | {key: value})
    assert batches_of({}) is None
