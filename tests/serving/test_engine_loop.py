"""The engine's loop in a thread of the test: texts, checkpoints beside the served one, and taking over new ones."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from tests.checkpoints.helpers import flip_bit, make_snapshot
from tests.inference.helpers import make_tokenizer
from tests.serving.helpers import LONG, engine_settings, request, tiny_checkpoint
from transformerlm.checkpoints.directory import point
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.inference.generate import Decoder
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.texts import Pieces
from transformerlm.serving.checkpoint_loader import Opened
from transformerlm.serving.engine import Piece
from transformerlm.serving.engine_loop import EngineLoop
from transformerlm.serving.protocol import MOST_UNTAKEN, Ask, Told
from transformerlm.serving.served_model import ServedModel


class Over(Exception):
    """Ends the loop."""


class Talk:
    """A loop that runs in a thread, and what it has told."""

    def __init__(self, checkpoint: Path, **changes: Any) -> None:
        self.settings = engine_settings(checkpoint, **changes)
        self.inbox: SimpleQueue[object] = SimpleQueue()
        self.told: list[Told] = []
        self.takes_steps = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            EngineLoop(self.settings, self.inbox, self._take).run()
        except Over:
            return

    def _take(self, told: Told) -> None:
        self.told.append(told)
        if told.report is not None and self.takes_steps:
            self.inbox.put(Ask(taken=1))

    def close(self) -> None:
        self.inbox.put(Over())
        self._thread.join(LONG)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LONG
        while not condition():
            assert time.monotonic() < end, self.told[-3:]
            assert self._thread.is_alive() or condition()
            time.sleep(0.005)

    def pieces(self, name: str) -> list[Piece]:
        return [piece for told in list(self.told) for one, piece in told.pieces if one == name]

    def text(self, name: str, **changes: Any) -> list[Piece]:
        """Ask for a text and return its pieces."""
        self.inbox.put(Ask(submit=[request(name, **changes)]))
        self.until(lambda: any(piece.finish for piece in self.pieces(name)))
        return self.pieces(name)

    def refusal(self, name: str, **changes: Any) -> str:
        """Ask for what is refused and return why."""
        self.inbox.put(Ask(submit=[request(name, **changes)]))
        found: list[str] = []
        self.until(
            lambda: (
                found.extend(r.reason for told in list(self.told) for r in told.refused if r.request_id == name)
                or found
            )
        )
        return found[0]

    def serves(self, step: int) -> None:
        """Wait until new requests go to this step."""
        self.until(lambda: any(told.serving and told.serving.step == step for told in list(self.told)))


@pytest.fixture
def talk() -> Iterator[Callable[..., Talk]]:
    """Return what begins a loop; all end with the test."""
    talks: list[Talk] = []

    def begin(checkpoint: Path, **changes: Any) -> Talk:
        talks.append(Talk(checkpoint, **changes))
        return talks[-1]

    yield begin
    for one in talks:
        one.close()


def ids_of(pieces: list[Piece]) -> list[int]:
    """Return the ids of a text."""
    return [token_id for piece in pieces for token_id in piece.token_ids]


def contents(run: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.is_symlink()}


def test_a_text_ends_at_its_limit_at_a_stop_string_or_by_a_cancel(run, talk):
    """Pieces add up to the whole text, before the stop string; a text that was cancelled makes room."""
    one = talk(run)
    whole = one.text("whole", max_tokens=14, seed=3)
    text = "".join(piece.text for piece in whole)
    assert (whole[-1].finish, whole[-1].num_tokens, len(ids_of(whole))) == ("length", 14, 14)
    stop = text[4:6]
    stopped = one.text("stopped", max_tokens=14, seed=3, stop=["never", stop])
    assert "".join(piece.text for piece in stopped) == text[: text.index(stop)]
    assert (stopped[-1].finish, stopped[-1].stop_string) == ("stop", stop)
    assert ids_of(stopped) == ids_of(whole)[: stopped[-1].num_tokens]
    one.inbox.put(Ask(submit=[request("long", max_tokens=10**6, ignore_eos=True)]))
    one.until(lambda: one.pieces("long"))
    one.inbox.put(Ask(cancel=["long", "unknown"], ping=5))
    one.until(lambda: one.pieces("long")[-1].finish == "cancelled")
    assert any(told.pong == 5 and not told.is_loading for told in one.told)


def test_a_text_is_the_one_that_infer_gives(run, talk):
    """The same prompt, seed and settings give the text of `Predictor`, byte for byte, at four streams."""
    one = talk(run)
    predictor = Predictor.from_checkpoint(run, device="cpu", reproducible=True)
    prompts = ["Ada", "Bob sees", "Émile likes the sea.", "Zoë"]
    settings = {"temperature": 0.9, "top_p": 0.9}
    asked = [
        request(name, prompt=predictor.tokenizer.encode_ordinary(name), seed=seed, max_tokens=7, **settings)
        for seed, name in enumerate(prompts)
    ]
    one.inbox.put(Ask(submit=asked))
    for seed, name in enumerate(prompts):
        one.until(lambda name=name: [piece for piece in one.pieces(name) if piece.finish])
        text = name + "".join(piece.text for piece in one.pieces(name))
        assert text == predictor.generate(name, seed=seed, max_new_tokens=7, **settings)


def test_a_checkpoint_without_a_tokenizer_is_refused(files, tmp_path):
    """A model that was imported without one can make no text, and the error says so."""
    save_checkpoint(tmp_path / "checkpoints", 1, replace(make_snapshot(files), tokenizer=None))
    with pytest.raises(ValueError, match="step-00000001: expected a tokenizer, found none"):
        EngineLoop(engine_settings(tmp_path), SimpleQueue(), lambda told: None)


def test_what_was_reused_and_how_likely_the_ids_were_is_told(run, talk):
    """The same prompt again is not read again, and its text is the same; log-probabilities come with their ids."""
    one = talk(run)
    prompt = list(range(40, 50))
    first, second = one.text("a", prompt=prompt), one.text("b", prompt=prompt)
    assert ids_of(first) == ids_of(second)
    assert (first[-1].num_prompt_reused, second[-1].num_prompt_reused) == (0, 10)
    reports = [told.report for told in one.told if told.report is not None]
    assert sum(report.prompt_tokens for report in reports) == 10
    assert sum(report.reused_tokens for report in reports) == 10
    assert sum(report.generated_tokens for report in reports) == 16
    assert all(0 <= report.choice_seconds <= report.seconds for report in reports)
    scored = one.text("c", prompt=prompt, num_logprobs=2, num_prompt_logprobs=1, max_tokens=3)
    found = [piece.logprobs for piece in scored if piece.logprobs is not None]
    assert [token_id for each in found for token_id in each.token_ids] == ids_of(first)[:3]
    assert [len(top) for each in found for top in each.top] == [2, 2, 2]
    prompts = [piece.prompt_logprobs for piece in scored if piece.prompt_logprobs is not None]
    assert [(each.token_ids, each.logprobs[0]) for each in prompts] == [(prompt, None)]


def test_a_request_that_the_model_cannot_do_is_refused_alone(run, talk):
    """An id that the model does not have and an empty stop string end no other text."""
    one = talk(run)
    assert "ids from 0 to 289" in one.refusal("a", prompt=[290])
    assert "empty" in one.refusal("b", stop=[""])
    assert one.text("c")[-1].finish == "length"


def test_a_request_may_name_another_checkpoint_of_the_run(run, talk):
    """Its text is that of the step it names, beside texts of the served one, and each piece says so."""
    one, other = talk(run), talk(run / "checkpoints" / "step-00000001")
    served, named = one.text("a"), one.text("b", checkpoint="step-00000001")
    expected = other.text("a")
    assert ids_of(named) == ids_of(expected) != ids_of(served)
    assert {(piece.step, piece.fingerprint) for piece in named} == {(1, expected[0].fingerprint)}
    assert {piece.step for piece in served} == {2}
    assert ids_of(one.text("c", checkpoint="step-00000002")) == ids_of(served)
    assert ids_of(one.text("d", checkpoint="step-00000001")) == ids_of(named)
    assert "no longer" in one.refusal("e", checkpoint="../checkpoints/step-00000001")
    assert not one.pieces("e")


def test_a_step_that_a_run_wrote_again_is_loaded_again(files, tmp_path, talk):
    """The name of a checkpoint is what its directory holds now, also where the one before is still in memory."""
    for step in (1, 2):
        tiny_checkpoint(tmp_path, files, step)
    one = talk(tmp_path)
    name = "step-00000001"
    before = {piece.fingerprint for piece in [*one.text("a", checkpoint=name), *one.text("b", checkpoint=name)]}
    shutil.rmtree(tmp_path / "checkpoints" / name)
    save_checkpoint(tmp_path / "checkpoints", 1, make_snapshot(files, steps=7))
    after = {piece.fingerprint for piece in [*one.text("c", checkpoint=name), *one.text("d", checkpoint=name)]}
    assert (len(before), len(after), before & after) == (1, 1, set())


def test_no_more_than_two_steps_are_ahead_of_who_takes_them(run, talk):
    """The loop waits for its reader, still answers it, and goes on by as many steps as were taken."""
    one = talk(run)
    one.takes_steps = False
    one.inbox.put(Ask(submit=[request("a", max_tokens=10**6, ignore_eos=True)]))

    def steps_after(ping: int, **ask: Any) -> int:
        one.inbox.put(Ask(ping=ping, **ask))
        one.until(lambda: any(told.pong == ping for told in list(one.told)))
        return sum(told.report is not None for told in list(one.told))

    one.until(lambda: sum(told.report is not None for told in list(one.told)) == MOST_UNTAKEN)
    assert [steps_after(1), steps_after(2)] == [MOST_UNTAKEN] * 2
    one.inbox.put(Ask(taken=1))
    one.until(lambda: sum(told.report is not None for told in list(one.told)) == MOST_UNTAKEN + 1)
    assert steps_after(3) == MOST_UNTAKEN + 1


def test_one_kept_checkpoint_is_in_memory_beside_the_served_one(files, tmp_path, talk, monkeypatch):
    """Requests that name others wait for the texts of the one before, in their order; each has the text of its step."""
    for step in (1, 2, 3, 4):
        tiny_checkpoint(tmp_path, files, step)
    most: list[int] = []
    once = EngineLoop._step

    def step(loop: EngineLoop) -> None:
        most.append(len(loop._models()))
        once(loop)

    monkeypatch.setattr(EngineLoop, "_step", step)
    one = talk(tmp_path)
    names = [f"step-0000000{step}" for step in (1, 2, 3, 1, 2, 3, 4, 1)]
    asked = [request(f"r{number}", checkpoint=name) for number, name in enumerate(names)]
    gone = request("gone", checkpoint="step-00000003")
    one.inbox.put(Ask(submit=[*asked[:4], gone, *asked[4:], request("served")], cancel=["gone"]))
    for number, name in enumerate(names):
        one.until(lambda number=number: [piece for piece in one.pieces(f"r{number}") if piece.finish])
        assert {piece.step for piece in one.pieces(f"r{number}")} == {int(name[-1])}
    assert ids_of(one.pieces("r0")) == ids_of(one.pieces("r3")) == ids_of(one.pieces("r7"))
    assert ids_of(one.pieces("r6")) == ids_of(one.pieces("served"))
    assert [piece.finish for piece in one.pieces("gone")] == ["cancelled"]
    assert max(most) == 2


def test_what_waits_for_a_checkpoint_that_is_in_memory_begins(files, tmp_path):
    """One that was taken over meanwhile, and one that was served before, while texts of another named one go on."""
    for step in (1, 2, 3):
        tiny_checkpoint(tmp_path, files, step)
    told: list[Told] = []
    settings = engine_settings(tmp_path / "checkpoints" / "step-00000001")
    loop = EngineLoop(settings, SimpleQueue(), told.append)
    endless: dict[str, Any] = {"max_tokens": 10**6, "ignore_eos": True}

    def take_over(step: int, *, is_served: bool) -> None:
        directory = tmp_path / "checkpoints" / f"step-0000000{step}"
        loop._take_opened(Opened(ServedModel(directory, settings, prefix_cache_bytes=0), is_served=is_served))

    def made_by(name: str) -> set[int]:
        for _ in range(3):  # prompts and texts take turns
            loop._step()
        return {piece.step for one in told for request_id, piece in one.pieces if request_id == name}

    take_over(2, is_served=False)
    loop._submit(request("named", checkpoint="step-00000002", **endless))
    loop._submit(request("first", checkpoint="step-00000003", **endless))
    loop._open_next()
    assert list(loop._pending) == ["step-00000003"]
    take_over(3, is_served=True)
    assert (loop._pending, made_by("first")) == ({}, {3})
    take_over(1, is_served=True)
    loop._submit(request("second", checkpoint="step-00000003"))
    loop._open_next()
    assert (loop._pending, made_by("second"), made_by("named")) == ({}, {3}, {2})


def test_another_tokenizer_is_noticed_after_a_restart_too(files, tmp_path, talk):
    """A run that began anew with another tokenizer is not served to requests that were prepared with the first."""
    tiny_checkpoint(tmp_path, files, 5)
    facts = next(told.serving for told in _first_told(talk(tmp_path)) if told.serving is not None)
    assert set(facts.tokenizer_sums) == {"tokenizer/" + path.name for path in files.tokenizer.iterdir()}
    shutil.rmtree(tmp_path / "checkpoints")
    save_checkpoint(tmp_path / "checkpoints", 1, replace(make_snapshot(files), tokenizer=make_tokenizer()))
    with pytest.raises(ValueError, match="step-00000001: expected the tokenizer of step-00000005, found another"):
        EngineLoop(engine_settings(tmp_path, earlier=facts), SimpleQueue(), lambda told: None)
    one = talk(tmp_path, follow="newest", earlier=facts)
    one.until(lambda: any("waiting for a checkpoint that can be served" in (told.note or "") for told in one.told))
    [skipped] = [skip for told in one.told for skip in told.skipped]
    assert "expected the tokenizer of step-00000005, found another" in skipped.reason
    tiny_checkpoint(tmp_path, files, 2)
    one.serves(2)


def _first_told(one: Talk) -> list[Told]:
    one.until(lambda: any(told.serving for told in list(one.told)))
    return one.told


def test_an_error_of_ours_ends_the_text_that_it_is_of(run, talk, monkeypatch, capfd):
    """At its start and in the middle: the text says so, the log has the traceback, another text is as ever."""
    one = talk(run)
    expected = ids_of(one.text("before"))
    once = Pieces.push

    def push(pieces: Pieces, token_id: int) -> str:
        if pieces._matchers:
            raise KeyError(token_id)
        return once(pieces, token_id)

    monkeypatch.setattr(Pieces, "push", push)
    one.inbox.put(Ask(submit=[request("bad", stop=["never"]), request("good")]))
    one.until(lambda: [piece for piece in one.pieces("good") if piece.finish])
    assert ids_of(one.pieces("good")) == expected
    assert [piece.finish for piece in one.pieces("bad")] == ["error"]
    assert one.pieces("bad")[-1].error == f"KeyError: {expected[0]}"
    assert one.text("odd", seed="x")[-1].error == "RuntimeError: manual_seed expected a long, but got str"
    assert ids_of(one.text("after")) == expected
    assert capfd.readouterr().err.count("Traceback") == 2


def test_the_end_token_is_scored(run, talk):
    """A text that asks for log-probabilities is told that of the token that ended it."""
    one = talk(run)
    end = Predictor.from_checkpoint(run, device="cpu").document_ids.eos_token_ids[0]
    sure = {"logit_bias": {end: 100.0}, "seed": 1}
    [piece] = one.text("asked", num_logprobs=1, **sure)
    assert (piece.finish, piece.num_tokens, piece.end and piece.end.token_ids) == ("stop", 1, [end])
    assert one.text("quiet", **sure)[-1].end is None


def test_a_request_may_have_ends_of_its_own(files, tmp_path, talk):
    """A token that ends an answer ends this text and no other one; ignore_eos goes on past it."""
    tiny_checkpoint(tmp_path, files)
    one = talk(tmp_path)
    sure = {"logit_bias": {65: 100.0}, "seed": 1, "max_tokens": 3}
    [piece] = one.text("ends", end_ids=[65], **sure)
    assert (piece.finish, piece.text, piece.num_tokens) == ("stop", "", 1)
    for name, more in (("goes on", {}), ("ignores", {"end_ids": [65], "ignore_eos": True})):
        pieces = one.text(name, **sure, **more)
        assert (pieces[-1].finish, "".join(piece.text for piece in pieces)) == ("length", "AAA")


def test_checkpoints_that_do_not_fit_are_refused_with_the_reason(files, tmp_path, talk):
    """Another context, chat format or tokenizer, or none, and damage; who waits for a checkpoint may be cancelled."""
    tiny_checkpoint(tmp_path, files, 9)
    tiny_checkpoint(tmp_path, files, 5, {"model.context_length": 12})
    other = replace(make_snapshot(files), tokenizer=make_tokenizer())
    save_checkpoint(tmp_path / "checkpoints", 4, other)
    save_checkpoint(tmp_path / "checkpoints", 3, replace(other, tokenizer=None))
    chat = make_snapshot(files)
    save_checkpoint(tmp_path / "checkpoints", 8, replace(chat, state={**chat.state, "chat": {"user": "U:"}}))
    damaged = tiny_checkpoint(tmp_path, files, 6)
    flip_bit(damaged / "model.safetensors")
    flip_bit(tiny_checkpoint(tmp_path, files, 7) / "optimizer.safetensors")
    one = talk(tmp_path)
    assert "expected the tokenizer of step-00000009, found another" in one.refusal("t", checkpoint="step-00000004")
    assert "expected a tokenizer, found none" in one.refusal("n", checkpoint="step-00000003")
    assert "expected the chat format of step-00000009, found" in one.refusal("f", checkpoint="step-00000008")
    assert "expected context_length 16" in one.refusal("a", checkpoint="step-00000005")
    assert "model.safetensors is damaged" in one.refusal("b", checkpoint="step-00000006")
    one.inbox.put(Ask(submit=[request("c", checkpoint="step-00000007")], cancel=["c"], ping=1))
    one.until(lambda: one.pieces("c"))
    assert one.pieces("c")[-1].finish == "cancelled"
    assert one.text("d", checkpoint="step-00000007")[-1].step == 7  # nobody here needs the optimizer


def test_what_is_known_of_the_machine_is_not_found_out_again(files, tmp_path, talk, monkeypatch):
    """Only the first model of a shape tests whether rows are independent, which takes longer than to load it."""
    tested: list[int] = []
    once = Decoder._rows_are_independent

    def count(decoder: Decoder) -> bool:
        tested.append(len(tested))
        return once(decoder)

    monkeypatch.setattr(Decoder, "_rows_are_independent", count)
    tiny_checkpoint(tmp_path, files, 1)
    one = talk(tmp_path, follow="newest")
    one.serves(1)
    found = len(tested)
    tiny_checkpoint(tmp_path, files, 2)
    one.serves(2)
    assert len(tested) == found <= 1
    tiny_checkpoint(tmp_path, files, 3, {"model.d_ff": 96})
    one.serves(3)
    assert len(tested) == 2 * found


def test_texts_of_a_followed_run_are_each_of_one_step(files, tmp_path, talk):
    """A running text ends on the step on which it began, new ones are of the new step, and its name is told."""
    tiny_checkpoint(tmp_path, files, 1)
    one = talk(tmp_path, follow="newest")
    one.serves(1)
    one.inbox.put(Ask(submit=[request("old", max_tokens=10**6, ignore_eos=True)]))
    one.until(lambda: one.pieces("old"))
    tiny_checkpoint(tmp_path, files, 2)
    one.serves(2)
    assert {piece.step for piece in one.text("new")} == {2}
    so_far = len(one.pieces("old"))
    one.until(lambda: len(one.pieces("old")) > so_far)
    one.inbox.put(Ask(cancel=["old"]))
    one.until(lambda: one.pieces("old")[-1].finish)
    assert {piece.step for piece in one.pieces("old")} == {1}
    one.until(lambda: any(told.checkpoints == ["step-00000002", "step-00000001"] for told in one.told))


def test_a_damaged_newest_checkpoint_is_told_once_and_nothing_is_renamed(files, tmp_path, talk):
    """The server goes on with the old one; not a byte and not a name in the run changes."""
    tiny_checkpoint(tmp_path, files, 1)
    one = talk(tmp_path, follow="newest")
    one.serves(1)
    flip_bit(tiny_checkpoint(tmp_path / "other", files, 2) / "model.safetensors")
    (tmp_path / "other" / "checkpoints" / "step-00000002").rename(tmp_path / "checkpoints" / "step-00000002")
    before = contents(tmp_path)
    one.until(lambda: any(told.skipped for told in one.told))
    time.sleep(0.3)  # six looks more
    assert [(skip.checkpoint, "damaged" in skip.reason) for told in one.told for skip in told.skipped] == [
        ("step-00000002", True)
    ]
    assert one.text("a")[-1].step == 1
    assert contents(tmp_path) == before
    tiny_checkpoint(tmp_path, files, 3)
    one.serves(3)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("transformerlm.checkpoints.validation.file_sha256", OSError(errno.ESTALE, "Stale file handle", "weights")),
        ("transformerlm.serving.served_model.load_model", RuntimeError("CUDA out of memory")),
        ("transformerlm.serving.served_model.load_model", MemoryError()),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_read_now_is_taken_over_later(files, tmp_path, talk, monkeypatch, place, error):
    """The disk fails or memory runs out, once: that is told, and the same files are served a moment later."""
    tiny_checkpoint(tmp_path, files, 1)
    one = talk(tmp_path, follow="newest")
    one.serves(1)
    room, name = place.rsplit(".", 1)
    once, calls = getattr(import_module(room), name), []

    def fail_once(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return once(*arguments, **more)

    directory = tiny_checkpoint(tmp_path / "other", files, 2)
    monkeypatch.setattr(place, fail_once)
    directory.rename(tmp_path / "checkpoints" / directory.name)
    one.serves(2)
    [skipped] = [skip for told in one.told for skip in told.skipped]
    assert skipped.checkpoint == "step-00000002"
    assert skipped.reason.endswith("; it is tried again")
    assert skipped.reason.count("cannot be read") <= 1


def test_a_model_that_is_served_no_longer_keeps_no_prompts(files, tmp_path, talk, monkeypatch):
    """While its last text goes on, the memory for prompts that begin alike is that of the served one alone."""
    kept: list[list[bool]] = []
    once = EngineLoop._step

    def step(loop: EngineLoop) -> None:
        once(loop)
        kept.append([bool(model._batcher._prefixes._kept) for model in loop._models()])

    monkeypatch.setattr(EngineLoop, "_step", step)
    tiny_checkpoint(tmp_path, files, 1)
    one = talk(tmp_path, follow="newest")
    one.serves(1)
    one.inbox.put(Ask(submit=[request("old", max_tokens=10**6, ignore_eos=True)]))
    one.until(lambda: kept and kept[-1] == [True])
    tiny_checkpoint(tmp_path, files, 2)
    one.serves(2)
    one.text("new")
    one.until(lambda: len(kept[-1]) == 2)
    assert kept[-1] == [True, False]
    one.inbox.put(Ask(cancel=["old"]))
    one.until(lambda: one.pieces("old")[-1].finish)


def test_what_a_text_that_slides_reads_again_is_told(run, talk):
    """So that whoever watches the engine sees that it works; it counts as no prompt."""
    one = talk(run)
    one.text("a", max_tokens=40, ignore_eos=True)  # the context has 16 ids
    reports = [told.report for told in one.told if told.report is not None]
    assert sum(report.prompt_tokens for report in reports) == 2
    again = sum(report.read_again_tokens for report in reports)
    assert again > 0
    assert again % 8 == 0


def test_a_run_without_a_checkpoint_is_waited_for(files, tmp_path, talk):
    """The loop begins when the first one is there, and says once that it waits."""
    run = tmp_path / "run"
    run.mkdir()
    one = talk(run / "best", follow="best")
    one.until(lambda: one.told)
    directory = tiny_checkpoint(run, files, 1)
    time.sleep(0.2)
    assert [told.note for told in one.told] == [f"{run}: waiting for its first checkpoint"]
    point(run / "checkpoints" / "best", directory)
    one.serves(1)


def test_a_run_that_is_not_there_is_refused(tmp_path):
    """A mistyped name is not waited for."""
    settings = engine_settings(tmp_path / "none", follow="newest")
    with pytest.raises(ValueError, match="none: no such run directory"):
        EngineLoop(settings, SimpleQueue(), lambda told: None)
