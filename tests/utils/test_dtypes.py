"""The dtype policy."""

from __future__ import annotations

import pytest
import torch

from transformerlm.utils import dtypes
from transformerlm.utils.dtypes import autocast, cast_for_matmul, parse_precision, resolve_precision, set_tf32, upcast


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_explicit_precision_is_taken_as_it_is(name: str, device: str) -> None:
    """An explicit precision is used on any device, whatever the device can do."""
    assert resolve_precision(name, device) == name


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_asks_the_processor(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    """ "auto" is bf16 if the processor multiplies it, and fp32 otherwise."""
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bf16", lambda: supported)
    assert resolve_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_auto_on_cuda_asks_the_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    """Devices of compute capability 8 and above have bf16 units."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda", 1)) == expected


def test_auto_on_mps_is_fp32() -> None:
    """Apple's devices stay in fp32."""
    assert resolve_precision("auto", "mps") == "fp32"


def test_probe_survives_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes are private to torch: if they are absent, the answer is no."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert resolve_precision("auto", "cpu") == "fp32"


def test_unknown_precision_is_refused() -> None:
    """The error lists the choices."""
    with pytest.raises(ValueError, match="one of fp32, bf16, auto, got 'fp16'"):
        parse_precision("fp16")


def test_autocast_multiplies_in_bf16_only_when_asked() -> None:
    """fp32 is no context at all; bf16 makes products, and nothing else, bfloat16."""
    x = torch.randn(3, 3)
    with autocast("cpu", "fp32"):
        assert (x @ x).dtype == torch.float32
    with autocast(torch.device("cpu"), "bf16"):
        assert (x @ x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32


def test_upcast_widens_halves_and_copies_nothing_else() -> None:
    """bfloat16 and fp16 become fp32; fp32 and fp64 are returned as they are."""
    for dtype in (torch.bfloat16, torch.float16):
        assert upcast(torch.zeros(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, dtype=dtype)
        assert upcast(x) is x


def test_cast_for_matmul_does_what_autocast_would() -> None:
    """Without autocast the tensor is returned; with it, it gets autocast's dtype, except integers."""
    x, ids = torch.randn(2), torch.zeros(2, dtype=torch.int64)
    assert cast_for_matmul(x) is x
    with autocast("cpu", "bf16"):
        assert cast_for_matmul(x).dtype == torch.bfloat16
        assert cast_for_matmul(ids) is ids


def test_tf32_is_for_cuda_and_follows_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the products of fp32 matrices are rounded only if asked; other devices are not changed."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    set_tf32(True, "cpu")
    assert asked == []
    set_tf32(True, "cuda")
    set_tf32(False, torch.device("cuda:0"))
    assert asked == ["high", "highest"]


@pytest.mark.gpu
def test_tf32_rounds_products_on_cuda() -> None:
    """With TF32 a product of fp32 matrices keeps about 10 bits, without it all of them; compiled functions run, too."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    a = torch.rand(512, 512, device="cuda")
    exact = (a.double() @ a.double()).float()
    errors = []
    for allowed in (True, False):
        set_tf32(allowed, "cuda")
        torch.compiler.reset()
        assert torch.compile(lambda x: x @ x)(a).shape == a.shape
        errors.append(float((a @ a - exact).abs().max() / exact.abs().max()))
    assert errors[0] > 10 * errors[1]
