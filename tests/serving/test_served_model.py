"""One checkpoint as the engine has it: what is ready when it is, and what it reads of long texts."""

from __future__ import annotations

import pytest

from tests.inference.helpers import greedy_without_cache
from tests.serving.command import save_random_model
from tests.serving.helpers import engine_settings, request
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.document_ids import KEY, DocumentIds
from transformerlm.checkpoints.load import load_model
from transformerlm.inference.fast import choice
from transformerlm.serving.served_model import ServedModel
from transformerlm.tokenizer import Tokenizer


def test_the_loops_that_draw_are_compiled_before_it_is_ready(run, monkeypatch):
    """Else the first text would wait for them, some seconds after the server has said that it makes texts."""
    asked: list[str] = []
    monkeypatch.setattr(choice, "_compiled_kernels", lambda: asked.append("compiled"))
    ServedModel(run, engine_settings(run), prefix_cache_bytes=0)
    assert asked == ["compiled"]


@pytest.mark.parametrize("starts_texts", [True, False])
def test_a_long_text_keeps_the_token_before_it(files, tmp_path, starts_texts):
    """A model that never saw text without it reads it before each window; the window of another one has one id more."""
    start = Tokenizer.from_directory(files.tokenizer).special_token_ids["<|endoftext|>"]
    state = {KEY: DocumentIds(start, (start,), starts_texts=starts_texts).to_state()}
    run = save_random_model(tmp_path / "run", files, changes={"model.context_length": 16}, state=state)
    model, prompt = ServedModel(run, engine_settings(run), prefix_cache_bytes=0), [start, *range(40, 60)]
    model.start(request("a", prompt=prompt, max_tokens=30, temperature=0.0, ignore_eos=True))
    ids: list[int] = []
    while not model.is_idle:
        ids += [token_id for _, piece in model.step()[0] for token_id in piece.token_ids]
    start_id = start if starts_texts else None
    assert ids == greedy_without_cache(load_model(resolve(run)), prompt, 30, start_id=start_id)
