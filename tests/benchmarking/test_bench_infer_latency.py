"""The generation benchmark on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarking import bench_infer_latency as bench
from benchmarking.peers.inference import measure_generation, weight_bytes
from benchmarking.peers.llama import build_llama, copy_weights, why_not
from config.bench_infer import BenchInferConfig
from config.errors import ConfigError
from config.io import SHIPPED, dump_json_schema, dump_toml, load_config
from tests.benchmarking.commands import by_quantity, check_line, run_command
from transformerlm.models.transformer import TransformerLM

MODEL = {"vocab_size": 64, "context_length": 32, "d_model": 32, "num_layers": 2, "num_heads": 4}
CANDIDATES = ("transformerlm", "huggingface", "nanochat_style")
TINY = [f"--model.{name}={value}" for name, value in MODEL.items()]
TINY += ["--threads=1", "--max_new_tokens=8", "--prompt_length=[4, 9]", "--measure.warmup=1", "--measure.repeats=2"]


def test_shipped_toml_loads_and_names_its_schema(tmp_path: Path) -> None:
    """The shipped TOML is valid, its printed form parses back to an equal object, and its schema is the current one."""
    config = load_config(BenchInferConfig, SHIPPED / "bench_infer.toml")
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load_config(BenchInferConfig, tmp_path / "again.toml") == config
    assert (SHIPPED / "bench_infer.toml").read_text().startswith("#:schema bench_infer.schema.json\n")
    assert (SHIPPED / "bench_infer.schema.json").read_text() == dump_json_schema(BenchInferConfig) + "\n"


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
def test_lines_of_a_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Each candidate has a line for each quantity, batch size and prompt length, and generates the same ids."""
    pytest.importorskip("transformers")
    lines, stderr = run_command(bench.main, [*TINY, "--batch_size=[1, 3]"], capsys)
    for batch_size in (1, 3):
        for prompt_length in (4, 9):
            wanted = {"params.batch_size": batch_size, "params.prompt_length": prompt_length}
            found = by_quantity([line for line in lines if wanted.items() <= line.items()])
            quantities = ("time_to_first_token_ms", "tokens_per_second", "decode_step_ms")
            assert set(found) == {(name, who) for name in quantities for who in CANDIDATES}
            assert all(line["repeats"] == 2 for line in found.values())
            assert all(found["tokens_per_second", who]["ids_equal"] for who in CANDIDATES[1:])
    for line in lines:
        check_line(line)
        assert line["bandwidth_bound_step_ms"] > 0
        assert line["bandwidth_utilisation"] > 0
    assert "fp32, batch 3, prompt of 9 on cpu" in stderr


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    "changes",
    [[], ["--model.num_kv_heads=2", "--model.tie_embeddings=true"], ["--model.qk_norm=true", "--model.d_head=12"]],
)
def test_the_plain_cache_computes_our_model(changes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`nanochat_style` chooses our ids, grouped queries and a tied head too; 8 bits have their own lines."""
    arguments = ["--batch_size=[2]", '--peers=["nanochat_style"]', '--precision=["fp32", "int8"]']
    lines, _ = run_command(bench.main, [*TINY, *changes, *arguments], capsys)
    equal = [line["ids_equal"] for line in lines if "ids_equal" in line and line["params.precision"] == "fp32"]
    assert equal
    assert all(equal)
    assert {line["params.precision"] for line in lines} == {"fp32", "int8"}
    num_bytes = {
        line["candidate"]: line["weight_bytes_per_step"] for line in lines if line["params.precision"] == "int8"
    }
    assert num_bytes["nanochat_style"] == 2 * num_bytes["transformerlm"]  # it stays in bf16


@pytest.mark.usefixtures("small_limits")
def test_a_missing_peer_is_skipped_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without transformers the other numbers come all the same."""
    monkeypatch.setattr(bench, "is_installed", lambda module: False)
    lines, stderr = run_command(bench.main, [*TINY, "--batch_size=[1]"], capsys)
    assert {line["candidate"] for line in lines} == {"transformerlm", "nanochat_style"}
    assert "huggingface is skipped: not installed (pip install transformers)\n" in stderr


@pytest.mark.usefixtures("small_limits")
def test_llama_cpp_generates_our_ids_one_sequence_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    """It reads our GGUF, with a vocabulary that has room for a tokenizer; 8 bits may choose others."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    arguments = ["--model.vocab_size=300", "--batch_size=[1, 2]", '--peers=["llama_cpp"]']
    lines, _ = run_command(bench.main, [*TINY, *arguments, '--precision=["fp32", "int8"]'], capsys)
    theirs = [line for line in lines if line["candidate"] == "llama_cpp"]
    assert {(line["params.precision"], line["params.batch_size"]) for line in theirs} == {("fp32", 1), ("int8", 1)}
    assert all(line["ids_equal"] for line in theirs if line["params.precision"] == "fp32")


def test_llama_cpp_wants_room_for_a_tokenizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary smaller than the bytes has no GGUF; stderr says what it takes."""
    monkeypatch.setattr(bench, "is_installed", lambda module: True)
    assert not bench._is_usable("llama_cpp", TransformerLM(**MODEL))
    assert "llama_cpp is skipped: its vocabulary here has 258 to 65793 ids\n" in capsys.readouterr().err
    assert bench._is_usable("llama_cpp", TransformerLM(**(MODEL | {"vocab_size": 258})))


@pytest.mark.usefixtures("small_limits")
def test_a_model_that_llama_cannot_be_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """An ablation has no peer; stderr says which choice is the reason."""
    lines, stderr = run_command(bench.main, [*TINY, "--batch_size=[1]", "--model.norm_position=post"], capsys)
    assert {line["candidate"] for line in lines} == {"transformerlm"}
    assert "huggingface is skipped: its Llama has no norm_position = 'post'\n" in stderr


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"num_kv_heads": 2, "rope_theta": 500.0},
        {"num_kv_heads": 2, "d_head": 12},
        {"tie_embeddings": True, "d_ff": 48, "norm_eps": 1e-3},
    ],
)
def test_llama_with_our_weights_is_the_same_function(changes: dict) -> None:
    """transformers' Llama gives our logits: heads are reordered, bases, epsilons and ties carried over."""
    pytest.importorskip("transformers")
    model = TransformerLM(**MODEL, **changes).eval()
    llama = build_llama(model.hparams()).eval()
    copy_weights(llama, model.state_dict(), model.hparams())
    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        # Sums of d_model terms in another order: a few ulps of the largest logit.
        torch.testing.assert_close(llama(input_ids=ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_llama_has_not_all_our_choices() -> None:
    """The first choice that neither LLaMA nor Qwen3 has is named."""
    assert why_not(TransformerLM(**MODEL).hparams()) is None
    assert why_not(TransformerLM(**MODEL, position="none").hparams()) == "position = 'none'"
    assert why_not(TransformerLM(**MODEL, qk_norm=True).hparams()) is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_but_an_untied_embedding(tied: bool) -> None:
    """The table that is only looked up does not count; as a head it does. A number has its candidate's own bytes."""
    model = TransformerLM(**MODEL, tie_embeddings=tied)
    numbers = sum(p.numel() for name, p in model.named_parameters() if tied or name != "token_embeddings.weight")
    assert [weight_bytes(model, precision) for precision in ("fp32", "bf16", "int8")] == [
        4 * numbers,
        2 * numbers,
        numbers,
    ]
    theirs = [weight_bytes(model, "int8", candidate) for candidate in ("huggingface", "nanochat_style", "llama_cpp")]
    assert theirs == [2 * numbers, 2 * numbers, round(numbers * 34 / 32)]


def test_a_step_is_what_a_token_more_takes() -> None:
    """From the first token to all, or between two numbers that are given; each number of tokens is timed once."""
    timed: list[int] = []

    def timer(generate: Callable[[], list[list[int]]]) -> float:
        timed.append(len(generate()[0]))
        return {1: 2.0, 5: 12.0, 9: 14.0, 11: 15.0}[timed[-1]]

    def generate(count: int) -> list[list[int]]:
        return [[0] * count]

    expected = {"time_to_first_token_ms": 2000.0, "tokens_per_second": 2 * 9 / 14}
    assert measure_generation(generate, 2, 9, timer) == {**expected, "decode_step_ms": 1500.0}
    assert timed == [1, 9]
    found = measure_generation(generate, 2, 9, timer, step_between=(5, 11))
    assert found == {**expected, "decode_step_ms": 500.0}
    assert timed[2:] == [1, 5, 9, 11]


def test_config_needs_a_model_that_is_long_enough(tmp_path: Path) -> None:
    """Neither model nor checkpoint, or a generation longer than the context, is refused with the numbers."""
    path = tmp_path / "bench_infer.toml"
    path.write_text("max_new_tokens = 4\n")
    with pytest.raises(ConfigError, match=r"expected a \[model\] table or a checkpoint, found neither"):
        load_config(BenchInferConfig, path)
    with pytest.raises(ConfigError, match=r"prompt_length \+ max_new_tokens \(257\) exceeds .* \(256\)"):
        load_config(BenchInferConfig, SHIPPED / "bench_infer.toml", {"max_new_tokens": "193"})
