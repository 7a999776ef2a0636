"""Loops that numba compiles: their options arrive, and what is kept on disk is of the folder's files as they are."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from transformerlm.utils.compiled import compiled

pytest.importorskip("numba")


def load(folder, name):
    """Return a module of a file, known to Python by its name."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_options_arrive_and_the_kept_code_is_of_all_files(tmp_path, monkeypatch):
    """A loop gives what Python gives; the stamp of its code has each file of its folder, so a change of any counts."""
    monkeypatch.setitem(sys.modules, "loops_of_a_test", None)
    (tmp_path / "loops_of_a_test.py").write_text("def half(number):\n    return number / 2\n")
    (tmp_path / "other.py").write_text("")
    loop = compiled(load(tmp_path, "loops_of_a_test").half, nogil=True, error_model="numpy")
    assert loop(3) == 1.5
    assert loop.targetoptions["nogil"] is True
    assert loop.targetoptions["error_model"] == "numpy"
    assert [name for name, _, _ in loop._cache._cache_file._source_stamp] == ["loops_of_a_test.py", "other.py"]


def test_without_a_place_to_keep_code_loops_are_compiled_all_the_same(monkeypatch):
    """numba refuses to keep code where it can write to no folder."""
    import numba

    real = numba.njit

    def njit(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled(_plus_one)(2) == 3


def _plus_one(number):
    return number + 1
