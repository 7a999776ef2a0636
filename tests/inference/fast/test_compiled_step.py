"""The compiled step against the model, and its rows against themselves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.fast.test_decoder import VARIANTS, make_varied
from transformerlm.inference.fast import choice, choice_kernels, compiled_step, step_kernels, uncompiled
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.models.layers import FEED_FORWARDS

CASES = [changes for changes in VARIANTS if changes.get("norm_position") != "post"]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_logits_are_the_models(changes: dict[str, Any]) -> None:
    """Prompts of 3, 7 and 5 ids read together in slots out of order, then single steps: one full pass's logits."""
    model, counts, slots = make_varied(**changes), [3, 7, 5], [2, 0, 3]
    decoder, ids = Decoder(model, reproducible=True), torch.randint(257, (3, 16))
    assert decoder.reads_rows
    with torch.inference_mode():
        expected = model(ids)
        cache = decoder.make_slots(4)
        chunks = [row[:count].tolist() for row, count in zip(ids, counts, strict=True)]
        vectors, _ = decoder.read_rows(chunks, cache=cache, slots=slots, starts=[0, 0, 0])
        for row, (own, count, slot) in enumerate(zip(vectors, counts, slots, strict=True)):
            torch.testing.assert_close(decoder.head(own), expected[row, :count], rtol=1e-4, atol=1e-4)
            cache.lengths[slot] = count
        for step in range(4):
            new = [int(row[count + step]) for row, count in zip(ids, counts, strict=True)]
            logits = decoder.step_slots(new, cache=cache, slots=slots)
            rows = torch.stack([expected[row, count + step] for row, count in enumerate(counts)])
            torch.testing.assert_close(logits, rows, rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share out the rows of a step, the ids of a prompt, and both; one alone gives the same bits."""
    decoder, ids = Decoder(make_varied(), reproducible=True), torch.randint(257, (9, 12)).tolist()

    def outcome() -> list[torch.Tensor]:
        cache = decoder.make_slots(9)
        vectors, _ = decoder.read_rows(ids, cache=cache, slots=[*range(9)], starts=[0] * 9)
        vectors += decoder.read_rows([[*range(16)]], cache=cache, slots=[3], starts=[0])[0]
        cache.lengths = [12] * 9
        logits = decoder.step_slots([*range(9)], cache=cache, slots=[*range(9)])
        cache.lengths[7] = 0
        more, beside = decoder.read_rows([ids[7]], cache=cache, slots=[7], starts=[0], running=([5] * 7, [*range(7)]))
        assert cache.lengths == [14] * 7 + [0, 13]  # the caller counts what is read
        return [*vectors, logits, *more, beside]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outcome()
        monkeypatch.setattr(compiled_step, "_LEAST_WORK", 1)
        monkeypatch.setattr(compiled_step, "_IDS_TOGETHER", 1)
        torch.set_num_threads(3)
        assert all(map(torch.equal, outcome(), alone))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "reason"), [({"norm_position": "post"}, "norm_position"), ({"dtype": torch.float64}, "only fp32")]
)
def test_what_is_not_compiled_is_said(changes: dict[str, Any], reason: str) -> None:
    """Such a decoder takes PyTorch's products, as where numba is missing."""
    settings = {name: value for name, value in changes.items() if name != "dtype"}
    model = make_varied(**settings).to(changes.get("dtype", torch.float32))
    device = torch.device("cpu")
    dtype = model.token_embeddings.weight.dtype
    assert reason in compiled_step.why_not(model.settings, device=device, dtype=dtype)
    assert not Decoder(model, reproducible=True).reads_rows


def test_what_each_process_would_compile_again_is_for_reproducible_texts_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing can be kept on disk, a single text would take longer by compiling first."""
    model = make_varied()
    assert Decoder(model).reads_rows
    monkeypatch.setattr(compiled_step, "_stays", lambda: False)
    assert not Decoder(model).reads_rows
    assert Decoder(model, reproducible=True).reads_rows


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT is set"), ("NUMBA_DISABLE_JIT", "0", "")],
)
def test_numba_may_be_told_to_compile_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    """Its own variable says so; 0 is as if it were not there."""
    monkeypatch.setenv(name, value)
    assert compiled_step._missing.__wrapped__() == reason


@pytest.mark.parametrize("ffn", ["swiglu", "silu"])
def test_a_layer_of_ones_own_is_not_compiled(monkeypatch: pytest.MonkeyPatch, ffn: str) -> None:
    """The loops have the activations of the layers that are here: with another class, PyTorch computes the step."""

    class Own(FEED_FORWARDS[ffn]):  # type: ignore[misc]
        """A layer whose activation is another one."""

        @staticmethod
        def activate(*products: torch.Tensor) -> torch.Tensor:
            """Return the product of what is positive."""
            return torch.stack([torch.relu(each) for each in products]).prod(dim=0)

    monkeypatch.setitem(FEED_FORWARDS, "own", Own)
    model, ids = make_varied(ffn="own"), torch.randint(257, (2, 12))
    decoder = Decoder(model, reproducible=True)
    assert not decoder.reads_rows
    with torch.inference_mode():
        cache = decoder.make_slots(2)
        steps = [decoder.step_slots(column.tolist(), cache=cache, slots=[0, 1]) for column in ids.unbind(1)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(ids), rtol=1e-4, atol=1e-4)


def test_a_step_that_cannot_be_compiled_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """numba compiles at the first call: where it fails, texts are made all the same, with one warning for both uses."""

    def fail(*_: object) -> None:
        raise OSError("[Errno 28] No space left on device")

    model = make_varied()
    plain = Decoder(model, reproducible=True)
    monkeypatch.setattr(plain, "_compiled", None)
    monkeypatch.setattr(compiled_step, "_failures", [])
    uncompiled.warn_once.cache_clear()
    with torch.inference_mode():
        for decoder in (Decoder(model, reproducible=True), Decoder(model, reproducible=True)):
            monkeypatch.setattr(decoder._compiled, "_step", fail)
            assert not decoder.reads_rows
            caches = [each.make_slots(2) for each in (decoder, plain)]
            for each, cache in zip((decoder, plain), caches, strict=True):
                each.read_chunk(torch.arange(5).view(1, 5), cache=cache, slots=[1], start=0)
                cache.lengths[1] = 5
            steps = [
                each.step_slots([7], cache=cache, slots=[1])
                for each, cache in zip((decoder, plain), caches, strict=True)
            ]
            assert torch.equal(*steps)
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_a_failure_ends_all_trials(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A single text is made all the same, and no other decoder of the process tries to compile."""

    def fail(*_: object) -> None:
        raise OSError("[Errno 28] No space left on device")

    model, ids = make_varied(), torch.randint(257, (2, 12))
    monkeypatch.setattr(compiled_step, "_failures", [])
    uncompiled.warn_once.cache_clear()
    decoder = Decoder(model)
    monkeypatch.setattr(decoder._compiled, "_step", fail)
    with torch.inference_mode():
        cache = decoder.make_cache(2)
        pieces = [decoder(part, cache=cache) for part in ids.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-4, atol=1e-4)
    assert "No space left" in caplog.text
    assert compiled_step.why_not(model.settings, device=ids.device, dtype=torch.float32).startswith("OSError")
    assert Decoder(model)._compiled is None


def test_drawing_is_compiled_where_a_decoder_has_loaded_its_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first ids of a short text would wait for the compiler."""
    decoder = Decoder(make_varied())
    monkeypatch.setattr(step_kernels.step, "_calls", {})
    assert choice._kernels() is None
    decoder.make_cache(1)
    assert choice._kernels() is choice_kernels


def test_what_one_decoder_found_out_the_next_one_knows() -> None:
    """The one that serves the next checkpoint of a run tries nothing again."""
    model = make_varied()
    for compiled in (True, False):
        earlier, later = (Decoder(model, reproducible=True, compiled=compiled) for _ in range(2))
        later.take_findings(earlier)
        assert later.reads_rows == earlier.reads_rows == compiled
    plain, later = Decoder(model, compiled=False), Decoder(model)
    later.take_findings(plain)
    assert not later.reads_rows
    plain.take_findings(Decoder(model))  # which has loops, and cannot give them
    assert not plain.reads_rows


@pytest.mark.parametrize("token_id", [257, -1, 10**12])
def test_ids_and_places_that_are_not_there_are_refused(token_id: int) -> None:
    """The loops check nothing: they would read what lies beside the embedding, or after the last rotation."""
    decoder = Decoder(make_varied())
    length = decoder.context_length
    cache, slots = decoder.make_cache(1), decoder.make_slots(2)
    for ids in ([[token_id]], [[1, token_id, 2]]):
        with pytest.raises(IndexError, match=f"expected ids from 0 to 256 .* {token_id}"):
            decoder(torch.tensor(ids), cache=cache)
    with pytest.raises(IndexError, match="expected ids"):
        decoder.step_slots([3, token_id], cache=slots, slots=[0, 1])
    with pytest.raises(ValueError, match="exceed its max_length"):
        decoder(torch.zeros(2, length + 1, dtype=torch.int64), cache=slots)
    slots.lengths = [0, length]
    for running in ([], [1]):
        with pytest.raises(IndexError, match=f"places before {length}"):
            decoder.read_rows(
                [[1] * (length + (not running))], cache=slots, slots=[0], starts=[0], running=(running, running)
            )


def test_a_part_of_a_prompt_that_fails_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next part waits for each of its layers, and the error is the caller's."""
    decoder = Decoder(make_varied())
    cache, loops = decoder.make_slots(1), decoder._compiled
    assert loops is not None
    make, parts = loops._make_scratch, []

    def fail_first(*settings: object) -> object:
        parts.append(settings)
        if len(parts) == 1:
            raise MemoryError
        return make(*settings)

    monkeypatch.setattr(loops, "_make_scratch", fail_first)
    monkeypatch.setattr(compiled_step, "_LEAST_WORK", 1)
    monkeypatch.setattr(compiled_step, "_IDS_TOGETHER", 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(MemoryError):
            decoder.read_rows([[*range(16)]], cache=cache, slots=[0], starts=[0])
    finally:
        torch.set_num_threads(before)


def test_weights_may_lie_in_any_order() -> None:
    """A decoder makes its own copy of an embedding, one row after the other."""
    model, ids = make_varied(), torch.randint(257, (1, 9))
    weight = model.token_embeddings.weight
    weight.data = weight.data.T.contiguous().T
    decoder = Decoder(model)
    with torch.inference_mode():
        found = decoder(ids, cache=decoder.make_cache(1))
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-4)
