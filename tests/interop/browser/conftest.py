"""The real Chromium of the page's tests, for models that are opened as files."""

from __future__ import annotations

from tests.serving.browser.conftest import browser, new_page, seen  # noqa: F401 (fixtures)
