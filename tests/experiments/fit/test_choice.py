"""The settings suit text, machine and time: the time is filled, and each choice says why."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib

import pytest

from config.io import dump_settings
from config.train import TrainConfig
from transformerlm.experiments.fit import choice
from transformerlm.experiments.fit.choice import Speed, Text, choose, keep_time

FLOPS = 14_000_000


def text_of(train_tokens=1_000_000):
    """Return the facts of a text."""
    valid = max(100, train_tokens // 19)
    return Text(
        4 * train_tokens, train_tokens, valid, 4 * valid, vocab_size=2000, gzip_bits_per_byte=3.0, share_seen=0.05
    )


def speed_of(tokens_per_second, *, validation=3.0):
    """Return the speed of a machine that validates so many times faster than it trains."""
    return Speed(FLOPS, 1 / tokens_per_second, 1 / (validation * tokens_per_second))


def plan(seconds, *, tokens_per_second, train_tokens=1_000_000):
    """Return the plan for a text, a machine and a time, of which a tenth is for the probe."""
    speed = speed_of(tokens_per_second)
    return choose(text_of(train_tokens), speed, seconds=seconds, probe_seconds=seconds / 10)


def flops_of(found):
    """Return what a token of the planned model costs."""
    shape = tuple(found.settings[f"model.{key}"].value for key in ("d_model", "num_layers", "num_heads"))
    sizes = {key: found.settings[f"model.{key}"].value for key in ("vocab_size", "context_length")}
    return choice._costs(shape, **sizes)[0]


@pytest.mark.parametrize("tokens_per_second", [10.0, 500.0, 8_000.0, 60_000.0, 2_000_000.0])
@pytest.mark.parametrize("seconds", [1.0, 10.0, 90.0, 3600.0, 36_000.0])
def test_steps_fill_the_time_and_validations_take_a_tenth_at_most(seconds, tokens_per_second):
    """The steps fill the time or read the text often enough, and validations and the probe take little of it."""
    found = plan(seconds, tokens_per_second=tokens_per_second)
    slower = flops_of(found) / FLOPS
    step = found.tokens_per_step * slower / tokens_per_second
    if found.steps > 3:
        filled, read = found.steps * step, found.passes
        if read < choice.MAX_PASSES - 0.01:
            assert abs(filled - (1 - choice.VALIDATION_SHARE) * seconds) <= step
        assert filled <= (1 - choice.VALIDATION_SHARE) * seconds + step
        assert read < choice.MAX_PASSES + 0.01
        assert found.settings["training.max_steps"].value >= found.steps
    interval, eval_tokens = (found.settings[f"training.eval_{key}"].value for key in ("interval", "tokens"))
    validation = eval_tokens * slower / (3 * tokens_per_second)
    if found.steps // interval > 2:
        assert found.steps // interval * validation < 0.1 * seconds
    if found.probe_steps > choice.MIN_PROBE_STEPS:
        assert found.probe_steps * step + validation < 0.11 * seconds
    assert 1 <= found.probe_steps <= max(1, found.steps // 2)
    assert 1 <= interval <= found.steps


def test_more_time_or_a_faster_machine_makes_no_smaller_model():
    """The size grows with what can be trained."""
    by_speed = [plan(90.0, tokens_per_second=speed).parameters for speed in (100.0, 5e3, 2e4, 1e6)]
    assert by_speed == sorted(by_speed)
    assert by_speed[0] < by_speed[-1]
    by_time = [plan(seconds, tokens_per_second=5e3).parameters for seconds in (90.0, 900.0, 9000.0)]
    assert by_time == sorted(by_time)


def test_a_kill_costs_ten_minutes_at_most():
    """Long runs save more often than every third validation, of which there are ten."""
    for seconds in (60.0, 900.0, 36_000.0):
        found = plan(seconds, tokens_per_second=5e3)
        settings = found.settings
        saved = settings["checkpoint.interval"].value
        assert saved * found.seconds_per_step <= 600
        assert saved in (3 * settings["training.eval_interval"].value, int(600 / found.seconds_per_step))


def test_the_rate_falls_with_the_width_and_the_head_counts():
    """Twice the width, half the rate; a text with more ids gets a smaller model."""
    widths = {}
    for seconds in (60.0, 36_000.0):
        settings = plan(seconds, tokens_per_second=5e3).settings
        widths[settings["model.d_model"].value] = settings["optimizer.learning_rate"].value
    assert len(widths) == 2
    small = plan(60.0, tokens_per_second=5e3, train_tokens=20_000)
    rate = small.settings["optimizer.learning_rate"].value * small.settings["model.d_model"].value
    assert rate == pytest.approx(choice.LEARNING_RATE_TIMES_WIDTH * small.tokens_per_step / 2048, rel=0.05)
    assert small.tokens_per_step < 1000
    for width, rate in widths.items():
        assert rate * width == pytest.approx(choice.LEARNING_RATE_TIMES_WIDTH, rel=0.05)
    speed = speed_of(5e3)
    few, many = (
        choose(dataclasses.replace(text_of(), vocab_size=size), speed, seconds=3600, probe_seconds=300)
        for size in (500, 50_000)
    )
    assert few.settings["model.d_model"].value > many.settings["model.d_model"].value


def test_the_time_is_kept_once_the_steps_have_been_timed():
    """Steps that take twice as long are half as many, and everything that counts in steps follows."""
    found = plan(900.0, tokens_per_second=5e3)
    again = keep_time(found, seconds_per_step=2 * found.seconds_per_step, seconds=900.0)
    assert again.steps == pytest.approx(found.steps / 2, rel=0.01)
    assert again.passes == pytest.approx(found.passes / 2, rel=0.01)
    for key in ("training.max_steps", "training.eval_interval"):
        assert again.settings[key].value == pytest.approx(found.settings[key].value / 2, rel=0.05)
    assert again.settings["optimizer.learning_rate"] == found.settings["optimizer.learning_rate"]


@pytest.mark.parametrize("train_tokens", [3_000, 100_000, 30_000_000])
@pytest.mark.parametrize("seconds", [1.0, 300.0, 36_000.0])
def test_all_settings_are_valid_and_each_has_a_reason(seconds, train_tokens):
    """The strict schema of transformerlm-train takes them, and no choice is silent."""
    found = plan(seconds, tokens_per_second=5e3, train_tokens=train_tokens)
    data = {"data.train": "a.npy", "data.valid": "b.npy", "data.tokenizer": "t"}
    config = TrainConfig.model_validate(tomllib.loads(dump_settings({**data, **found.values})))
    assert config.training.max_steps == found.settings["training.max_steps"].value
    assert all(chosen.why and "\n" not in chosen.why for chosen in found.settings.values())
    assert config.model.context_length * choice.MIN_TRAIN_WINDOWS <= max(train_tokens, 16 * 50)


def test_a_text_that_cannot_be_read_in_the_time_is_cut():
    """A slow machine with little time gets a part, whose size follows from both; with time it gets everything."""
    size = 100_000_000
    part = choice.choose_bytes(size, speed_of(1_000.0), 60.0)
    assert choice.MIN_BYTES <= part.value < size / 5
    assert "of 100 MB" in part.why
    assert part.value < choice.choose_bytes(size, speed_of(1_000.0), 600.0).value
    assert choice.choose_bytes(size, speed_of(10_000.0), 36_000.0).value == size
    assert choice.choose_bytes(choice.MIN_BYTES, speed_of(1.0), 1.0).value == choice.MIN_BYTES
    seen = choice.BYTES_PER_TOKEN * plan(60.0, tokens_per_second=1_000.0).steps * 2048
    assert seen < part.value


def test_the_timed_model_is_one_that_the_plan_command_takes():
    """The settings of the timing are whole, for the shortest text and for a long one."""
    for size, shape in itertools.product((20_000, 10**9), choice.TIMED):
        settings = choice.timed_settings(size, 60.0, size=shape)
        assert settings["model.vocab_size"] == choice.choose_vocab_size(size, 60.0).value
        assert settings["calibration_steps"] > 0
        assert settings["model.context_length"] >= choice.MIN_CONTEXT_LENGTH


def test_a_size_with_more_layers_is_timed_where_that_takes_little():
    """On a machine that is fast or for a long run, what a layer takes is measured; else both timed sizes have three."""
    slow, fast = Speed(8e6, 1e-4, 3e-5), Speed(8e6, 2e-6, 6e-7)
    assert choice.second_timed(10**7, 1200.0, slow) == choice.TIMED[1]
    assert choice.second_timed(10**7, 100_000.0, slow) == choice.second_timed(10**7, 300.0, fast) == choice.TIMED[2]
    first, usual, deep = (choice.SIZES[place][1] for place in choice.TIMED)
    assert first == usual < deep


def test_what_any_size_takes_makes_small_models_no_faster():
    """Two sizes that are timed give a line: where half of a token's time is overhead, half the size saves a quarter."""
    large = Speed(20e6, 2e-4, 1e-4).beside(Speed(10e6, 1.5e-4, 1e-4))
    assert large.overhead == pytest.approx(1e-4)
    assert large.ratio(20e6) == 1.0
    assert large.ratio(10e6) == pytest.approx(0.75)
    assert large.tokens_in(3.0, 40e6) == pytest.approx(10_000)
    steep = Speed(20e6, 2e-4, 1e-4).beside(Speed(10e6, 0.5e-4, 1e-4))
    assert (steep.overhead, steep.ratio(10e6)) == (0.0, 0.5)
    flat = Speed(20e6, 2e-4, 1e-4).beside(Speed(10e6, 3e-4, 1e-4))
    assert flat.ratio(10e6) == flat.ratio(40e6) == 1.0
