"""NVTX ranges: off by default, chosen by level, and invisible to torch.compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from profiling import nvtx

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pushed(monkeypatch):
    """Names pushed to a fake CUDA device; the cached level is read again before and after the test."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", names.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: names.append("pop"))
    monkeypatch.delenv("TRANSFORMERLM_NVTX", raising=False)
    monkeypatch.delenv("TRANSFORMERLM_NVTX_LEVEL", raising=False)
    monkeypatch.setattr(nvtx, "_threshold", None)
    return names


def _enter_all():
    for level in ("coarse", "fine", "verbose"):
        with nvtx.range(level, level=level):
            pass


@pytest.mark.parametrize(
    ("level", "shown"),
    [(None, ["coarse"]), ("coarse", ["coarse"]), ("fine", ["coarse", "fine"]), ("verbose", list(nvtx.LEVELS))],
)
def test_levels_nest(pushed, monkeypatch, level, shown):
    """Each level shows its own ranges and those of the coarser ones; coarse is the default."""
    monkeypatch.setenv("TRANSFORMERLM_NVTX", "1")
    if level is not None:
        monkeypatch.setenv("TRANSFORMERLM_NVTX_LEVEL", level)
    _enter_all()
    assert [name for name in pushed if name != "pop"] == shown
    assert pushed.count("pop") == len(shown)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_is_one_shared_object(pushed, monkeypatch, value):
    """When off, every range is the same empty context and nothing is pushed."""
    if value is not None:
        monkeypatch.setenv("TRANSFORMERLM_NVTX", value)
    assert nvtx.range("a") is nvtx.range("b", level="verbose")
    _enter_all()
    assert pushed == []


def test_environment_is_read_once(pushed, monkeypatch):
    """A change of the environment after the first range has no effect until it is read again on purpose."""
    with nvtx.range("before"):
        monkeypatch.setenv("TRANSFORMERLM_NVTX", "1")
    with nvtx.range("still off"):
        pass
    assert pushed == []
    assert nvtx.reload() == 1
    with nvtx.range("on"):
        pass
    assert pushed == ["on", "pop"]


def test_range_is_popped_after_an_error(pushed, monkeypatch):
    """An exception inside a range passes through, and the range is closed."""
    monkeypatch.setenv("TRANSFORMERLM_NVTX", "1")
    with pytest.raises(KeyError), nvtx.range("{braces}"):
        raise KeyError("x")
    assert pushed == ["{braces}", "pop"]


def test_no_device_is_off(monkeypatch):
    """Without a CUDA device, switched-on ranges do nothing rather than raise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvtx, "_threshold", None)
    monkeypatch.setenv("TRANSFORMERLM_NVTX", "1")
    monkeypatch.setenv("TRANSFORMERLM_NVTX_LEVEL", "verbose")
    _enter_all()
    assert nvtx.reload() == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TRANSFORMERLM_NVTX", "yes", "TRANSFORMERLM_NVTX: expected 0 or 1, got 'yes'"),
        (
            "TRANSFORMERLM_NVTX_LEVEL",
            "fin",
            "TRANSFORMERLM_NVTX_LEVEL: expected one of coarse, fine, verbose, got 'fin'",
        ),
    ],
)
def test_malformed_environment_is_refused(pushed, monkeypatch, name, value, message):
    """A malformed variable is an error with the choices, not a run without the ranges that it was meant to record."""
    monkeypatch.setenv("TRANSFORMERLM_NVTX", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        nvtx.range("a")


def test_compiled_graphs_stay_whole(pushed, monkeypatch):
    """A range inside a compiled function breaks no graph, pushes nothing, and a changed level recompiles nothing."""
    # torch.compile itself would believe in the fake device.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvtx, "_read_environment", lambda: 1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def double(x):
        with nvtx.range("double"):
            return x * 2

    compiled = torch.compile(double, fullgraph=True, backend=backend)
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    double(torch.ones(2))
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert len(graphs) == 1
    assert pushed == ["double", "pop"]


def test_off_imports_no_torch():
    """Importing the room and entering a range while off leaves torch unimported."""
    program = (
        "import sys; from profiling import nvtx, memory\nwith nvtx.range('a'): pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env={})
    assert done.stdout == "False\n"
