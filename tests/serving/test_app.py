"""The routes that tell of the server: models, health, metrics."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.serving.web import Web, run, settings
from transformerlm.serving.app import runs_dir_of


def test_models_are_the_served_one_and_what_the_run_keeps(tmp_path):
    """Each name can be given as a request's model, and has its card."""

    async def ask(web: Web) -> None:
        cards = (await web.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "tiny@step-00000140", "tiny@step-00000020"]
        assert (cards[0]["max_model_len"], cards[0]["max_logprobs"]) == (64, 20)
        assert (cards[0]["step"], cards[0]["val_loss"], cards[0]["parameters"]) == (140, 2.5, 1000)
        assert cards[2]["step"] == 20
        assert "val_loss" not in cards[2]
        for card in cards:
            assert (await web.client.get(f"/v1/models/{card['id']}")).json() == card
        assert (await web.client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"

    run(tmp_path, ask)


def test_a_checkpoint_may_lie_anywhere(tmp_path):
    """A directory that was copied out of its run has a card, too, under its own name."""

    async def ask(web: Web) -> None:
        copy = str(tmp_path / "copied")
        web.engine.facts, web.engine.kept = replace(web.engine.facts, path=copy, checkpoint="copied"), ["copied"]
        cards = (await web.client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["step"]) for card in cards] == [("copied", 140), ("copied@copied", 140)]

    run(tmp_path, ask)


def test_a_name_may_be_chosen(tmp_path):
    """The configured name is the model's."""

    async def ask(web: Web) -> None:
        assert (await web.client.get("/v1/models/mine/7b")).json()["id"] == "mine/7b"
        assert (await web.complete(model="tiny", prompt="a")).status_code == 404

    run(tmp_path, ask, sections={"name": "mine/7b"})


@pytest.mark.parametrize("state", ["loading", "stalled", "dead", "draining"])
def test_health_says_whether_it_makes_tokens(tmp_path, state):
    """200 with the engine's numbers while it does, else 503 with its state."""

    async def ask(web: Web) -> None:
        answer = await web.client.get("/health")
        assert answer.status_code == 200
        expected = {"status": "ok", "model": "tiny", "step": 140, "running": 0, "waiting": 0, "last_token_age_s": None}
        assert {name: answer.json()[name] for name in expected} == expected
        web.engine.state = state
        answer = await web.client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, state)
        refused = await web.complete(prompt="a")
        assert refused.status_code == 503
        assert state in refused.json()["error"]["message"]

    run(tmp_path, ask)


def test_metrics_count(tmp_path):
    """Texts, refusals, tokens and times are in Prometheus' format."""

    async def ask(web: Web) -> None:
        await web.choices(prompt="ab", max_tokens=3, n=2)
        await web.complete(prompt="ab", n=99)
        answer = await web.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        assert lines['transformerlm_requests_total{finish="length"}'] == "2.0"
        assert lines['transformerlm_requests_rejected_total{reason="invalid_value"}'] == "1.0"
        assert lines["transformerlm_generated_tokens_total"] == "6.0"
        assert lines["transformerlm_time_to_first_token_seconds_count"] == "2.0"
        assert lines["transformerlm_queue_seconds_count"] == "2.0"
        assert lines["transformerlm_queue_seconds_sum"] == "0.5"
        assert lines["transformerlm_inter_token_seconds_count"] == "4.0"
        assert lines["transformerlm_step_seconds_count"] == "6.0"
        assert (lines["transformerlm_slots"], lines["transformerlm_model_step"]) == ("4.0", "140.0")
        await web.complete(prompt="ab", max_tokens=0, echo=True, logprobs=1)  # no token is drawn
        text = (await web.client.get("/metrics")).text
        assert "transformerlm_time_to_first_token_seconds_count 2.0" in text
        assert "transformerlm_queue_seconds_count 3.0" in text

    run(tmp_path, ask)


def test_unknown_places_and_methods_are_errors_of_the_same_form(tmp_path):
    """404 and 405 are JSON, too."""

    async def ask(web: Web) -> None:
        for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
            answer = await web.client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == "unknown_url"

    run(tmp_path, ask)


def test_events_of_the_engine_are_told(tmp_path):
    """A new checkpoint and a new start are events of the server."""

    async def ask(web: Web) -> None:
        web.engine.on_event({"event": "reloaded", "step": 160})
        assert web.events == [{"event": "reloaded", "step": 160}]
        await asyncio.sleep(0)

    run(tmp_path, ask)


@pytest.mark.parametrize(
    "checkpoint", ["runs/a", "runs/a/best", "runs/a/checkpoints/best", "runs/a/checkpoints/step-00000010"]
)
def test_the_runs_beside_the_served_one_are_shown(checkpoint, tmp_path, monkeypatch):
    """However the checkpoint is named, it is the directory that its run is in."""
    monkeypatch.chdir(tmp_path)
    assert runs_dir_of(settings(checkpoint=checkpoint)) == tmp_path / "runs"
    assert runs_dir_of(settings(checkpoint=checkpoint, web={"runs_dir": "elsewhere"})).name == "elsewhere"
