"""Reports in a real browser, opened as files: what they show, what they ask for, and what hostile text does in them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run
from tests.serving.browser.conftest import wait_until_drawn
from transformerlm.experiments.metric_lines import as_record

pytestmark = pytest.mark.browser
HOSTILE = (
    "</script><script>document.body.dataset.broken = 1</script><!-- "
    '<img src=x onerror="document.body.dataset.broken = 1">'
    " ' \" & \u2028 \u2029 \x00 \ud800 \udfff {data} {script} 日本"
)

NAME_OF_FOCUS = (
    "(e => e.name || e.id || e.ariaLabel || e.getAttribute('aria-labelledby') || '')(document.activeElement)"
)


def long_run(folder: Path, name: str, *, offset: float = 0.0, config: dict[str, Any] | None = None) -> Path:
    """Write a run of 40 steps with all that a report shows."""
    environment = {"event": "environment", "step": 0, "versions.torch": "2.13.0", "host": "here", "threads": 1}
    records: list[dict[str, Any]] = [environment, STARTED]
    for number in range(1, 41):
        line = step(number, 4 - number / 100 + offset, lr=0.001, grad_l2_norm=1.0)
        line |= {"time.elapsed_s": number / 2, "memory.peak_bytes": 2e9}
        if number % 10 == 0:
            line |= {"metrics.val_loss": 4 - number / 200 + offset, "metrics.val_bits_per_byte": 1.5}
        records.append(line)
        if number in (10, 20):
            records.append({"event": "sample", "step": number, "text.prompt": "A", "text.output": f" text at {number}"})
            records.append({"event": "checkpoint_saved", "step": number})
    records.append({"event": "step_skipped", "step": 33, "reason": "loss is not finite"})
    return write_run(
        folder, name, *records, FINISHED | {"step": 40}, config=config or {"optimizer.learning_rate": 0.001}
    )


def shown(page: Any, title: str) -> str:
    """Return what a chart says of itself."""
    return str(page.locator(f"#charts figure:has(h2:text-is('{title}'))").get_attribute("aria-label"))


def test_a_report_asks_for_nothing_and_says_nothing(tmp_path, open_report, seen):
    """From file:// the one request is the file itself; no message comes, nor a report of its policy."""
    page = open_report(long_run(tmp_path, "one"))
    page.select_option("#curves [name=x]", "seconds")
    page.wait_for_function("document.querySelector('#charts figure').ariaLabel.includes('at 20')")
    assert [one.url for one in seen.requests] == [page.url]
    assert seen.messages == []


def test_the_numbers_are_those_of_the_lines(tmp_path, open_report):
    """All that the page's curves hold, read back in the browser, is what metrics.jsonl has, bit for bit."""
    records = [step(number, 1 / (3 + number), lr=number / 7, grad_l2_norm=number**0.5) for number in range(1, 60)]
    records[30]["metrics.loss"] = "nan"
    run = write_run(tmp_path, "one", STARTED, *records, validation(60, 0.1 + 0.2))
    page = open_report(run)
    data = page.evaluate("JSON.parse(document.querySelector('#data').textContent)")
    found = data["runs"][0]["curves"]
    for short, key in {"loss": "metrics.loss", "lr": "metrics.lr", "grad_norm": "metrics.grad_l2_norm"}.items():
        own = [
            (one["step"], one[key])
            for line in (run / "metrics.jsonl").read_bytes().splitlines()
            if key in (one := as_record(line))
        ]
        steps = [sum(found[short]["steps"][: at + 1]) for at in range(len(own))]
        assert list(zip(steps, found[short]["values"], strict=True)) == own, short
    assert found["val_loss"]["values"] == [0.1 + 0.2]
    assert "one 0.3 at 60" in shown(page, "Loss")


def test_it_shows_what_a_run_was(tmp_path, open_report):
    """Verdict, curves on each axis, samples, events, settings, environment, facts and the command."""
    page = open_report(long_run(tmp_path, "one", config={"training.seed": 7, "model.d_model": 64}))
    text = page.inner_text("#verdict")
    assert "Its best validation loss is 3.8000 nats a token, 1.500 bits per byte, at step 40." in text
    assert shown(page, "Loss") == "Loss: one 3.6 at 40, one, validation 3.8 at 40"
    assert shown(page, "Peak memory, GB") == "Peak memory, GB: one 2 at 40"
    for axis, at in (("tokens", "2,560"), ("seconds", "20"), ("flops", "1.54e+7")):
        page.select_option("#curves [name=x]", axis)
        page.wait_for_selector(f"#charts figure[aria-label*='one 3.6 at {at}']")
    assert page.inner_text("#sample-text") == "A text at 20"
    page.press("#sample-step", "ArrowLeft")
    assert page.inner_text("#sample-text") == "A text at 10"
    events = page.inner_text("#run-events").split("\n")
    assert "saved a checkpoint at step 10" in events
    assert "skipped step 33: loss is not finite" in events
    assert "training.seed\t7\t0" in page.inner_text("#config")
    assert "2.13.0" in page.inner_text("#environment")
    assert "50 planned, 40 came" in page.inner_text("#facts")
    command = page.inner_text("#reproduction pre")
    assert command.startswith("OMP_NUM_THREADS=1 transformerlm-train --config ")


def test_runs_beside_each_other(tmp_path, open_report):
    """Runs share each chart, those with the same name are told apart, and what differs is in a table."""
    one = long_run(tmp_path / "a", "run")
    other = long_run(tmp_path / "b", "run", offset=0.5, config={"optimizer.learning_rate": 0.01})
    page = open_report(one, other)
    assert shown(page, "Loss") == f"Loss: {one} 3.6 at 40, {other} 4.1 at 40"
    assert f"{one} has the lowest validation loss: 3.8000" in page.inner_text("#verdict")
    assert page.inner_text("#config").split("\n")[1].split("\t") == ["optimizer.learning_rate", "0.001", "0.01"]
    page.locator("#runs-list input").nth(1).uncheck()
    page.wait_for_selector("#charts figure[aria-label='Loss: " + f"{one} 3.6 at 40, {one}, validation 3.8 at 40']")


def test_a_part_is_shown_by_keys_and_by_mouse(tmp_path, open_report):
    """From and to, and dragging over a chart, show a part of all charts; All and a double click show all again."""
    page = open_report(long_run(tmp_path, "one"))
    page.fill("#curves [name=from]", "10")
    page.fill("#curves [name=to]", "20")
    wait_until_drawn(page)
    box = page.locator("#charts figure:visible .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    legend = page.locator("#charts figure:visible .u-value").first
    page.wait_for_function("document.querySelector('#charts .u-value').textContent === '15'")
    page.click("#whole")
    assert page.input_value("#curves [name=from]") == ""
    wait_until_drawn(page)
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 25, steps=4)
    page.mouse.up()
    assert 9 < float(page.input_value("#curves [name=from]")) < 13
    wait_until_drawn(page)
    page.mouse.dblclick(box["x"] + 50, box["y"] + 20)
    assert page.input_value("#curves [name=from]") == ""
    wait_until_drawn(page)
    page.focus("#charts figure >> nth=0 >> [role=group]")
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#charts .u-value').textContent === '40'")
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('#charts .u-value').textContent === '\u2013'")
    assert legend.text_content() == "\u2013"


def test_a_part_stays_the_same_when_its_unit_changes(tmp_path, open_report):
    """Beside a run of minutes, seconds become minutes; a scale of logarithms has no 0, which From may leave out."""
    lines = [step(number, 3.0) | {"time.elapsed_s": 30.0 * number} for number in range(1, 21)]
    short, long = long_run(tmp_path, "short"), write_run(tmp_path, "long", STARTED, *lines)
    page = open_report(short, long)
    page.locator("#runs-list input").nth(1).uncheck()
    page.select_option("#curves [name=x]", "seconds")
    page.fill("#curves [name=from]", "6")
    page.fill("#curves [name=to]", "12")
    page.locator("#runs-list input").nth(1).check()
    page.wait_for_selector("#charts figure[aria-label*='long 3 at 10']")
    assert [page.input_value(f"#curves [name={name}]") for name in ("from", "to")] == ["0.1", "0.2"]
    page.fill("#curves [name=from]", "")
    page.check("#curves [name=log_x]")
    wait_until_drawn(page)
    box = page.locator("#charts figure:visible .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 20)
    page.wait_for_function("Math.abs(document.querySelector('#charts .u-value').textContent - 0.2) < 0.01")


def test_the_newest_of_many_samples_is_shown(tmp_path, open_report):
    """The slider begins at its end; of very many checkpoints the last are listed, and the list says so."""
    samples = [
        {"event": "sample", "step": n, "text.prompt": "A", "text.output": f" text at {n}"} for n in range(1, 101)
    ]
    saved = [{"event": "checkpoint_saved", "step": n} for n in range(1, 251)]
    page = open_report(write_run(tmp_path, "one", STARTED, step(1, 3.0), *samples, *saved, step(250, 2.0)))
    assert page.text_content("#sample-text") == "A text at 100"
    listed = page.locator("#run-events li").all_inner_texts()
    assert listed[0] == "50 earlier checkpoints are not listed"
    assert (listed[2], listed[-1]) == ("saved a checkpoint at step 51", "saved a checkpoint at step 250")


def test_hostile_text_stays_text(tmp_path, open_report, seen):
    """Markup, ends of scripts, line separators, NUL and halves of pairs in names, samples and settings run nothing."""
    name = re.sub(r"[/\x00\ud800\udfff]", "-", HOSTILE)[:120]
    records = [STARTED | {"device": HOSTILE}, step(1, 3.0), validation(2, 2.5)]
    records.append({"event": "sample", "step": 2, "text.prompt": HOSTILE, "text.output": "x" + HOSTILE})
    records.append({"event": "step_skipped", "step": 2, "reason": HOSTILE})
    records.append({"event": "environment", "step": 0, "host": HOSTILE, HOSTILE: 1})
    run = write_run(
        tmp_path, name, *records, config={"logging.dataset": HOSTILE.replace("\ud800 \udfff", "").replace("\x00", "")}
    )
    page = open_report(run)
    expected = page.evaluate("text => JSON.parse(text)", json.dumps(HOSTILE))  # as browsers hand out halves of pairs
    assert page.text_content("#sample-text") == expected + "x" + expected
    assert expected in page.text_content("#run-events")
    assert "</script>" in page.text_content("#environment")
    assert "</script>" in page.text_content("#config")
    assert name in page.text_content("#runs-list")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert page.evaluate("document.body.dataset.broken") is None
    assert seen.messages == []


ODD = {
    "one line": [step(1, 3.0)],
    "no validation": [STARTED, step(1, 3.0), step(2, 2.9)],
    "only nan": [STARTED, step(1, "nan"), step(2, "inf")],
    "no step": [STARTED],
    "nothing": [],
    "strange values": [
        STARTED | {"max_steps": "many", "eta_seconds": [], "flops_per_token": "x"},
        step(1, 3.0),
        {"event": 3},
        {"step": "one"},
    ],
    "rolled back": [
        STARTED,
        step(1, 3.0),
        step(2, 3.1),
        {"event": "rolled_back", "step": 1, "from_step": 2},
        step(2, 2.9),
        {"event": "resumed", "step": 2},
    ],
}


def test_odd_runs_are_shown(tmp_path, open_report, seen):
    """Runs of one line, of none, without validation, with losses that are no numbers, resumed and rolled back."""
    runs = [write_run(tmp_path, name, *records) for name, records in ODD.items()]
    with (runs[0] / "metrics.jsonl").open("ab") as stream:
        stream.write(b'not json\n{"step": 2, "metrics.lo')
    (runs[1] / "config.toml").write_text("= broken")
    page = open_report(*runs)
    assert page.locator("#runs-list tr").count() == len(ODD)
    label = shown(page, "Loss")
    assert label == "Loss: one line 3 at 1, no validation 2.9 at 2, strange values 3 at 1, rolled back 2.9 at 2"
    assert page.inner_text("#runs-status") == "one line: 1 lines could not be read."
    assert seen.messages == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_an_odd_run_is_shown_alone(tmp_path, open_report, seen, name):
    """Each of the same runs by itself, with a sentence about it."""
    page = open_report(write_run(tmp_path, name, *ODD[name]), ready="#verdict:not(:empty)")
    assert page.inner_text("#verdict").startswith(name)
    assert seen.messages == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_window(tmp_path, open_report, scheme):
    """At 360 pixels nothing is wider than the window; light and dark have their own ground."""
    runs = [long_run(tmp_path, f"a-run-with-a-rather-long-name-{number}" * 2) for number in range(3)]
    page = open_report(*runs, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 300) == (scheme == "dark")


def test_the_keyboard_alone_reaches_everything(tmp_path, open_report):
    """Each field, table and chart takes the focus, in the order of the page, and shows that it has it."""
    page = open_report(long_run(tmp_path, "one"), long_run(tmp_path, "two"))
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(NAME_OF_FOCUS))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] in ("", "smoothing"), reached
    wanted = [
        "Runs",
        "x",
        "from",
        "to",
        "whole",
        "log_x",
        "log_y",
        "smoothing",
        "Loss: ← and → move along it, Esc leaves",
    ]
    wanted += [
        "sample-run",
        "sample-step",
        "run-events",
        "config-shown",
        "config-title",
        "environment-title",
        "Command",
    ]
    places = [reached.index(one) for one in wanted]
    assert places == sorted(places)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tmp_path, open_report, scheme):
    """axe-core, from TRANSFORMERLM_AXE (what `npm pack axe-core` unpacks to), finds no serious fault."""
    folder = os.environ.get("TRANSFORMERLM_AXE")
    if not folder:
        pytest.skip("TRANSFORMERLM_AXE names no folder with axe.min.js")
    page = open_report(long_run(tmp_path, "one"), long_run(tmp_path, "two"), color_scheme=scheme, bypass_csp=True)
    page.evaluate((Path(folder) / "axe.min.js").read_text())
    found = page.evaluate("axe.run().then(result => result.violations)")
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious] == []
