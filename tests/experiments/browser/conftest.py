"""The real Chromium of the page's tests, for reports, which are opened as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser.conftest import browser, new_page, seen  # noqa: F401 (fixtures)
from transformerlm.experiments.history import read_history
from transformerlm.experiments.report import write_report

READY = "#charts figure:visible canvas"


@pytest.fixture
def open_report(tmp_path: Path, new_page: Callable[..., Any]) -> Callable[..., Any]:  # noqa: F811 (the fixture)
    """Give a function that reports on directories of runs and opens that."""

    def open_it(*runs: Path, ready: str = READY, **options: Any) -> Any:
        output = tmp_path / "report.html"
        write_report([read_history(run) for run in runs], output)
        page = new_page(output.as_uri(), **options)
        page.evaluate(
            "document.addEventListener('securitypolicyviolation', event => console.log(event.violatedDirective))"
        )
        page.wait_for_selector(ready)
        return page

    return open_it
