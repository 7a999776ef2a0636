"""Memory helpers: no-ops on a CPU, true numbers in bytes."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch

from profiling import memory


@pytest.fixture
def no_cuda(monkeypatch):
    """A machine without a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_everything_is_a_no_op_without_cuda(no_cuda, tmp_path):
    """Without a device no call raises, no file appears, and the answers say that nothing was recorded."""
    assert memory.start_history() is False
    assert memory.start_history(True) is False
    assert memory.dump_snapshot(tmp_path / "deep" / "snapshot.pickle") is False
    assert list(tmp_path.iterdir()) == []
    memory.reset_peaks()
    assert "no CUDA device" in memory.summary()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_process_peak_is_in_bytes_and_never_falls(no_cuda):
    """The process's peak covers an allocation that was touched, and stays after it is freed."""
    block = np.ones(64 * 1024 * 1024, dtype=np.uint8)
    during = memory.peaks()
    assert during.keys() == {"cpu_peak_rss_bytes"}
    assert block.nbytes < during["cpu_peak_rss_bytes"] < 1 << 42
    del block
    # The kernel counts each thread's pages only now and then.
    assert memory.peaks()["cpu_peak_rss_bytes"] >= during["cpu_peak_rss_bytes"] - (8 << 20)


def test_peak_is_that_of_the_place_where_a_model_computes(monkeypatch):
    """On a CPU the peak is the process's, on a CUDA device what torch allocated there; it may be unknown."""
    assert memory.peak_bytes(torch.device("cpu")) == memory.peaks()["cpu_peak_rss_bytes"] > 1 << 20
    stats = {"allocated_bytes": {"all": {"current": 7, "peak": 1001}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats if device.index else {})
    assert [memory.peak_bytes(torch.device("cuda", number)) for number in (0, 1)] == [0, 1001]
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: None)
    assert memory.peak_bytes(torch.device("cpu")) is None


def test_the_peak_that_is_reset_is_the_device_s(monkeypatch):
    """On a machine with GPUs it is that of the GPU where a model computes, and none for a model on the CPU."""
    reset = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    memory.reset_peaks(torch.device("cuda", 1))
    memory.reset_peaks(torch.device("cpu"))
    memory.reset_peaks()
    assert reset == [torch.device("cuda", 1), None]


def test_snapshot_appears_whole(monkeypatch, tmp_path):
    """A snapshot is written beside and renamed, folders included."""
    seen = []

    def pretend(path):
        seen.append(path)
        with open(path, "wb") as file:
            file.write(b"x")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", pretend)
    target = tmp_path / "deep" / "snapshot.pickle"
    assert memory.dump_snapshot(target) is True
    assert seen == [f"{target}.tmp"]
    assert [path.name for path in target.parent.iterdir()] == ["snapshot.pickle"]


@pytest.mark.gpu
def test_peaks_and_snapshot_on_a_device(tmp_path):
    """On a device the peak covers an allocation and falls after a reset; the snapshot can be opened."""
    assert memory.start_history(False) is False
    assert memory.start_history(True) is True
    block = torch.ones(1 << 20, device="cuda")
    assert memory.peaks()["cuda_peak_allocated_bytes"] >= block.nbytes
    assert memory.dump_snapshot(tmp_path / "snapshot.pickle") is True
    assert "segments" in pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    before = memory.peaks()["cuda_peak_allocated_bytes"]
    del block
    memory.reset_peaks()
    assert memory.peaks()["cuda_peak_allocated_bytes"] < before
    assert "allocated" in memory.summary().lower()
    torch.cuda.memory._record_memory_history(enabled=None)  # the next tests have no use for it
