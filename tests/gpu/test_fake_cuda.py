"""What is made for CUDA, run on CUDA tensors that are fake: no operator may meet tensors of two devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.fake_cuda import fake_cuda, on_fake_cuda
from tests.inference.fast.test_decoder import VARIANTS
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.sampling import sample
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.fast.linear_cross_entropy import training_loss
from transformerlm.training.muon import Muon, muon_groups
from transformerlm.training.optim import SGD, AdamW, clip_grad_norm, parameter_groups

SIZES = {"vocab_size": 64, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4}
# Each variant in one precision, and the plain model in all.
PRECISIONS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
MODELS = [({}, dtype) for dtype, int8 in PRECISIONS if not int8]
MODELS += [(changes, MODELS[number % 2][1]) for number, changes in enumerate(VARIANTS[1:])]
DECODERS = [({}, *precision) for precision in PRECISIONS]
DECODERS += [(changes, *PRECISIONS[number % 3]) for number, changes in enumerate(VARIANTS[1:])]


def fake_model(dtype: torch.dtype = torch.float32, **changes: Any) -> TransformerLM:
    model = on_fake_cuda(TransformerLM(**{**SIZES, **changes}, device="meta", dtype=dtype))
    assert isinstance(model, TransformerLM)
    return model


def ids(batch_size: int, seq_len: int) -> torch.Tensor:
    return torch.zeros(batch_size, seq_len, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize(("changes", "dtype"), MODELS, ids=str)
def test_model_and_loss_stay_on_the_device(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Every variant's forward pass and training loss."""
    with fake_cuda():
        model = fake_model(dtype, **changes)
        hidden = model(ids(2, 8), head=False)
        cap = model.settings.logit_soft_cap
        losses = training_loss(hidden, model.head_weight, ids(2, 8), soft_cap=cap, z_loss=1e-4)
        assert {loss.device.type for loss in losses} == {"cuda"}
        assert model(ids(2, 8)).shape == (2, 8, 64)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_optimizers_update_on_the_device(name: str) -> None:
    """Clipping and an update, states included."""
    with fake_cuda():
        model = fake_model(qk_norm=True)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        assert clip_grad_norm(model.parameters(), 1.0).device.type == "cuda"
        if name == "muon":
            optimizer: torch.optim.Optimizer = Muon(muon_groups(model, weight_decay=0.1), 1e-3)
        else:
            groups = parameter_groups(model, weight_decay=0.1)
            optimizer = AdamW(groups) if name == "adamw" else SGD(groups, momentum=0.9)
        for _ in range(2):
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert {value.device.type for value in states if isinstance(value, torch.Tensor)} == {"cuda"}


@pytest.mark.parametrize(("changes", "dtype", "int8"), DECODERS, ids=str)
def test_a_decoder_stays_on_the_device(changes: dict[str, Any], dtype: torch.dtype, int8: bool) -> None:
    """A prompt, single steps, the step that a CUDA graph captures, and a text in parts."""
    with fake_cuda():
        decoder = Decoder(fake_model(dtype, **changes), int8=int8, cuda_graph=False)
        cache = decoder.make_cache(2)
        decoder(ids(2, 5), cache=cache, last_only=True)
        assert decoder(ids(2, 1), cache=cache).shape == (2, 1, 64)
        assert decoder.step_at(ids(2, 1), torch.zeros(2, dtype=torch.int64, device="cuda"), cache).shape == (2, 64)
        even = decoder.make_cache(2)
        for part in (ids(2, 3), ids(2, 4), ids(2, 1)):
            logits = decoder(part, cache=even)
        assert logits.device.type == "cuda"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_k": 9, "top_p": 0.5, "min_p": 0.1},
    ],
    ids=str,
)
def test_a_token_is_chosen_on_the_device(settings: dict[str, Any]) -> None:
    """Each filter, for several rows."""
    with fake_cuda():
        chosen = sample(torch.empty(3, 64, device="cuda"), SamplingParams(**settings), [None])
        assert (chosen.device.type, chosen.shape) == ("cuda", (3,))


def test_devices_that_mix_are_noticed() -> None:
    """The fake tensors are worth something: a sum of both devices is refused."""
    with fake_cuda(), pytest.raises(RuntimeError, match="cpu"):
        torch.zeros(3, device="cuda") + torch.zeros(3)
