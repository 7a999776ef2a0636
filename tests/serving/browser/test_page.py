"""What all tabs share, in a real browser: colours, width, the key, and the other tabs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.browser.conftest import Site, serving_fake, wait_until, wait_until_drawn
from tests.serving.browser.runs_of_lines import HOSTILE, append_line, lines_of, step_line, write_lines, write_run

pytestmark = pytest.mark.browser
TABS = ("write", "tokens", "runs", "server")
KEY = "a-key-of-the-page"


@contextmanager
def own_run(site: Site, name: str, **lines: Any) -> Iterator[Path]:
    """Give the directory of a run that is there for one test alone; `lines` are those of `write_run`."""
    home = site.runs_dir / name
    write_run(home, **lines)
    try:
        yield home
    finally:
        shutil.rmtree(home)


def open_runs(page: Any, *names: str) -> None:
    """Open the tab Runs with these runs chosen, and no others."""
    page.click("#tab-runs")
    page.wait_for_selector("#runs-list tr")
    for row in page.locator("#runs-list tr").all():
        box, name = row.locator("input"), row.locator(".name").text_content()
        if box.is_checked() != (name in names):
            box.click()


def test_all_tabs_are_quiet(page, site, seen):
    """No tab asks another host for anything, writes to the console, or breaks its content policy."""
    page.evaluate("document.addEventListener('securitypolicyviolation', event => console.log(event.violatedDirective))")
    for name in TABS:
        page.click(f"#tab-{name}")
        page.wait_for_selector(f"#{name}:visible")
    page.wait_for_selector("#server-numbers dd:text-is('Ready')")
    page.wait_for_selector("#server-charts figure:visible canvas")
    assert seen.messages == []
    assert {one.url.split("/")[2] for one in seen.requests} == {site.url.split("/")[2]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_shows_everything(site, new_page, scheme):
    """At 360 pixels no tab is wider than the window; light and dark have their own ground."""
    page = new_page(site.url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.wait_for_selector("#served:has-text('step 2')")
    for name in TABS:
        page.click(f"#tab-{name}")
        if name == "runs":
            open_runs(page, "first", "second")
            page.wait_for_selector("#charts figure:visible canvas")
        assert page.evaluate("document.documentElement.scrollWidth") == 360, name
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 300) == (scheme == "dark")


def test_tokens_have_ids_bytes_and_a_count(page, site):
    """Each token of a text has its id and its bytes, in hex alone where it is no whole character."""
    page.click("#tab-tokens")
    page.fill("#tokens-text", "Ada 日")
    found = httpx.post(f"{site.url}/tokenize", json={"prompt": "Ada 日", "add_special_tokens": False}).json()
    page.wait_for_selector("#tokens-numbers dd:text-is('7')")  # bytes
    shown = [one.split("\n") for one in page.locator("#tokens-list li").all_inner_texts()]
    assert [one[1] for one in shown] == [str(one) for one in found["tokens"]]
    assert "".join(one[2].replace(" ", "") for one in shown) == "Ada 日".encode().hex()
    assert shown[-1][0] == "a5"  # the last byte of 日


def test_curves_grow_and_are_never_fetched_again(page, site, seen):
    """A new line appears in the open chart, and so do those of a file that replaces it; what was read stays read."""
    with own_run(site, "growing", steps=10) as home:
        open_runs(page, "growing")
        page.wait_for_selector("#charts figure[aria-label*='growing 3.9 at 10']")
        append_line(home, step_line(11))
        page.wait_for_selector("#charts figure[aria-label*='growing 3.89 at 11']")
        append_line(home, {"event": "rolled_back", "step": 5, "from_step": 11, "loss": 9.0})
        append_line(home, step_line(6))  # made again
        page.wait_for_selector("#charts figure[aria-label*='growing 3.94 at 6']")
        offsets = [int(dict(httpx.URL(one.url).params)["offset"]) for one in seen.of("/api/lines")][-2:]
        assert offsets[0] > 0 or offsets[1] > 0
        write_lines(home, lines_of(8))
        page.wait_for_selector("#charts figure[aria-label*='growing 3.92 at 8']")
    starts = [one.url for one in seen.of("/api/lines") if "run=growing" in one.url and "offset=0" in one.url]
    assert len(starts) == 1


def test_a_tab_that_stays_open_does_not_grow_for_ever(page, site, seen):
    """After very many new lines a run is read from its beginning once more, thinned as its length now asks for."""
    with own_run(site, "endless", steps=10) as home:
        open_runs(page, "endless")
        page.wait_for_selector("#charts figure[aria-label*='endless 3.9 at 10']")
        with (home / "metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps(step_line(step)) + "\n" for step in range(11, 4100))
        page.wait_for_selector("#charts figure[aria-label*=' at 4,099']")
        append_line(home, step_line(4100))
        page.wait_for_selector("#charts figure[aria-label*='endless -37 at 4,100']")
    offsets = [dict(httpx.URL(one.url).params)["offset"] for one in seen.of("/api/lines") if "run=endless" in one.url]
    assert offsets.count("0") == 2


def test_a_run_that_is_removed_leaves_nothing_behind(page, site):
    """Its curves and its configuration go with its row."""
    home, other = site.runs_dir / "removed", site.runs_dir / "other"
    for one in (home, other):
        write_run(one, steps=10)
    open_runs(page, "removed", "other")
    page.wait_for_selector("#charts figure[aria-label*='removed 3.9 at 10']")
    page.wait_for_selector("#config-title:has-text('Differences'), #config-title:has-text('Configurations')")
    shutil.rmtree(home)
    append_line(other, step_line(11))
    page.wait_for_selector("#config-title:has-text('Configuration of other')")
    page.wait_for_selector("#charts figure[aria-label='Loss: other 3.89 at 11, other, validation 3.5 at 10']")
    assert page.locator("#runs-list tr:has-text('removed')").count() == 0
    shutil.rmtree(other)


def test_what_is_selected_stays_while_another_run_trains(page, site):
    """Lines of a run that is not shown draw nothing anew, and words that are the same stay in place."""
    with own_run(site, "training", steps=10) as home, own_run(site, "shown", steps=10) as shown:
        open_runs(page, "shown")
        page.wait_for_selector("#sample-text:has-text('a at 4')")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('#sample-text'))")
        append_line(home, step_line(11))
        page.wait_for_selector("#runs-list tr:has-text('training'):has-text('3.890')")
        append_line(shown, {"event": "checkpoint_saved", "step": 10})
        page.wait_for_selector("#run-events:has-text('saved a checkpoint at step 10')")
        assert page.evaluate("getSelection().toString()") == "a at 4"


def test_runs_do_not_choose_themselves(page, site):
    """The newest run is shown at first; one that begins later is not, when the tab is opened again."""
    page.click("#tab-runs")
    page.wait_for_selector("#runs-list input:checked")
    with own_run(site, "newest", steps=10):
        page.click("#tab-write")
        page.click("#tab-runs")
        page.wait_for_selector("#runs-list tr:has-text('newest')")
        wait_until_drawn(page)
        assert page.locator("#runs-list input:checked").count() == 1


def test_several_runs_their_samples_events_and_differences(page):
    """Two runs share each chart; the slider shows a sample of each time; what differs is in a table; skips are told."""
    open_runs(page, "first", "second")
    page.wait_for_selector("#charts figure[aria-label*='first 3.6 at 40'][aria-label*='second 3.7 at 30']")
    page.select_option("#curves [name=x]", "tokens")
    page.wait_for_selector("#charts figure[aria-label*='first 3.6 at 4,000']")
    page.check("#curves [name=log_x]")
    page.fill("#curves [name=smoothing]", "0.5")
    assert page.text_content("#sample-text") == "a at 4"
    page.press("#sample-step", "ArrowLeft")
    assert page.text_content("#sample-text") == "a at 2"
    assert "skipped step 3: loss is not finite" in page.text_content("#run-events")
    page.wait_for_selector("#config-title:has-text('Differences')")
    key, *values = page.locator("#config tr").all_inner_texts()[1].split("\t")
    assert (key, sorted(values)) == ("optimizer.learning_rate", ["0.001", "0.01"])


@pytest.mark.parametrize("tab", ["tokens", "runs"])
def test_the_keyboard_alone_reaches_what_a_tab_shows(page, tab):
    """Tab after tab, the focus comes to each field, button and link that can be seen, and is seen there itself."""
    open_runs(page, "first", "second")
    page.wait_for_selector("#charts figure[aria-label*='first 3.6 at 40']")
    page.click(f"#tab-{tab}")
    page.wait_for_selector(f"#{tab}:visible")
    wanted = page.evaluate(
        """(tab) => {
          const kinds = `input, select, textarea, button, a[href], [tabindex="0"]`;
          return [...document.querySelectorAll(`#${tab} :is(${kinds})`)]
            .filter((one) => one.checkVisibility() && !one.disabled)
            .map((one, number) => (one.dataset.number = String(number)));
        }""",
        tab,
    )
    page.focus(f"#tab-{tab}")
    reached = set()
    for _ in range(2 * len(wanted) + 10):
        page.keyboard.press("Tab")
        number, outline = page.evaluate(
            "[document.activeElement.dataset.number, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.add(number)
        assert number is None or outline != "none", page.evaluate("document.activeElement.outerHTML")
    assert reached >= set(wanted), set(wanted) - reached
    assert wanted


def test_time_memory_and_environment_are_those_of_the_lines(page, site):
    """The axis of time is the run's own clock, memory has a chart, and what the run was made with is in a table."""
    with own_run(site, "clocked", steps=3) as home:
        append_line(
            home,
            {"event": "environment", "step": 0, "versions.torch": "2.13.0", "threads": 2, "command": ["a", "it's b"]},
        )
        for step in (4, 5):
            append_line(home, step_line(step) | {"time.elapsed_s": 2.0 * step, "memory.peak_bytes": 3e9})
        open_runs(page, "clocked")
        page.wait_for_selector("#charts figure[aria-label='Peak memory, GB: clocked 3 at 5']")
        page.select_option("#curves [name=x]", "seconds")
        page.wait_for_selector("#charts figure[aria-label*='clocked 3.95 at 10']")
        shown = page.inner_text("#environment")
        assert "versions.torch\t2.13.0" in shown
        assert """command\ta 'it'"'"'s b'""" in shown
        assert "step" not in shown
        page.fill("#curves [name=from]", "8")
        append_line(home, step_line(6) | {"time.elapsed_s": 12.0})
        page.wait_for_selector("#charts figure[aria-label*='clocked 3.94 at 12']")
        assert page.input_value("#curves [name=from]") == "8"  # the part stays while lines come
        page.fill("#curves [name=from]", "")
        page.select_option("#config-shown", "all")
        assert "logging.note" in page.inner_text("#config")


def test_a_run_that_is_started_anew_has_its_new_configuration(page, site):
    """While it is shown, and where it is chosen again later."""
    with own_run(site, "anew", steps=3, learning_rate=0.5) as home:
        open_runs(page, "anew")
        page.wait_for_selector("#config:has-text('0.5')")
        page.wait_for_selector("#charts figure[aria-label*='anew 3.97 at 3']")
        for number, rate in enumerate((0.25, 0.125), 4):
            if rate == 0.125:
                open_runs(page)
            (home / "config.toml").write_text(f"[optimizer]\nlearning_rate = {rate}\n")
            append_line(home, {"event": "resumed", "step": number - 1})
            append_line(home, step_line(number))
            if rate == 0.125:
                open_runs(page, "anew")
            page.wait_for_selector(f"#config:has-text('{rate}')")


def test_what_has_no_place_on_an_axis_has_no_mark(page, site):
    """Without FLOPs a token, the events of a run are nowhere over FLOPs, rather than all at 0."""
    lines = lines_of(3)
    del lines[0]["flops_per_token"]
    with own_run(site, "unplaced", steps=3) as home:
        write_lines(home, lines)
        page.evaluate(
            """async () => {
              const { Chart } = await import("/static/chart.js");
              const draw = Chart.prototype.draw;
              Chart.prototype.draw = function (curves, options) {
                window.marks = options.marks.length;
                return draw.call(this, curves, options);
              };
            }"""
        )
        open_runs(page, "unplaced")
        wait_until(page, "window.marks === 1")
        page.select_option("#curves [name=x]", "flops")
        wait_until(page, "window.marks === 0")


def test_the_words_of_a_choice_are_those_of_now(page):
    """A model that is offered goes on with its training: its step changes, its name and what is chosen do not."""
    found = page.evaluate(
        """async () => {
          const { setOptions } = await import("/static/dom.js");
          const select = document.createElement("select");
          setOptions(select, ["a", "b"], (name) => `${name} (step 1)`);
          select.value = "b";
          setOptions(select, ["a", "b"], (name) => `${name} (step 2)`);
          return [select.value, ...[...select.options].map((option) => option.textContent)];
        }"""
    )
    assert found == ["b", "a (step 2)", "b (step 2)"]


def test_a_run_that_is_html_stays_text(page, seen):
    """Name, configuration and samples of a run are shown as they are, and nothing of them runs."""
    name = HOSTILE.replace("/", "-")
    open_runs(page, name)
    page.wait_for_selector("#sample-text:has-text('at 4')")
    page.wait_for_selector("#config td")
    assert HOSTILE in page.text_content("#sample-text")
    assert HOSTILE in page.text_content("#config")
    assert name in page.text_content("#runs-list")
    assert page.locator("img").count() == 0
    assert page.evaluate("document.body.dataset.broken") is None
    assert seen.messages == []


def test_the_page_asks_for_the_key(tmp_path, new_page):
    """The page opens without the key, asks for it until it has the right one, and keeps it in its tab alone."""
    with serving_fake(tmp_path, key=KEY) as url:
        page = new_page(url)
        page.wait_for_selector("#key:focus")
        for _ in range(3):
            page.keyboard.press("Escape")  # without a key the page is of no use
            page.wait_for_timeout(100)
        page.wait_for_selector("#key:focus")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-status:has-text('refused')")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#served:has-text('step 140')")
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage['transformerlm.key']]") == [
            0,
            "",
            KEY,
        ]
        assert page.is_hidden("#key-dialog")


@pytest.mark.slow
def test_long_runs_stay_small(site, new_page):
    """Of ten runs of 50,000 steps each, among a hundred, the page is sent some thousand lines and stays small."""
    home = site.runs_dir / "long-000"
    write_run(home, steps=50_000)
    others = [site.runs_dir / f"long-{number:03}" for number in range(1, 100)]
    try:
        for other in others:
            other.mkdir()
            os.link(home / "metrics.jsonl", other / "metrics.jsonl")
        page = new_page(site.url)
        open_runs(page, *(path.name for path in [home, *others[:9]]))
        for path in [home, *others[:9]]:
            page.wait_for_selector(f"#charts figure[aria-label*='{path.name} ']")
        assert page.locator("#runs-list tr").count() >= 100
        assert page.evaluate("performance.memory.usedJSHeapSize") < 300e6
        lines = httpx.get(f"{site.url}/api/lines", params={"run": home.name, "offset": 0, "every": 0}).json()["lines"]
        assert 1000 < len(lines) < 6000
    finally:
        for path in [home, *others]:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(site, new_page, scheme):
    """axe-core, from TRANSFORMERLM_AXE (what `npm pack axe-core` unpacks to), finds no serious fault in any tab."""
    folder = os.environ.get("TRANSFORMERLM_AXE")
    if not folder:
        pytest.skip("TRANSFORMERLM_AXE names no folder with axe.min.js")
    page = new_page(site.url, color_scheme=scheme, bypass_csp=True)
    page.wait_for_selector("#served:has-text('step 2')")
    page.evaluate((Path(folder) / "axe.min.js").read_text())
    for name in TABS:
        page.click(f"#tab-{name}")
        if name == "runs":
            open_runs(page, "first", "second")
        page.wait_for_timeout(300)
        found = page.evaluate("axe.run().then(result => result.violations)")
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious] == [], name
