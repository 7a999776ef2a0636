"""The tab Write in a real browser."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from tests.serving.browser.conftest import WAIT_MS, Seen, Site, serving_fake
from tests.serving.browser.runs_of_lines import HOSTILE

pytestmark = pytest.mark.browser
PROMPT = "Ada sees"
COLOURED = "#backdrop .made"


def settle(page: Any) -> None:
    """Wait until the page makes no text."""
    page.wait_for_selector("#continue:enabled")


def go_on(page: Any, text: str = PROMPT, **settings: int | float) -> None:
    """Type a text and let the model go on."""
    for name, value in {"seed": 7, "max_tokens": 24, "top_p": 1, "temperature": 1, **settings}.items():
        page.fill(f"[name={name}]", str(value))
    page.fill("#text", text)
    page.click("#continue")
    page.wait_for_selector("#stop:disabled")
    settle(page)


def ask(site: Site, **body: Any) -> dict[str, Any]:
    """Return the first choice of an answer of the server, asked without the page."""
    answer = httpx.post(f"{site.url}/v1/completions", json=body, timeout=WAIT_MS / 1000)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def sent(seen: Seen) -> list[dict[str, Any]]:
    """Return the bodies that the page asked for texts with."""
    return [json.loads(one.post_data) for one in seen.of("/v1/completions")]


def as_shown(text: str) -> str:
    """Return a text as a field of HTML has it, without the beginning of a character at its end."""
    return text.replace("\r", "\n").rstrip("\ufffd")


def test_the_text_goes_on_in_colours(page, site, seen):
    """The text that the server makes follows what was typed, each of its tokens coloured; nothing else is asked for."""
    go_on(page)
    body = sent(seen)[0]
    text = ask(site, **{**body, "stream": False})["text"]
    assert page.input_value("#text").startswith(PROMPT + as_shown(text))
    assert page.locator(COLOURED).count() >= 20
    assert "seed 7" in page.text_content("#write-status")
    assert {one.url.split("/")[2] for one in seen.requests} == {site.url.split("/")[2]}
    assert seen.messages == []


def test_prompts_go_as_ids_and_what_was_made_keeps_its_own(page, seen):
    """A second request holds the ids of the first one and of its answer, which are not made of the text anew."""
    go_on(page)
    page.press("#text", "Control+Enter")
    page.wait_for_selector("#stop:disabled")
    settle(page)
    first, second = (body["prompt"] for body in sent(seen))
    assert all(isinstance(one, int) for one in first)
    assert second[: len(first)] == first
    assert len(second) >= len(first) + 20


def test_alternatives_are_the_servers_and_one_is_gone_on_from(page, site, seen):
    """The list beside a token has the ten of /v1/completions, and Esc closes it; the third one goes into the text."""
    go_on(page)
    body = {**sent(seen)[0], "stream": False, "return_token_ids": True}
    choice = ask(site, **body)
    expected = sorted(choice["logprobs"]["top_logprobs"][0].items(), key=lambda pair: -pair[1])[:10]
    page.locator(COLOURED).nth(3).hover(force=True)
    page.wait_for_selector("#popover button")
    page.keyboard.press("Escape")
    page.wait_for_selector("#popover", state="hidden")
    page.locator(COLOURED).first.hover(force=True)
    page.wait_for_selector("#popover button")
    shown = page.locator("#popover button").all_inner_texts()
    assert len(shown) == 10
    ids = [choice["top_token_ids"][0][spelled] for spelled, _ in expected]
    assert page.eval_on_selector_all("#popover button", "all => all.map(one => Number(one.dataset.id))") == ids
    page.locator("#popover button").nth(2).click()
    page.wait_for_selector("#stop:disabled")
    settle(page)
    assert sent(seen)[1]["prompt"] == [*body["prompt"], ids[2]]
    page.click("#undo")
    assert page.input_value("#text").startswith(PROMPT + as_shown(choice["text"]))


def test_the_keyboard_alone_reaches_everything(page, site, seen):
    """Without a mouse: a text goes on, an alternative is taken, tabs change, each field is reached and seen."""
    assert page.evaluate("document.activeElement.id") == "text"  # when the page opens
    page.fill("[name=seed]", "7")
    page.focus("#text")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stop:disabled")
    settle(page)
    before = page.input_value("#text")
    page.evaluate("document.querySelector('#text').setSelectionRange(12, 12)")
    page.keyboard.press("Alt+ArrowDown")
    page.wait_for_selector("#popover button:focus")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:disabled")
    settle(page)
    assert len(sent(seen)) == 2
    page.keyboard.press("Control+z")
    assert page.input_value("#text") == before
    page.focus("#tab-write")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement.id") in ("text", ""), reached
    wanted = {"text", "continue", "undo", "alternatives", "perplexity", "model", "beside", "temperature", "top_p"}
    assert reached >= wanted | {"top_k", "min_p", "max_tokens", "n", "seed"}
    page.focus("#tab-write")
    for name in ("tokens", "runs", "server"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#{name}:visible")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"


def test_two_checkpoints_answer_the_same_prompt_and_seed(page, site, seen):
    """Beside each other are what each checkpoint makes with the same prompt and seeds; one of them is kept."""
    page.select_option("[name=beside]", "tiny@step-00000001")
    go_on(page, n=2)
    bodies = sent(seen)
    assert [body["model"] for body in bodies] == ["tiny", "tiny@step-00000001"]
    assert {json.dumps([body["prompt"], body["seed"], body["n"]]) for body in bodies} == {
        json.dumps([bodies[0]["prompt"], 7, 2])
    }
    cards = page.locator("#branches article")
    assert cards.count() == 4
    assert page.input_value("#text") == PROMPT
    other = ask(site, **{**bodies[1], "stream": False})["text"]
    assert cards.nth(2).locator(".ink").text_content().startswith(as_shown(other))
    cards.nth(2).locator("button").click()
    assert page.input_value("#text").startswith(PROMPT + as_shown(other))


def test_perplexity_is_that_of_the_servers_logprobs(page, site, seen):
    """What stands there is coloured, and its perplexity follows from the log-probabilities of an echo."""
    page.fill("#text", "Bob likes the sea.")
    page.click("#perplexity")
    page.wait_for_selector("#score:not(:empty)")
    body = sent(seen)[0]
    assert (body["echo"], body["max_tokens"]) == (True, 0)
    known = [one for one in ask(site, **body)["logprobs"]["token_logprobs"] if one is not None]
    expected = math.exp(-sum(known) / len(known))
    assert f"perplexity {expected:.2f}" in page.text_content("#score")
    assert page.locator(COLOURED).count() == len(known)


def test_every_number_that_the_server_takes_is_asked_with(page, seen):
    """Also one between the steps of the arrows, which go on from it; a part of a token is none."""
    numbers = {"temperature": 0.83, "top_p": 0.955, "min_p": 0.0005}
    go_on(page, max_tokens=2, **numbers)
    assert {name: sent(seen)[0][name] for name in numbers} == numbers
    page.press("[name=temperature]", "ArrowUp")
    assert page.input_value("[name=temperature]") == "0.85"
    for name, value in (("max_tokens", "2.5"), ("top_p", "1.5"), ("temperature", "-1")):
        before = page.input_value(f"[name={name}]")
        page.fill(f"#settings [name={name}]", value)
        page.click("#continue")
        assert page.evaluate("document.activeElement.name") == name
        page.fill(f"#settings [name={name}]", before)
    assert len(sent(seen)) == 1


def test_no_more_alternatives_are_asked_for_than_the_server_gives(tmp_path, new_page):
    """With a small limits.logprobs texts go on, too, and have a perplexity."""
    with serving_fake(tmp_path, sections={"limits": {"logprobs": 2}}) as url:
        page = new_page(url)
        page.wait_for_selector("#served:has-text('step 140')")
        go_on(page, "ab", max_tokens=4)
        assert page.locator(COLOURED).count() == 4
        page.locator(COLOURED).first.hover(force=True)
        page.wait_for_selector("#popover button")
        assert page.locator("#popover button").count() == 2
        page.click("#perplexity")
        page.wait_for_selector("#score:has-text('perplexity')")


def test_ids_of_another_tokenizer_become_words(page, seen):
    """When another model is served here, what the first one made is text for the second."""
    go_on(page, max_tokens=4)
    text = page.input_value("#text")
    page.route(
        "**/tokenizer_info", lambda route: route.fulfill(json={"fingerprint": "of another", "add_bos_token": False})
    )
    page.click("#continue")
    page.wait_for_selector("#stop:disabled")
    settle(page)
    asked = [json.loads(one.post_data)["prompt"] for one in seen.of("/tokenize")]
    assert asked == [PROMPT, text]
    page.click("#undo")  # back to what the first model made, which is words for the second, too
    page.click("#continue")
    page.wait_for_selector("#stop:disabled")
    settle(page)
    assert [json.loads(one.post_data)["prompt"] for one in seen.of("/tokenize")] == [PROMPT, text, text]


def test_a_long_text_keeps_the_token_before_it(page):
    """What is cut off is the text's beginning, not the token that each text of the model begins with."""
    info = {"fingerprint": "of a model with one", "add_bos_token": True, "bos_token": "<|endoftext|>"}
    page.route("**/tokenizer_info", lambda route: route.fulfill(json=info))
    found = page.evaluate(
        """async () => {
            const { promptOf, withIds } = await import("/static/completing.js");
            const pieces = await withIds([{ text: "Ada sees the sea" }]);
            const ids = pieces.map((one) => one.id);
            return { ids, long: await promptOf(pieces, 3), whole: await promptOf(pieces, 99) };
        }"""
    )
    start, *rest = found["whole"]["prompt"]
    assert rest == found["ids"]
    assert start not in rest
    assert found["whole"]["num_cut"] == 0
    assert found["long"] == {"prompt": [start, *rest[-2:]], "num_cut": len(rest) - 2}


def test_a_text_that_is_too_long_to_be_kept_whole_stays_as_words(page):
    """Where there is no room for what the model thought of each token, a reload finds the words."""
    page.evaluate(
        """() => {
            const set = Storage.prototype.setItem;
            Storage.prototype.setItem = function (key, value) {
                if (value.length > 1000) throw new DOMException("full", "QuotaExceededError");
                set.call(this, key, value);
            };
        }"""
    )
    go_on(page)
    text = page.input_value("#text")
    page.reload()
    page.wait_for_selector("#served:has-text('step 2')")
    assert page.input_value("#text") == text
    assert page.locator(COLOURED).count() == 0


def test_stop_ends_the_wait(page):
    """Stop takes back a request that has no answer yet, and leaves the text as it is."""
    page.fill("[name=max_tokens]", "64")
    page.route("**/v1/completions", lambda route: None)  # an answer that never comes
    page.fill("#text", PROMPT)
    page.press("#text", "Control+Enter")
    page.click("#stop:enabled")
    page.wait_for_selector("#write-status:has-text('Stopped')")
    assert page.input_value("#text") == PROMPT


def test_edits_keep_what_comes_before_them(page):
    """A change in the middle takes the colours of what comes after it, and of nothing else."""
    go_on(page)
    count = page.locator(COLOURED).count()
    page.evaluate("document.querySelector('#text').setSelectionRange(12, 12)")
    page.press("#text", "x")
    assert 0 < page.locator(COLOURED).count() < count
    page.click("#undo")
    assert page.locator(COLOURED).count() == count


def test_a_prompt_that_is_html_stays_text(page, seen):
    """Markup is shown as it was typed, in the text and among the tokens, and nothing of it runs."""
    go_on(page, HOSTILE, max_tokens=4)
    assert page.input_value("#text").startswith(HOSTILE)
    page.click("#tab-tokens")
    page.fill("#tokens-text", HOSTILE)
    page.wait_for_selector(f"#tokens-numbers dd:text-is('{len(HOSTILE)}')")
    assert page.locator("img").count() == 0
    assert page.evaluate("document.body.dataset.broken") is None
    assert seen.messages == []


def test_an_error_is_said(page):
    """What the server refuses is said in its words, and the page goes on."""
    page.fill("[name=max_tokens]", "24")
    page.fill("#text", PROMPT)
    refused = {
        "error": {"message": "the server is busy", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    page.route("**/v1/completions", lambda route: route.fulfill(status=429, json=refused))
    page.click("#continue")
    page.wait_for_selector("#write-status.bad:has-text('the server is busy')")
    page.unroute("**/v1/completions")
    go_on(page)
    assert page.locator(COLOURED).count() >= 20
