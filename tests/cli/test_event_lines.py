"""Events on stdout never hold the program up."""

from __future__ import annotations

import io
import json
import os
import threading
import time

from cli.event_lines import EventLines


def test_events_are_json_lines():
    """Each event is one line with its name first."""
    stream = io.StringIO()
    lines = EventLines(stream)
    lines.tell("serving", {"step": 1})
    lines.tell("stopped", {})
    lines.close()
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"event": "serving", "step": 1},
        {"event": "stopped"},
    ]


def test_a_reader_that_does_not_read_costs_events_and_no_time():
    """While the pipe is full, events are dropped; the next one that has room says how many."""

    class Full(io.StringIO):
        may_go_on = threading.Event()

        def write(self, text: str) -> int:
            self.may_go_on.wait()
            return super().write(text)

    stream = Full()
    lines = EventLines(stream)
    for number in range(10_200):
        lines.tell("request", {"number": number})
    stream.may_go_on.set()
    while len(stream.getvalue().splitlines()) < 10_000:
        time.sleep(0.01)
    lines.tell("stopped", {})
    lines.close(60)
    *others, last = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert last["event"] == "stopped"
    assert len(others) + last["dropped_events"] == 10_200


def test_a_reader_that_has_gone_ends_nothing():
    """A closed pipe is not an error of the program."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", encoding="utf-8")
    lines = EventLines(stream)
    for _ in range(3):
        lines.tell("request", {})
    lines.close(60)
    stream.close()  # it holds nothing that it could not write


def test_who_ends_the_program_does_not_wait_for_a_reader():
    """While the thread waits for room in a pipe, others may flush the stream, as Python does at its end."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", encoding="utf-8")
    lines = EventLines(stream)
    for number in range(9_000):  # more than any pipe holds
        lines.tell("request", {"number": number, "text": "x" * 200})
    lines.close(0.2)
    flushing = threading.Thread(target=stream.flush, daemon=True)
    flushing.start()
    flushing.join(60)
    assert not flushing.is_alive()
    os.close(reading)
    lines.close(60)
    stream.close()
