"""Devices by name, and how much memory they have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from transformerlm.utils import device as device_module
from transformerlm.utils import triton_kernels
from transformerlm.utils.device import (
    available_memory_bytes,
    device_memory_bytes,
    resolve_device,
    should_compile,
    synchronize,
    to_host,
)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
def test_auto_without_an_accelerator_is_the_cpu() -> None:
    """The CPU is always available."""
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_auto_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is cuda, mps, cpu."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_device_that_is_not_there_is_refused(name: str) -> None:
    """The error names the device and says what to use instead."""
    with pytest.raises(ValueError, match=f"'{name}' is not available.*use auto or cpu"):
        resolve_device(name)


def test_cuda_number_past_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:2 on a machine with two devices is an error that says how many there are; cuda:1 becomes the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"'cuda:2' is not available, found 2 CUDA device\(s\)"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "meta", "xpu"])
def test_malformed_or_foreign_names_are_refused(name: str) -> None:
    """Only the documented names are devices."""
    with pytest.raises(ValueError, match=f"expected auto, cpu, cuda, cuda:N or mps, got '{name}'"):
        resolve_device(name)


def test_synchronize_on_the_cpu_does_nothing() -> None:
    """There is nothing to wait for."""
    synchronize("cpu")


@pytest.mark.parametrize(("content", "expected"), [("1000\n", 1000), ("max\n", 5000), ("9000\n", 5000)])
def test_memory_is_bounded_by_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, expected: int
) -> None:
    """In a container the limit counts if it is below the machine's RAM; "max" is no limit."""
    limit = tmp_path / "memory.max"
    limit.write_text(content)
    monkeypatch.setattr(device_module, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "absent")))
    monkeypatch.setattr(device_module, "_ram_bytes", lambda: 5000)
    assert device_memory_bytes("cpu") == expected


VERSION_2 = "anon 100\nfile 800\nshmem 50\ninactive_file 500\nactive_file 250\n"
VERSION_1 = "cache 0\ninactive_file 1\nactive_file 2\ntotal_inactive_file 500\ntotal_active_file 250\n"


@pytest.mark.parametrize(
    ("used", "parts", "expected"),
    [
        ("400\n", None, 600),
        ("950\n", "", 50),
        ("1200\n", "", 0),
        ("950\n", VERSION_2, 800),
        ("950\n", VERSION_1, 800),
        ("700\n", VERSION_2, 1000),  # the files are not read at one moment
    ],
)
def test_what_a_control_group_uses_is_not_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used: str, parts: str | None, expected: int
) -> None:
    """The free memory is the smaller of the machine's and the control group's; pages of files are free."""
    for name, text in (("LIMITS", "1000\n"), ("USAGES", used), ("PARTS", parts)):
        if text is not None:
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(device_module, f"_CGROUP_{name}", (str(tmp_path / name),))
    assert available_memory_bytes("cpu") == expected
    monkeypatch.setattr(device_module, "_meminfo_available", lambda: 7)
    assert available_memory_bytes("cpu") == min(7, expected)


def test_free_memory_is_at_most_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system does not say what is free, all memory counts as free."""
    assert 0 < available_memory_bytes("cpu") <= device_memory_bytes("cpu")
    monkeypatch.setattr(device_module, "_meminfo_available", lambda: None)
    monkeypatch.setattr(device_module, "_CGROUP_USAGES", ("/nowhere", "/nowhere"))
    assert available_memory_bytes("cpu") == device_memory_bytes("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 77))
    assert available_memory_bytes("cuda") == 5


def test_a_copy_to_the_host_is_waited_for_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of cuda:1 are whole when its own stream has come so far, whichever device is the current one."""
    recorded = []
    event = SimpleNamespace(record=lambda stream=None: recorded.append(stream), synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    numbers = SimpleNamespace(device=torch.device("cuda", 1), to=lambda *_, **__: torch.tensor([1.0, 2.0]))
    assert to_host(numbers)() == [1.0, 2.0]  # type: ignore[arg-type]
    assert recorded == ["stream of cuda:1"]


def test_memory_of_this_machine_is_plausible() -> None:
    """More than 64 MB and less than a petabyte."""
    assert 2**26 < device_memory_bytes(torch.device("cpu")) < 2**50


def test_memory_of_a_cuda_device_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's total, not the machine's."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=77))
    assert device_memory_bytes("cuda:0") == 77


@pytest.mark.parametrize(
    ("choice", "device", "steps", "expected"),
    [
        (True, "cpu", 1, True),
        (False, "cuda", 10**6, False),
        ("auto", "cuda", 1000, True),
        ("auto", "cuda", 999, False),
        ("auto", "cpu", 10**6, False),
    ],
)
def test_compiling_is_a_choice_or_pays(
    choice: bool | str, device: str, steps: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice is kept; "auto" compiles long runs on CUDA."""
    monkeypatch.setattr(triton_kernels, "kernels_work", lambda: True)
    assert should_compile(choice, torch.device(device), steps) is expected


def test_nothing_is_compiled_by_itself_where_no_kernel_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler, or on an old card, "auto" trains uncompiled; who asks for it gets torch's error."""
    monkeypatch.setattr(triton_kernels, "kernels_work", lambda: False)
    assert not should_compile("auto", torch.device("cuda"), 10**6)
    assert should_compile(True, torch.device("cuda"), 10**6)
