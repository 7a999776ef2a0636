"""The training benchmark on a tiny model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarking import bench_train as bench
from benchmarking.fresh_process import object_in_fresh_process
from benchmarking.peers import training as train_peers
from benchmarking.peers.plain_gpt import PlainGPT
from config.bench_train import BenchTrainConfig
from config.io import SHIPPED, dump_json_schema, dump_toml, load_config
from tests.benchmarking.commands import by_quantity, check_line, run_command
from transformerlm.models.settings import default_d_ff
from transformerlm.models.transformer import TransformerLM

MODEL = {"vocab_size": 64, "context_length": 8, "d_model": 16, "num_layers": 1, "num_heads": 2}
TINY = [f"--model.{name}={value}" for name, value in MODEL.items()] + ["--batch_size=2", "--threads=1"]


def tiny_case() -> train_peers.TrainCase:
    return train_peers.TrainCase(TransformerLM(**MODEL).hparams(), batch_size=2, threads=1)


def test_shipped_toml_loads_and_names_its_schema(tmp_path: Path) -> None:
    """The shipped TOML is valid, its printed form parses back to an equal object, and its schema is the current one."""
    config = load_config(BenchTrainConfig, SHIPPED / "bench_train.toml")
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load_config(BenchTrainConfig, tmp_path / "again.toml") == config
    assert (SHIPPED / "bench_train.toml").read_text().startswith("#:schema bench_train.schema.json\n")
    assert (SHIPPED / "bench_train.schema.json").read_text() == dump_json_schema(BenchTrainConfig) + "\n"


@pytest.mark.parametrize("option", ["--model.document_mask=true", "--model.dropout.residual=0.1"])
def test_what_its_steps_do_not_do_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any process begins, by the name of the key."""
    with pytest.raises(SystemExit):
        bench.main([*TINY, option])
    assert option[2:].partition("=")[0].removesuffix(".residual") + ": expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits", "no_new_process")
def test_lines_of_a_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Each candidate and precision has a line for each quantity, with the requested rounds and a FLOPs utilisation."""
    argv = [*TINY, '--peers=["nanogpt_style"]', "--measure.warmup=1", "--measure.repeats=3", "--steps_per_round=2"]
    lines, stderr = run_command(bench.main, argv, capsys)
    names = ("transformerlm", "nanogpt_style")
    for precision in ("fp32", "bf16"):
        found = by_quantity([line for line in lines if line["params.precision"] == precision])
        expected = {("tokens_per_second", name): 3 for name in names}
        expected |= {(what, who): 1 for what in ("time_to_first_step_s", "peak_memory_mb") for who in names}
        assert {key: line["repeats"] for key, line in found.items()} == expected
        for name in names:
            assert found["tokens_per_second", name]["flops_utilisation"] > 0
    for line in lines:
        check_line(line)
        assert line["params.parameters"] == TransformerLM(**MODEL).num_parameters()
    assert "fp32 on cpu: transformerlm, nanogpt_style" in stderr


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits", "no_new_process")
def test_ours_runs_with_the_default_allocator_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where our settings of the allocator hold, a peer's line has our ratio without them, too."""
    built: list[bool] = []
    monkeypatch.setattr(train_peers, "keep_freed_memory", lambda device: built.append(True) or True)
    argv = [*TINY, '--peers=["nanogpt_style"]', '--precision=["fp32"]', "--measure.warmup=0", "--measure.repeats=2"]
    lines, stderr = run_command(bench.main, argv, capsys)
    tokens = by_quantity([line for line in lines if line["quantity"] == "tokens_per_second"])
    assert {name for _, name in tokens} == {"transformerlm", "nanogpt_style"}
    assert tokens["tokens_per_second", "nanogpt_style"]["speedup.default_allocator.median"] > 0
    assert len(built) == 1
    assert "with default allocator" in stderr


@pytest.mark.usefixtures("small_limits", "no_new_process")
def test_a_missing_peer_is_skipped_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without transformers our own numbers are still measured."""
    monkeypatch.setattr(train_peers, "is_installed", lambda module: False)
    argv = [
        *TINY,
        '--peers=["huggingface", "litgpt"]',
        '--precision=["fp32"]',
        "--measure.repeats=1",
        "--measure.warmup=0",
    ]
    lines, stderr = run_command(bench.main, argv, capsys)
    assert {line["candidate"] for line in lines} == {"transformerlm"}
    assert "huggingface is not installed: skipped (pip install transformers)\n" in stderr
    assert "litgpt is not installed: skipped (pip install litgpt)\n" in stderr


@pytest.mark.parametrize(
    ("peer", "changes", "choice"),
    [
        ("huggingface", {"num_kv_heads": 1, "tie_embeddings": True, "qk_norm": True, "d_head": 12}, None),
        ("huggingface", {"ffn": "silu"}, "ffn = 'silu'"),
        ("huggingface", {"activation_checkpointing": True}, "activation_checkpointing = True"),
        ("litgpt", {"num_kv_heads": 1}, None),
        ("litgpt", {"ffn": "silu"}, "ffn = 'silu'"),
        ("litgpt", {"tie_embeddings": True}, "tie_embeddings = True"),
        ("nanogpt_style", {}, None),
        ("nanogpt_style", {"num_kv_heads": 1}, "num_kv_heads = 1"),
        ("nanogpt_style", {"d_head": 12}, "d_head = 12"),
        ("nanogpt_style", {"ffn": "silu"}, "ffn = 'silu'"),
    ],
)
def test_a_peer_makes_the_steps_of_our_model_or_none(peer: str, changes: dict, choice: str | None) -> None:
    """The first choice that a peer does not make is named."""
    assert train_peers.why_not(peer, TransformerLM(**MODEL, **changes).hparams()) == choice


@pytest.mark.usefixtures("small_limits", "no_new_process")
def test_a_peer_of_another_architecture_is_skipped_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Our own numbers come alone; the time to the first step is elapsed time, also by the CPU's clock."""
    arguments = ["--model.num_kv_heads=1", '--peers=["nanogpt_style"]', '--precision=["fp32"]', "--measure.clock=cpu"]
    lines, stderr = run_command(bench.main, [*TINY, *arguments, "--measure.repeats=1", "--measure.warmup=0"], capsys)
    assert {line["candidate"] for line in lines} == {"transformerlm"}
    assert "nanogpt_style is skipped: it has no num_kv_heads = 1\n" in stderr
    clocks = {line["quantity"]: line["clock"] for line in lines}
    assert (clocks["time_to_first_step_s"], clocks["tokens_per_second"]) == ("wall", "cpu")


def test_libraries_are_imported_before_the_clock_of_the_first_step_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours has been imported by then, too."""
    events: list[str] = []

    def timed(function: Callable[[], object], **options: object) -> float:
        events.append("clock")
        function()
        return 1.0

    monkeypatch.setattr(train_peers, "timed", timed)
    monkeypatch.setattr(train_peers, "load_library", lambda candidate, hparams: events.append(candidate))
    train_peers.TrainingSteps(tiny_case(), "nanogpt_style", "fp32", False).first()
    assert events == ["nanogpt_style", "clock"]


@pytest.mark.parametrize(("qk_norm", "name"), [(False, "LlamaForCausalLM"), (True, "Qwen3ForCausalLM")])
def test_the_class_of_a_transformers_model_is_imported(
    qk_norm: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library imports a model's file only when somebody asks for its class."""
    asked: list[str] = []

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> object:
            asked.append(name)
            return object()

    monkeypatch.setitem(sys.modules, "transformers", Lazy("transformers"))
    train_peers.load_library("huggingface", TransformerLM(**MODEL, qk_norm=qk_norm).hparams())
    assert asked == ["AutoConfig", "AutoModelForCausalLM", name]


def test_a_candidate_runs_in_a_process_of_its_own() -> None:
    """In its own process the first step takes time and memory, and more steps take more time."""
    with object_in_fresh_process(train_peers.TrainingSteps, tiny_case(), "transformerlm", "fp32", False) as call:
        seconds, peak = call("first")
        assert seconds > 0
        assert peak is None or peak > 10**7
        assert call("seconds", 2) > 0


@pytest.mark.parametrize("candidate", ["transformerlm", "huggingface", "litgpt", "nanogpt_style"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_candidate_learns_its_batch(candidate: str, precision: str) -> None:
    """The steps that are timed are training steps: the loss on their one batch falls."""
    if not train_peers.is_available(candidate):
        pytest.skip(f"needs {train_peers.LIBRARIES[candidate]}")
    step = train_peers.make_step(tiny_case(), candidate, precision=precision, compiled=False)
    losses = [step() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_the_plain_model_has_as_many_numbers_in_its_matrices() -> None:
    """The plain GPT does the same products as ours: only positions and norms differ in size."""
    d_ff = default_d_ff(MODEL["d_model"])
    plain, ours = PlainGPT(**MODEL, d_ff=d_ff), TransformerLM(**MODEL)
    matrices = [sum(p.numel() for p in model.parameters() if p.ndim > 1) for model in (plain, ours)]
    assert matrices[0] - plain.positions.weight.numel() == matrices[1]


def test_the_plain_model_is_causal() -> None:
    """A later token does not change what came before it."""
    model = PlainGPT(**MODEL, d_ff=64).eval()
    ids = torch.randint(64, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    difference = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
    assert torch.all(difference[:5] < 1e-6)
    assert torch.all(difference[5:] > 1e-6)


def test_compiler_cache_is_empty_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that compiles has an empty cache directory, and the user's own one is restored after it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    with bench._empty_compiler_cache(True):
        assert os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == []
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere"
    with bench._empty_compiler_cache(False):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere"
