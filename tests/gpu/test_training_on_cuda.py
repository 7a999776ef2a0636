"""Training on a CUDA device: the same numbers as on a CPU, no step made that must not be, and no more memory than said.

Each test is short, for a device is often rented by the minute: `python -m benchmarking.gpu_suite` runs them first.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cli.train import train
from config.io import dump_toml
from tests.training.tiny_run import TinyFiles, step_lines, tiny_config, write_tiny_files
from transformerlm.models.attention import attend
from transformerlm.models.dropout import dropped
from transformerlm.models.functional import gated_silu, rms_norm
from transformerlm.models.layers import Embedding
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.data import get_batch
from transformerlm.training.fast.linear_cross_entropy import training_loss
from transformerlm.training.loop import batch_loss, evaluate, train_step
from transformerlm.training.muon import Muon, muon_groups
from transformerlm.training.optim import SGD, AdamW, clip_grad_norm, parameter_groups
from transformerlm.training.prefetch import Prefetcher
from transformerlm.utils.dtypes import autocast
from transformerlm.utils.row_blocks import logits_at_once

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SIZES = {"vocab_size": 257, "context_length": 32, "d_model": 64, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


def make_model(device: str, **changes: Any) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(**{**SIZES, **changes}).to(device)


def make_batch(device: str, *, batch_size: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(257, (batch_size, 33), generator=torch.Generator().manual_seed(1)).to(device)
    return ids[:, :-1], ids[:, 1:]


def step_of(model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], precision: Any = "fp32") -> Any:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "max_grad_norm": 1.0}
    return train_step(model, optimizer, [batch], autocast=partial(autocast, DEVICE, precision), **settings)


def test_embedding_gradient_adds_up_repeated_ids() -> None:
    """Of 20,000 ids nearly all are one of three: their gradients are the sums, as fp64 on a CPU has them."""
    ids = torch.randint(3, (20_000,))
    ids[::100] = 9
    grad = torch.randn(20_000, 16)
    embedding = Embedding(10, 16, device=DEVICE)
    embedding(ids.to(DEVICE)).backward(grad.to(DEVICE))
    assert embedding.weight.grad is not None
    expected = torch.zeros(10, 16, dtype=torch.float64).index_add(0, ids, grad.double())
    torch.testing.assert_close(embedding.weight.grad.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_an_update_is_the_cpus(name: str) -> None:
    """Three steps with the same gradients end at the same weights, whichever kernels cover them."""
    found = []
    for device in ("cpu", DEVICE):
        model = make_model(device)
        groups: Any = (
            muon_groups(model, weight_decay=0.1) if name == "muon" else parameter_groups(model, weight_decay=0.1)
        )
        made = {"adamw": AdamW, "sgd": partial(SGD, momentum=0.9), "muon": Muon}[name]
        optimizer = made(groups, lr=1e-3)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
        found.append([parameter.detach().cpu() for parameter in model.parameters()])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_gradients_are_the_cpus(precision: Any) -> None:
    """The same weights and batch: loss and gradient norm of ten steps, bf16 within its rounding."""
    pairs = []
    for device, kind in (("cpu", "fp32"), (DEVICE, precision)):
        model = make_model(device)
        optimizer, batch = AdamW(parameter_groups(model, weight_decay=0.1)), make_batch(device)
        settings: dict[str, Any] = {"learning_rate": 1e-3, "max_grad_norm": 1.0}
        context = partial(autocast, device, kind)
        results = [train_step(model, optimizer, [batch], autocast=context, **settings) for _ in range(10)]
        pairs.append(torch.tensor([[result.loss, result.grad_norm] for result in results]))
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    torch.testing.assert_close(pairs[1], pairs[0], rtol=tolerance, atol=tolerance)


def test_training_loss_never_holds_all_logits() -> None:
    """With 16,384 tokens and 50,304 ids its peak stays below one fp32 copy of the logits; the numbers are torch's."""
    hidden = torch.randn(16_384, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_304, 128, device=DEVICE).mul_(0.05).requires_grad_()
    targets = torch.randint(50_304, (16_384,), device=DEVICE)
    assert hidden.shape[0] * weight.shape[0] > 2 * logits_at_once("cuda"), "the case is large enough to be cut"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entropy, loss = training_loss(hidden, weight, targets)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 4 * hidden.shape[0] * weight.shape[0]
    some = slice(0, 512)
    expected = F.cross_entropy(hidden[some].float() @ weight.T, targets[some])
    found, _ = training_loss(hidden[some], weight, targets[some])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert entropy.isfinite()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_not_finite_is_not_made(compiled: bool) -> None:
    """A weight that is infinite spoils the loss: weights and states stay; mended, the next step is made."""
    model = make_model(DEVICE)
    forward = torch.compile(model) if compiled else model
    optimizer, batch = AdamW(parameter_groups(model, weight_decay=0.1)), make_batch(DEVICE)
    assert step_of(forward, optimizer, batch, "bf16").made
    with torch.no_grad():
        kept = model.layers[0].ffn.w1.weight[0, 0].clone()
        model.layers[0].ffn.w1.weight[0, 0] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not step_of(forward, optimizer, batch, "bf16").made
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.layers[0].ffn.w1.weight[0, 0] = kept
    assert step_of(forward, optimizer, batch, "bf16").made


def test_the_device_decides_from_the_second_step_on() -> None:
    """AdamW's kernel takes the step, and its numbers are those of the operators."""
    pytest.importorskip("triton", reason="no Triton for this system")
    models = [make_model(DEVICE), make_model(DEVICE)]
    ours, plain = [AdamW(parameter_groups(model, weight_decay=0.1)) for model in models]
    plain.can_step_where = lambda: False  # type: ignore[method-assign]
    for number in range(4):
        steps = [step_of(m, o, make_batch(DEVICE)) for m, o in zip(models, (ours, plain), strict=True)]
        assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-4)
        assert ours.can_step_where(), f"after step {number + 1} there are moments"
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_beside_a_compiled_model() -> None:
    """Validating the model itself between compiled steps compiles nothing, and gives the loss that a CPU gives."""
    model = make_model(DEVICE)
    optimizer, batch = AdamW(parameter_groups(model, weight_decay=0.1)), make_batch(DEVICE)
    forward, lengths = torch.compile(model), torch.ones(257, dtype=torch.int64)
    step_of(forward, optimizer, batch)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batches = [make_batch(DEVICE), make_batch(DEVICE, batch_size=3)]
    settings: dict[str, Any] = {"autocast": partial(autocast, DEVICE, "fp32")}
    found = evaluate(model, batches, token_bytes=lengths.to(DEVICE), **settings)
    step_of(forward, optimizer, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    step_of(forward, optimizer, batch)
    assert model.training
    again = evaluate(model, batches, token_bytes=lengths.to(DEVICE), **settings)
    on_cpu = make_model("cpu")
    on_cpu.load_state_dict(model.state_dict())
    moved = [(inputs.cpu(), targets.cpu()) for inputs, targets in batches]
    expected = evaluate(on_cpu, moved, token_bytes=lengths, autocast=partial(autocast, "cpu", "fp32"))
    assert again.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.loss != again.loss


def test_recomputed_activations_give_the_same_gradients_for_less_memory() -> None:
    """`activation_checkpointing` changes the peak alone."""
    peaks, grads = [], []
    for recompute in (False, True):
        sizes = {"context_length": 256, "d_model": 128, "num_layers": 8, "activation_checkpointing": recompute}
        model = make_model(DEVICE, **sizes)
        ids = torch.randint(257, (16, 257), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        torch.cuda.reset_peak_memory_stats()
        _, loss = training_loss(model(ids[:, :-1], head=False), model.head_weight, ids[:, 1:])
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        del model, loss
    assert peaks[1] < 0.7 * peaks[0]
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_attention_keeps_no_table_of_scores(num_kv_heads: int, dtype: torch.dtype) -> None:
    """With shared keys, too, of which only one of PyTorch's kernels knows, and that takes no fp32."""
    length = 2048
    shapes = [(1, 8, length, 32), (1, num_kv_heads, length, 32), (1, num_kv_heads, length, 32)]
    leaves = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(*leaves, is_causal=True, implementation="fused").sum().backward()  # type: ignore[arg-type]
    assert torch.cuda.max_memory_allocated() - before < 8 * length * length * leaves[0].element_size()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_attention_is_the_written_out_one(num_kv_heads: int, dtype: torch.dtype) -> None:
    """Causal, with shared keys, with its gradients."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    shapes = [(2, 8, 48, 32), (2, num_kv_heads, 48, 32), (2, num_kv_heads, 48, 32)]
    leaves = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]
    results = []
    for implementation in ("reference", "fused"):
        output = attend(*leaves, is_causal=True, implementation=implementation)  # type: ignore[arg-type]
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=10 * tolerance)


def test_norm_and_gate_have_the_gradients_of_their_formulas() -> None:
    """The backward passes written by hand, against autograd's."""
    x, gate, weight = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((7, 64), (7, 64), (64,)))
    formula = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    for ours, plain in ((rms_norm(x, weight, 1e-5), formula), (gated_silu(gate, x), F.silu(gate) * x)):
        torch.testing.assert_close(ours, plain)
        leaves = (x, weight) if plain is formula else (x, gate)
        found, expected = (torch.autograd.grad(each.sin().sum(), leaves) for each in (ours, plain))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batches_made_ahead_are_whole_while_the_device_is_busy() -> None:
    """With seconds of products queued, what the thread has copied is what the step gets."""
    tokens = torch.arange(5000).numpy()
    batch = {"batch_size": 64, "context_length": 128, "seed": 3}
    prefetched = Prefetcher(lambda step: [get_batch(tokens, **batch, step=step, device=DEVICE)])
    a = torch.randn(4096, 4096, device=DEVICE)
    for step in range(1, 20):
        for _ in range(20):
            a @ a
        inputs, targets = prefetched(step)[0]
        expected = get_batch(tokens, **batch, step=step)
        sums = (inputs * 3 + targets).sum()  # on the device's queue, after the products
        assert int(sums) == int((expected[0] * 3 + expected[1]).sum())


def test_a_run_moves_between_cpu_and_cuda(files: TinyFiles, tmp_path: Path) -> None:
    """Begun on a CPU, continued on CUDA, ended on the CPU: the losses of a run that stayed, and a word at each move."""
    settings: dict[str, Any] = {"checkpoint.interval": 0, "schedule.name": "constant"}
    moves = []
    for steps, device in ((4, "cpu"), (8, DEVICE), (12, "cpu")):
        changes = {**settings, "training.max_steps": steps, "training.device": device}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert train(tiny_config(files, tmp_path / "moves", changes)) == 0
        moves.append([str(each.message) for each in caught if "device" in str(each.message)])
    assert not moves[0]
    assert moves[1]
    assert moves[2]
    assert train(tiny_config(files, tmp_path / "stays", settings)) == 0
    lines, expected = (step_lines(tmp_path / name / "run") for name in ("moves", "stays"))
    losses, plain = ([line["metrics.loss"] for line in found] for found in (lines, expected))
    assert losses == pytest.approx(plain, rel=1e-3)


def command(config: Path, *changes: str) -> list[str]:
    return [sys.executable, "-m", "cli.train", "--config", str(config), *changes]


def test_a_signal_saves_a_run_on_cuda(files: TinyFiles, tmp_path: Path) -> None:
    """SIGTERM while the device computes: the step is saved, the exit code is 143, and the run goes on from there."""
    changes = {"training.device": DEVICE, "training.max_steps": 100_000, "logging.backend": "console"}
    config = tmp_path / "train.toml"
    config.write_text(dump_toml(tiny_config(files, tmp_path, {**changes, "training.eval_interval": 0})))
    process = subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if '"metrics.loss"' in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    last = step_lines(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").is_file()


def test_wandb_beside_cuda(files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's process begins after the device is in use, and the run ends as without it."""
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    changes = {"training.device": DEVICE, "logging.backend": "wandb"}
    assert train(tiny_config(files, tmp_path, changes)) == 0
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 13))
    assert list((tmp_path / "wandb").rglob("*.wandb"))


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_drops_what_it_drops_on_a_cpu(compiled: bool) -> None:
    """The masks are those of the CPU, bit for bit, eager or compiled; the losses of a model that drops are near."""
    key = torch.randint(-(2**31), 2**31, (7, 5, 2), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    mask = torch.compile(dropped) if compiled else dropped
    for shape in ((33, 65), (4, 31, 31)):
        found = mask(key[0].to(DEVICE), shape, 0.3)
        assert torch.equal(found.cpu(), dropped(key[0], shape, 0.3))
    drops = {"dropout": {"embedding": 0.1, "attention": 0.2, "residual": 0.1}}
    ids = torch.randint(257, (5, 32), generator=torch.Generator().manual_seed(1))
    models = [make_model(device, **drops).train() for device in ("cpu", DEVICE)]
    losses = [
        batch_loss(model, ids.to(model.device), ids.to(model.device), dropout_keys=key.to(model.device))[0].item()
        for model in models
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
