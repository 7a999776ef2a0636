"""What the kernels of a step are for, judged by what launched them and by their names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from benchmarking.gpu import kernels
from benchmarking.gpu.kernels import HEAD, OTHERS, purpose_of, shares, trace


@pytest.mark.parametrize(
    ("name", "callers", "purpose"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", ["aten::mm"], "products"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", ["aten::mm"], "products"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", ["aten::mm", "_HeadLoss"], HEAD),
        ("triton_red_fused_sub_exp_0", ["_HeadLoss"], "loss"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>",
            ["aten::_flash_attention_forward"],
            "attention",
        ),
        (
            "void at::native::multi_tensor_apply_kernel<...>",
            ["aten::_foreach_lerp_", "Optimizer.step#AdamW.step"],
            "optimizer",
        ),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", ["CompiledFunction"], OTHERS),
        ("_adamw_kernel", [], "optimizer"),
        ("_loss_kernel", [], "loss"),
        ("Memcpy HtoD (Pinned -> Device)", ["aten::copy_"], "copies"),
    ],
)
def test_purpose_of_a_kernel(name: str, callers: list[str], purpose: str) -> None:
    """Names of CUDA kernels as PyTorch 2.11 launches them on Hopper."""
    assert purpose_of(name, callers) == purpose


def device_event(name: str, microseconds: float, *, is_user_annotation: bool = False) -> SimpleNamespace:
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    facts = {"device_type": DeviceType.CUDA, "kernels": [], "time_range": span}
    return SimpleNamespace(name=name, is_user_annotation=is_user_annotation, **facts)


def test_each_kernel_of_the_device_counts_once() -> None:
    """A kernel launched by a call has its callers; one without counts by its name; annotations are not kernels."""
    outer = SimpleNamespace(name="Optimizer.step#AdamW.step", cpu_parent=None)
    launched = [SimpleNamespace(name="k", duration=5.0)]
    call = SimpleNamespace(name="aten::mul", device_type=DeviceType.CPU, kernels=launched, cpu_parent=outer)
    annotation = device_event("Optimizer.step#AdamW.step", 99.0, is_user_annotation=True)
    events = [call, device_event("k", 5.0), device_event("k", 7.0), annotation]
    assert list(kernels._launches(events, on_device=True)) == [
        ("k", ["aten::mul", "Optimizer.step#AdamW.step"], 5.0),
        ("k", [], 7.0),
    ]


def test_a_trace_has_the_products_of_a_step() -> None:
    """On a CPU operators stand for kernels: times are per step, the longest first, and add up to the shares."""
    weight = torch.randn(64, 64)
    found = trace(lambda: torch.mm(weight, weight).exp(), "cpu")
    product = next(kernel for kernel in found if kernel.name == "aten::mm")
    assert (product.purpose, product.calls) == ("products", 1.0)
    times = [kernel.microseconds for kernel in found]
    assert times == sorted(times, reverse=True)
    assert sum(shares(found).values()) == pytest.approx(sum(times))
