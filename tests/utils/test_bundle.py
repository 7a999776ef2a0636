"""Modules as one script: the three forms, their order, and what is refused."""

from __future__ import annotations

import re

import pytest

from transformerlm.experiments import page
from transformerlm.utils.bundle import bundled


def test_modules_come_after_those_they_import_and_each_once():
    """A module that two others import is written once, before both."""
    texts = {
        "a.js": 'import { b } from "/static/b.js";\nimport { c } from "/static/c.js";\nb(c);',
        "b.js": 'import { c } from "/static/c.js";\nexport function b() { return c; }',
        "c.js": "export const c = 1;\nexport let d = 2;\nexport class E {}\nexport async function f() {}",
    }
    script = bundled("a.js", texts.__getitem__)
    assert re.findall(r"// --- (\S+) ---", script) == ["c.js", "b.js", "a.js"]
    assert "return { c, d, E, f };" in script
    assert "const { c } = module_c;" in script
    assert not re.search(r"^(import|export)\b", script, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    ['import * as b from "/static/b.js";', 'import { b } from "./b.js";', "export default 1;", "export { b };"],
)
def test_other_forms_are_refused(line):
    """The error names the module, the line and what is there."""
    with pytest.raises(ValueError, match=r"a\.js:2: expected an import or export"):
        bundled("a.js", {"a.js": f"\n{line}"}.__getitem__)


def test_a_circle_is_refused():
    """Modules that import each other have no order."""
    texts = {"a.js": 'import { b } from "/static/b.js";', "b.js": 'import { a } from "/static/a.js";'}
    with pytest.raises(ValueError, match=r"a\.js -> b\.js -> a\.js"):
        bundled("a.js", texts.__getitem__)


def test_the_reports_script_holds_nothing_that_ends_a_script():
    """What is within <script> must not hold its end, nor the beginning of a comment of HTML."""
    script = bundled("report.js", page.read) + page.read(page.UPLOT_JS)
    assert not re.search(r"</script|<!--|<script", script, flags=re.IGNORECASE)
    assert "</style" not in page.read("page.css") + page.read(page.UPLOT_CSS)
