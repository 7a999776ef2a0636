"""The tab Chat in a real browser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.browser.conftest import Site, serving_site
from tests.training.chat_run import ANSWER

pytestmark = pytest.mark.browser
QUESTION = "Is Ada here?"
MARKUP = "<img src=x onerror=broken()>"


@pytest.fixture(scope="module")
def chat_site(tmp_path_factory: pytest.TempPathFactory, chat_run: Path, browser: Any) -> Iterator[Site]:
    """Give a server of a model that was trained on conversations."""
    with serving_site(chat_run, tmp_path_factory.mktemp("log")) as site:
        yield site


@pytest.fixture
def page(chat_site: Site, new_page: Any) -> Any:
    """Give a page whose tab Chat is open; answers are the most likely ones."""
    found = new_page(f"{chat_site.url}/#/chat")
    found.wait_for_selector("#chat:visible")
    found.fill("#chat-settings [name=temperature]", "0")
    return found


def say(page: Any, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")
    page.wait_for_selector("#chat-stop:disabled")


def said(page: Any) -> list[str]:
    """Return what is in the conversation."""
    return page.locator("#chat-log .said").all_text_contents()


def sent(seen: Any) -> list[dict[str, Any]]:
    """Return the bodies of the requests for answers."""
    return [json.loads(one.post_data) for one in seen.of("/v1/chat/completions")]


def test_a_conversation_has_a_history(page, seen):
    """Question and answer stay, the next request holds them and the system's message, and a reload keeps them."""
    page.fill("#chat-settings [name=system]", "Be brief.")
    page.fill("#chat-settings [name=seed]", "3")
    page.fill("#chat-settings [name=top_p]", "0.955")
    say(page, QUESTION)
    say(page, "Is Bob\nat sea?")
    assert said(page) == [QUESTION, ANSWER, "Is Bob\nat sea?", ANSWER]
    first, second = sent(seen)
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert second["messages"][2] == {"role": "assistant", "content": ANSWER}
    assert (second["seed"], second["temperature"], second["top_p"], second["stream"]) == (3, 0, 0.955, True)
    assert "seed 3" in page.text_content("#chat-status")
    page.reload()
    page.wait_for_selector("#chat:visible")
    assert said(page)[-1] == ANSWER
    assert page.input_value("#chat-settings [name=system]") == "Be brief."
    page.click("#chat-new")
    assert said(page) == []
    assert seen.messages == []


def test_an_answer_is_that_of_the_server(page, chat_site):
    """The same messages, seed and settings give the text of /v1/chat/completions."""
    for name, value in (("temperature", "3"), ("top_p", "1"), ("max_tokens", "16"), ("seed", "11")):
        page.fill(f"#chat-settings [name={name}]", value)
    say(page, QUESTION)
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 3, "seed": 11, "max_tokens": 16}
    answer = httpx.post(f"{chat_site.url}/v1/chat/completions", json=body, timeout=60).json()
    assert said(page)[1] == answer["choices"][0]["message"]["content"]


def test_regenerate_answers_anew_with_the_next_seed(page, seen):
    """The answer is replaced; a seed that was chosen counts up, so that each time it is another answer."""
    page.fill("#chat-settings [name=temperature]", "3")
    page.fill("#chat-settings [name=seed]", "5")
    say(page, QUESTION)
    before = said(page)
    for _ in range(2):
        page.click("#chat-again")
        page.wait_for_selector("#chat-again:enabled")
    assert said(page)[0] == QUESTION
    assert len(said(page)) == 2
    assert said(page) != before
    assert [body["seed"] for body in sent(seen)] == [5, 6, 7]
    assert all(len(body["messages"]) == 1 for body in sent(seen))


def test_stop_keeps_what_was_said(page):
    """Esc ends an answer where it is, which stays in the conversation; where nothing had come, all is as before."""
    page.fill("#chat-settings [name=max_tokens]", "1000")
    page.evaluate(
        """() => {
          const first = 'data: {"choices": [{"index": 0, "delta": {"content": "Ye"}, "finish_reason": null}]}\\n\\n';
          window.fetch = async (path, { signal }) => {
            const body = new ReadableStream({ start(controller) {
              if (window.answers) controller.enqueue(new TextEncoder().encode(first));
              signal.addEventListener("abort", () => controller.error(signal.reason));
            } });
            return new Response(body);
          };
        }"""
    )
    for answers in (False, True):
        page.evaluate("answers => (window.answers = answers)", answers)
        page.fill("#chat-text", QUESTION)
        page.press("#chat-text", "Enter")
        if answers:
            page.wait_for_selector("#chat-log .assistant .said:has-text('Ye')")
        page.press("#chat-text", "Escape")
        page.wait_for_selector("#chat-stop:disabled")
        assert page.text_content("#chat-status") == "Stopped."
        assert said(page) == ([QUESTION, "Ye"] if answers else [])
        assert page.input_value("#chat-text") == ("" if answers else QUESTION)


def test_a_message_that_is_html_stays_text(page, seen):
    """What is said, and what the model says of it, is text."""
    page.fill("#chat-settings [name=max_tokens]", "8")
    say(page, MARKUP)
    assert said(page)[0] == MARKUP
    assert page.locator("#chat-log img").count() == 0
    assert seen.messages == []


def test_a_long_conversation_goes_on_without_its_beginning(page, seen):
    """When it is too long for the context the oldest pairs are not sent, and the line below says so."""
    page.fill("#chat-settings [name=max_tokens]", "20")
    for _ in range(6):
        say(page, QUESTION)
    assert said(page) == [QUESTION, ANSWER] * 6
    assert "messages are beyond the model's context" in page.text_content("#chat-status")
    last = sent(seen)[-1]["messages"]
    assert last[0] == {"role": "user", "content": QUESTION}
    assert len(last) < 11
    say(page, "x" * 1000)
    assert "expected" in page.text_content("#chat-status")
    assert page.input_value("#chat-text") == "x" * 1000
    assert len(said(page)) == 12


def test_messages_that_the_server_leaves_out_are_told_once(page):
    """Where long texts slide, the first part of an answer and the last one both say how many."""
    part = {"index": 0, "finish_reason": None, "step": 1}
    parts = [part | {"delta": {"content": "yes"}}, part | {"delta": {}, "finish_reason": "stop"}]
    lines = [json.dumps({"choices": [one], "messages_left_out": 2}) for one in parts]
    body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    say(page, QUESTION)
    assert "the oldest 2 messages are beyond the model's context" in page.text_content("#chat-status")


def test_the_keyboard_alone_reaches_everything(page):
    """Without a mouse: a message is sent, a line is begun, each button and field is reached and seen."""
    page.focus("#tab-write")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-chat"
    page.focus("#chat-text")
    page.keyboard.type("Is Ada")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("here?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat-stop:disabled")
    assert said(page)[0] == "Is Ada\nhere?"
    assert page.evaluate("document.activeElement.id") == "chat-text"
    page.focus("#tab-chat")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement.id") == "", reached
    assert reached >= {"chat-log", "chat-text", "chat-send", "chat-again", "chat-new", "model", "system", "seed"}
    assert reached >= {"temperature", "top_p", "top_k", "min_p", "max_tokens"}


def test_a_model_of_text_has_no_such_tab(site, new_page, seen):
    """There the tab is not shown, its address leads to Write, and the arrows pass it by."""
    page = new_page(f"{site.url}/#/chat")
    page.wait_for_selector("#served:has-text('step 2')")
    page.wait_for_timeout(300)
    assert seen.of("/tokenizer_info")
    assert page.is_hidden("#tab-chat")
    assert page.is_visible("#write")
    page.focus("#tab-write")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-tokens"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_shows_everything(chat_site, new_page, scheme, tmp_path):
    """At 360 pixels the tab is no wider than the window, also with a long word; light and dark differ."""
    page = new_page(f"{chat_site.url}/#/chat", viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.wait_for_selector("#chat:visible")
    page.fill("#chat-settings [name=max_tokens]", "8")
    say(page, "Is-Ada-here-" * 3)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('.tabs').scrollWidth <= document.querySelector('.tabs').clientWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 300) == (scheme == "dark")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chat_site, new_page, scheme):
    """axe-core, from TRANSFORMERLM_AXE (what `npm pack axe-core` unpacks to), finds no serious fault."""
    folder = os.environ.get("TRANSFORMERLM_AXE")
    if not folder:
        pytest.skip("TRANSFORMERLM_AXE names no folder with axe.min.js")
    page = new_page(f"{chat_site.url}/#/chat", color_scheme=scheme, bypass_csp=True)
    page.wait_for_selector("#chat:visible")
    say(page, QUESTION)
    page.evaluate((Path(folder) / "axe.min.js").read_text())
    found = page.evaluate("axe.run().then(result => result.violations)")
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious] == []
