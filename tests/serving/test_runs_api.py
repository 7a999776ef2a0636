"""The routes over runs: lists, lines from a place on, differences, and events while something grows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.serving.web import Web, run
from transformerlm.experiments.settings import named_defaults
from transformerlm.serving import runs_api

HOSTILE = "<img src=x onerror=alert(1)>"


def write_run(home: Path, name: str, lines: int = 3, *, d_model: int = 8) -> Path:
    """Write a run of some steps below `home`/runs."""
    directory = home / "runs" / name
    (directory / "checkpoints/step-00000002").mkdir(parents=True)
    records: list[dict[str, Any]] = [{"event": "started", "step": 0, "parameters": 10, "max_steps": lines}]
    records += [{"step": step, "metrics.loss": 5.0 / step} for step in range(1, lines + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (directory / "config.toml").write_text(f"[model]\nd_model = {d_model}\nnum_heads = 2\n")
    return directory


def ask_for(tmp_path: Path, *paths: str) -> list[Any]:
    """Return the answers of a server whose page shows `tmp_path`/runs."""
    answers: list[Any] = []

    async def ask(web: Web) -> None:
        for path in paths:
            answers.append(await web.client.get(path))

    run(tmp_path, ask, sections={"web": {"runs_dir": str(tmp_path / "runs")}})
    return answers


def test_runs_are_listed_with_their_names_as_they_are(tmp_path):
    """A name is data, whatever it looks like; nested runs have a path as their name."""
    write_run(tmp_path, "first")
    write_run(tmp_path, "quick/run")
    write_run(tmp_path, HOSTILE.replace("/", ""))
    (answer,) = ask_for(tmp_path, "/api/runs")
    assert {one["name"] for one in answer.json()["runs"]} == {"first", "quick/run", HOSTILE}
    assert {one["step"] for one in answer.json()["runs"]} == {3}


def test_a_run_has_its_configuration_and_checkpoints(tmp_path):
    """With dotted keys, and the defaults of training beside them; what is no step has no place."""
    directory = write_run(tmp_path, "quick/run")
    (directory / "checkpoints/step-²").mkdir()
    (answer,) = ask_for(tmp_path, "/api/run?run=quick/run")
    assert answer.json() == {
        "name": "quick/run",
        "config": {"model.d_model": 8, "model.num_heads": 2},
        "defaults": named_defaults(),
        "checkpoints": [2],
    }


def test_lines_are_read_on_from_where_the_last_answer_ended(tmp_path):
    """The place is a file and an offset in it."""
    directory = write_run(tmp_path, "first")

    async def ask(web: Web) -> None:
        first = (await web.client.get("/api/lines?run=first")).json()
        assert [one["step"] for one in first["lines"]] == [0, 1, 2, 3]
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"event": "sample", "step": 3, "text.output": HOSTILE}) + "\n")
        place = "&".join(f"{key}={first[key]}" for key in ("file", "offset", "every"))
        second = (await web.client.get(f"/api/lines?run=first&{place}")).json()
        assert [one["text.output"] for one in second["lines"]] == [HOSTILE]
        assert not second["reset"]
        other = (await web.client.get("/api/lines?run=first&file=1-2&offset=999999&every=1")).json()
        assert other["reset"]
        assert len(other["lines"]) == 5

    run(tmp_path, ask, sections={"web": {"runs_dir": str(tmp_path / "runs")}})


def test_differences_are_those_of_the_configurations(tmp_path):
    """A key in which all runs agree is none."""
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", d_model=16)
    (answer,) = ask_for(tmp_path, "/api/differences?run=a&run=b")
    assert answer.json() == {"differences": {"model.d_model": {"a": 8, "b": 16}}}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/lines?run=../secret", 404),
        ("/api/lines?run=/etc", 404),
        ("/api/run?run=first/../../secret", 404),
        ("/api/run?run=first%00", 404),
        ("/api/differences?run=first&run=..", 404),
        ("/api/differences?run=first", 400),
        ("/api/lines", 400),
        ("/api/lines?run=first&run=first", 400),
        ("/api/lines?run=first&offset=-1", 400),
        ("/api/lines?run=first&offset=1e9", 400),
        ("/api/lines?run=first&every=\u0663", 400),
        ("/api/lines?run=linked", 404),
    ],
)
def test_a_name_is_looked_up_and_never_a_path(path, status, tmp_path):
    """Whatever is asked for, only runs that are listed are read."""
    write_run(tmp_path, "first")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "runs/linked").symlink_to(tmp_path / "secret")
    (answer,) = ask_for(tmp_path, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_page_may_be_left_out(tmp_path):
    """Without the page there are no routes for it."""
    answers: list[int] = []

    async def ask(web: Web) -> None:
        answers.append((await web.client.get("/api/runs")).status_code)

    run(tmp_path, ask, sections={"web": {"enabled": False}})
    assert answers == [404]


def test_the_head_of_the_events_is_an_answer_that_ends(tmp_path):
    """A stream without an end would keep the connection of who asks for headers alone."""

    async def ask(web: Web) -> None:
        answer = await asyncio.wait_for(web.client.head("/api/events"), 60)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"].startswith("text/event-stream")

    run(tmp_path, ask)


def test_events_tell_of_what_grows_and_end_with_the_server(tmp_path, monkeypatch):
    """One look serves all listeners; another checkpoint is told, too; draining ends the stream."""
    monkeypatch.setattr(runs_api, "LOOK_SECONDS", 0.02)
    directory = write_run(tmp_path, "first")

    async def ask(web: Web) -> None:
        served = web.app.state.served
        api = runs_api._RunsApi(tmp_path / "runs")
        streams = [api._watch.events(served) for _ in range(2)]
        for stream in streams:
            assert (await asyncio.wait_for(anext(stream), 60)).startswith("event: model\n")
        waiting = [asyncio.create_task(anext(stream)) for stream in streams]
        await asyncio.sleep(0.1)
        with (directory / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4}\n')
        for told in await asyncio.wait_for(asyncio.gather(*waiting), 60):
            assert told == 'event: grown\ndata: {"runs": ["first"]}\n\n'
        web.engine.state = "draining"
        for stream in streams:
            assert [one async for one in stream] == []
        assert api._watch._task is None

    run(tmp_path, ask)
