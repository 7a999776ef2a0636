"""The files that page and report share: they are safe, and the vendored ones are what their authors published."""

from __future__ import annotations

import hashlib
import re

import pytest

from transformerlm.experiments import page

VENDOR = page.HOME / "vendor"


def test_vendored_files_are_whole():
    """Each file in vendor/ has the checksum of the published one, and its licence is there."""
    sums = dict(reversed(line.split()) for line in (VENDOR / "SHA256SUMS").read_text().splitlines())
    found = {path.name for path in VENDOR.iterdir()} - {"SHA256SUMS"}
    assert set(sums) == found
    assert {name: hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() for name in found} == sums
    assert sums["uPlot-1.6.32.iife.min.js"] == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert "Permission is hereby granted" in (VENDOR / "uPlot-1.6.32.LICENSE").read_text()


@pytest.mark.parametrize(
    "path", sorted([*page.HOME.glob("*.js"), *page.HOME.glob("*.html")]), ids=lambda path: path.name
)
def test_nothing_makes_markup_of_text_or_code_of_strings(path):
    """No file of ours sets markup, evaluates strings, has inline code or names another host."""
    text = path.read_text(encoding="utf-8")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://|\bstyle=|\son\w+="
    )
    assert re.findall(forbidden, text) == []
    assert len(text.splitlines()) <= 500
