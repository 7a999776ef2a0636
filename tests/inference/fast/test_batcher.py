"""The batcher: texts that join and leave get the ids that each gets alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.helpers import greedy_without_cache, make_model
from transformerlm.inference.fast import decoder as decoder_module
from transformerlm.inference.generate import Batcher, Decoder, answer
from transformerlm.inference.penalties import Penalties
from transformerlm.inference.requests import Drawn, Finished, PromptScored, Request, TokenLogprobs
from transformerlm.inference.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether steps are compiled."""
    return bool(request.param)


def run(batcher: Batcher, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, Finished]]:
    """Return the ids and the last event of each request."""
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ends: dict[str, Finished] = {}
    for request in requests:
        batcher.submit(request)
    while not batcher.is_idle:
        for event in batcher.step():
            assert event.request_id not in ends, f"{event} after the last event"
            if isinstance(event, Drawn):
                ids[event.request_id].append(event.token_id)
            if isinstance(event, Finished):
                ends[event.request_id] = event
    return ids, ends


def make_request(name: object, prompt: list[int], count: int = 30, **settings: Any) -> Request:
    return Request(request_id=str(name), prompt=prompt, max_new_tokens=count, **{"sampling": GREEDY, **settings})


@pytest.mark.parametrize("context_length", [200, 16, 5, 1])
def test_texts_that_share_slots_are_as_alone(context_length: int, compiled: bool) -> None:
    """Seven prompts in three slots, shorter and longer than the context and than a chunk: the plain model's ids."""
    model = make_model(context_length=context_length, num_kv_heads=2)
    prompts = [torch.randint(0, 257, (length,)).tolist() for length in (1, 4, 9, 15, 16, 30, 150)]
    batcher = Batcher(Decoder(model, compiled=compiled), slots=3)
    ids, ends = run(batcher, [make_request(number, prompt) for number, prompt in enumerate(prompts)])
    assert list(ids.values()) == [greedy_without_cache(model, prompt, 30) for prompt in prompts]
    assert {end.reason for end in ends.values()} == {"length"}


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("context_length", [200, 16, 5, 1])
def test_each_window_begins_with_the_id_that_starts_texts(context_length: int, reproducible: bool) -> None:
    """Beside texts of which the prompt does not begin with it, and whose windows have no room for it."""
    model = make_model(context_length=context_length)
    prompts = [torch.randint(0, 257, (length,)).tolist() for length in (1, 4, 15, 30, 150)]
    prompts += [[7, *prompt] for prompt in prompts]
    decoder = Decoder(model, reproducible=reproducible)
    requests = [make_request(number, prompt, start_id=7) for number, prompt in enumerate(prompts)]
    ids, _ = run(Batcher(decoder, slots=3, prefill_chunk=16, prefix_cache_bytes=10**6), requests)
    assert list(ids.values()) == [greedy_without_cache(model, prompt, 30, start_id=7) for prompt in prompts]


def prompts_of(dice: random.Random, count: int, longest: int) -> list[list[int]]:
    """Return prompts of which half begin alike, some of them wholly."""
    common = [dice.randrange(257) for _ in range(longest)]
    own = [[dice.randrange(257) for _ in range(dice.randint(1, longest))] for _ in range(count)]
    return [
        common[: dice.choice([16, 32, 33, longest])] + prompt[: number % 3] if number % 2 else prompt
        for number, prompt in enumerate(own)
    ]


def undisturbed(decoder: Decoder, requests: list[Request]) -> dict[str, list[Drawn]]:
    """Return what is drawn for each request when it has a batcher of one slot for itself."""
    drawn: dict[str, list[Drawn]] = {}
    for request in requests:
        batcher = Batcher(decoder, slots=1, prefill_chunk=16)
        batcher.submit(request)
        while not batcher.is_idle:
            drawn.setdefault(request.request_id, []).extend(e for e in batcher.step() if isinstance(e, Drawn))
    return drawn


def under_load(decoder: Decoder, requests: list[Request], slots: int, seed: int, cache: int) -> dict[str, list[Drawn]]:
    """Return the same with requests that come at random moments, and others that are cancelled at random."""
    dice = random.Random(seed)
    batcher = Batcher(decoder, slots=slots, prefill_chunk=16, prefix_cache_bytes=cache)
    left, drawn, others = list(requests), {request.request_id: [] for request in requests}, []
    while left or not batcher.is_idle:
        for _ in range(dice.choice([0, 0, 1, slots]) if left else 0):
            if left:
                batcher.submit(left.pop())
            if dice.random() < 0.4:
                others.append(f"other {len(others)} {len(left)}")
                ids = [dice.randrange(257) for _ in range(dice.randint(1, 60))]
                batcher.submit(make_request(others[-1], ids, 99))
        if others and (dice.random() < 0.5 or not left):
            batcher.cancel(others.pop(dice.randrange(len(others))))
        for event in batcher.step():
            if isinstance(event, Drawn) and event.request_id in drawn:
                drawn[event.request_id].append(event)
    return drawn


def seeded(prompts: list[list[int]], seeds: range, count: int) -> list[Request]:
    return [
        make_request(
            (number, seed),
            prompt,
            count,
            sampling=SamplingParams(temperature=0.9, top_p=0.95),
            generator=torch.Generator().manual_seed(seed),
            num_logprobs=2,
        )
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are not compiled, as where the extra `fast` is not installed."""
    monkeypatch.setattr(decoder_module, "why_not", lambda *_, **__: "numba is not installed")


def make_reproducible(precision: str, **changes: Any) -> Decoder:
    model = make_model(**{"context_length": 200, "d_model": 48, "num_heads": 6, "num_kv_heads": 3, **changes})
    model = model.bfloat16() if precision == "bf16" else model
    return Decoder(model, int8=precision == "int8", reproducible=True)


@pytest.mark.usefixtures("without_numba")
def test_a_text_is_the_same_without_numba() -> None:
    """In fp32, as below: the products of PyTorch do not depend on the other rows either, as they are called."""
    test_a_text_is_the_same_whatever_the_others_do("fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_text_is_the_same_whatever_the_others_do(precision: str) -> None:
    """Ids and log-probabilities to the last bit: few slots or many, joins, cancels, with a prefix cache and without."""
    decoder, prompts = make_reproducible(precision), prompts_of(random.Random(0), 6, 70)
    assert not decoder.steps_all_slots
    expected = undisturbed(decoder, seeded(prompts, range(2), 12))
    for slots, cache in ((2, 0), (8, 10**7), (32, 10**5)):
        assert under_load(decoder, seeded(prompts, range(2), 12), slots, slots, cache) == expected


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_fifty_prompts_and_four_seeds_are_the_same_at_any_load(precision: str) -> None:
    """The same on a larger model, whose feed-forward layers pass 1,024 features, over more than one block of keys."""
    sizes = {
        "context_length": 300,
        "d_model": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_ff": 1376,
        "num_layers": 3,
        "vocab_size": 1000,
    }
    decoder, prompts = make_reproducible(precision, **sizes), prompts_of(random.Random(1), 50, 150)
    assert not decoder.steps_all_slots
    expected = undisturbed(decoder, seeded(prompts, range(4), 24))
    for slots, cache in ((1, 10**8), (2, 0), (8, 10**8), (32, 0), (32, 10**6)):
        assert under_load(decoder, seeded(prompts, range(4), 24), slots, slots, cache) == expected


def test_where_rows_are_not_equal_all_slots_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fixed shapes a text does not depend on the others either, for one number of slots."""
    monkeypatch.setattr(Decoder, "_rows_are_independent", lambda _: False)
    decoder, prompts = make_reproducible("fp32"), prompts_of(random.Random(0), 4, 70)
    assert decoder.steps_all_slots
    expected = under_load(decoder, seeded(prompts, range(1), 8), 4, 0, 0)
    assert under_load(decoder, seeded(prompts, range(1), 8), 4, 1, 10**7) == expected


@pytest.mark.parametrize("cache", [0, 10**7])
def test_a_prompt_that_is_known_is_not_read_again(cache: int) -> None:
    """The second of two equal prompts copies all of it, and a longer one its whole chunks; the ids are the same."""
    decoder, prompt = make_reproducible("fp32"), [*range(40)]
    batcher = Batcher(decoder, slots=1, prefill_chunk=16, prefix_cache_bytes=cache)
    requests = [make_request(name, ids, 5) for name, ids in (("a", prompt), ("b", prompt), ("c", [*prompt, 1, 2]))]
    ids, ends = run(batcher, requests)
    assert [end.num_prompt_reused for end in ends.values()] == ([0, 40, 32] if cache else [0, 0, 0])
    assert ids == {name: [one.token_id for one in drawn] for name, drawn in undisturbed(decoder, requests).items()}


def test_a_long_prompt_delays_a_text_by_one_chunk_at_most() -> None:
    """While five chunks are read, one a step, the text that runs gets an id in each step but the last one's."""
    batcher = Batcher(Decoder(make_model(context_length=200), compiled=False), slots=2, prefill_chunk=16)
    batcher.submit(make_request("runs", [1], 50))
    batcher.step()
    batcher.submit(make_request("comes", [2] * 70, 50))
    drawn = [[event.request_id for event in batcher.step()] for _ in range(7)]
    assert drawn == [["runs"]] * 5 + [["comes"], ["runs", "comes"]]


@pytest.mark.parametrize(("length", "expected"), [(10, [7]), (30, [4, 3]), (100, [1, 1, 1, 2, 1, 1])])
def test_a_step_reads_the_prompts_that_its_budget_holds(length: int, expected: list[int]) -> None:
    """In a model this small a chunk always takes less than a step. Their ids are those that each has alone."""
    check_begun(length, expected)


@pytest.mark.parametrize("chunk", [16, 128])
def test_between_two_ids_of_a_text_at_most_a_chunk_is_read(chunk: int) -> None:
    """However many prompts come. Compiled steps let it run in each call; else a first id comes before it goes on."""
    decoder = Decoder(make_model(context_length=300), reproducible=True)
    batcher = Batcher(decoder, slots=8, prefill_chunk=chunk)
    batcher.submit(make_request("runs", [1], 200))
    batcher.step()
    for number, length in enumerate((250, 3, 16, 17, 90, 128)):
        batcher.submit(make_request(number, [number + 2] * length, 5))
    waited, begun, most = 0, set(), 0
    while len(begun) < 6:
        before = batcher.num_read
        drawn = {event.request_id for event in batcher.step() if isinstance(event, Drawn)}
        waited = waited + batcher.num_read - before
        most, waited = max(most, waited), 0 if "runs" in drawn else waited
        assert ("runs" in drawn) == (decoder.reads_rows or not drawn - begun - {"runs"})
        begun |= drawn - {"runs"}
    assert most == chunk


def test_short_prompts_pass_a_long_one_but_not_without_end() -> None:
    """Beside a stream of prompts of 20 ids one of 100 ids begins when some 200 ids of others were read."""
    batcher = Batcher(Decoder(make_model(context_length=300), reproducible=True), slots=16, prefill_chunk=64)
    batcher.submit(make_request("runs", [1], 190))
    batcher.step()
    batcher.submit(make_request("long", [2] * 100, 1))
    begun: list[str] = []
    for number in range(60):
        batcher.submit(make_request(f"short {number}", [3 + number] * 20, 1))
        batcher.submit(make_request(f"other {number}", [99 + number] * 20, 1))
        begun += [e.request_id for e in batcher.step() if isinstance(e, Drawn) and e.request_id != "runs"]
    assert "short" in begun[0]
    assert 5 < begun.index("long") < 15


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize(("length", "expected"), [(10, [3, 3, 1]), (30, [2, 2, 2, 1]), (100, [1] * 7)])
def test_without_numba_each_prompt_costs_a_pass(length: int, expected: list[int]) -> None:
    """So fewer of them take no longer than one chunk."""
    check_begun(length, expected)


def check_begun(length: int, expected: list[int]) -> None:
    """Assert that of seven texts so many begin in each step, with the ids that each has alone."""
    decoder = Decoder(make_model(context_length=200), reproducible=True)
    batcher = Batcher(decoder, slots=7)
    requests = [make_request(number, [number + 1] * length, 8) for number in range(7)]
    for request in requests:
        batcher.submit(request)
    drawn: dict[str, list[Drawn]] = {}
    begun = []
    while not batcher.is_idle:
        before = len(drawn)
        for event in batcher.step():
            if isinstance(event, Drawn):
                drawn.setdefault(event.request_id, []).append(event)
        begun.append(len(drawn) - before)
    assert [count for count in begun if count] == expected
    alone = [run(Batcher(decoder, slots=1), [request])[0] for request in requests]
    assert [{name: [one.token_id for one in events]} for name, events in drawn.items()] == alone


def test_a_request_may_be_cancelled_while_it_waits_is_read_or_runs(compiled: bool) -> None:
    """Each ends with one event, its slot goes to the next, and the others' ids stay."""
    decoder = Decoder(make_model(context_length=200), compiled=compiled)
    batcher = Batcher(decoder, slots=2, prefill_chunk=16)
    for name, length in (("runs", 3), ("is read", 100), ("waits", 5), ("stays", 7)):
        batcher.submit(make_request(name, [length] * length, 20))
    events = batcher.step() + batcher.step()
    for name in ("runs", "is read", "waits", "unknown"):
        batcher.cancel(name)
    while not batcher.is_idle:
        events += batcher.step()
    ends = {event.request_id: event.reason for event in events if isinstance(event, Finished)}
    assert ends == {"runs": "cancelled", "is read": "cancelled", "waits": "cancelled", "stays": "length"}
    ids = [event.token_id for event in events if isinstance(event, Drawn) and event.request_id == "stays"]
    assert ids == answer(decoder, make_request("stays", [7] * 7, 20))
    assert (batcher.running, batcher.waiting) == (0, 0)


@pytest.mark.parametrize("bad", [13, 0])
def test_a_row_without_finite_logits_ends_alone(bad: int, compiled: bool) -> None:
    """An id whose vector is NaN ends its own text; neighbours and the next one in its slot do not notice."""
    model = make_model(context_length=64)
    with torch.no_grad():
        model.token_embeddings.weight[bad] = torch.nan
    for decoder in (Decoder(model, compiled=compiled), Decoder(model, reproducible=True)):
        requests = [
            make_request(name, [*prompt], 6) for name, prompt in (("a", b"abcd"), ("bad", [5, bad]), ("b", b"xyz"))
        ]
        ids, ends = run(Batcher(decoder, slots=2), requests)
        assert {name: end.reason for name, end in ends.items()} == {"a": "length", "bad": "error", "b": "length"}
        assert ids == {"a": answer(decoder, requests[0]), "bad": [], "b": answer(decoder, requests[2])}


def test_a_prompts_log_probabilities_are_the_models(compiled: bool) -> None:
    """Over several chunks, with the most likely ids beside each; the first id has none, and 0 new ids may be asked."""
    model = make_model(context_length=100)
    prompt = torch.randint(0, 257, (50,)).tolist()
    batcher = Batcher(Decoder(model, compiled=compiled), slots=1, prefill_chunk=16, prefix_cache_bytes=10**6)
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0].log_softmax(-1)  # (50, vocab)
    for count in (0, 2):
        batcher.submit(make_request(count, prompt, count, num_prompt_logprobs=3, num_logprobs=1))
        events = []
        while not batcher.is_idle:
            events += batcher.step()
        scored = next(event for event in events if isinstance(event, PromptScored)).logprobs
        assert [one.token_id for one in scored] == prompt
        assert (scored[0].logprob, scored[0].top) == (None, [])
        for place, one in enumerate(scored[1:]):
            assert one.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-4)
            assert [pair[0] for pair in one.top] == expected[place].topk(3).indices.tolist()
        drawn = [event for event in events if isinstance(event, Drawn)]
        assert len(drawn) == count
        assert all(isinstance(one.logprobs, TokenLogprobs) and len(one.logprobs.top) == 1 for one in drawn)


def test_the_scores_of_a_prompt_that_is_cut_follow_the_id_that_starts_texts(compiled: bool) -> None:
    """Of what was read each id is scored after that one and those before it; there is an entry for each id."""
    model = make_model()
    prompt = [7, *torch.randint(0, 257, (40,)).tolist()]
    batcher = Batcher(Decoder(model, compiled=compiled), slots=1)
    batcher.submit(make_request("a", prompt, 0, num_prompt_logprobs=0, start_id=7))
    events = []
    while not batcher.is_idle:
        events += batcher.step()
    scored = next(event for event in events if isinstance(event, PromptScored)).logprobs
    with torch.no_grad():
        expected = model(torch.tensor([[7, *prompt[-15:]]]))[0].log_softmax(-1)  # (16, vocab)
    assert [one.token_id for one in scored] == prompt
    assert all(one.logprob is None for one in scored[:-15])
    for place, one in enumerate(scored[-15:]):
        assert one.logprob == pytest.approx(float(expected[place, one.token_id]), abs=1e-4)


def test_penalties_and_an_earliest_end_are_those_of_the_plain_loop(compiled: bool) -> None:
    """Beside a text without any."""
    decoder = Decoder(make_model(context_length=64), compiled=compiled)
    plain = make_request("plain", [3, 5], 40)
    end = answer(decoder, plain)[2]
    requests = [
        plain,
        make_request("penalised", [3, 5], 40, penalties=Penalties(presence=1.0, frequency=0.5, repetition=1.3)),
        make_request("ends late", [3, 5], 40, ends=frozenset([end]), min_tokens=8),
    ]
    ids, _ = run(Batcher(decoder, slots=3), requests)
    assert ids == {request.request_id: answer(decoder, request) for request in requests}
    assert len({tuple(each) for each in ids.values()}) == 3
    assert len(ids["ends late"]) >= 8


def test_what_is_read_is_counted_and_what_is_read_again_apart(compiled: bool) -> None:
    """Half of the context each time that a text has filled it; and nothing of a prompt once it is known."""
    batcher = Batcher(
        Decoder(make_model(context_length=32), compiled=compiled), slots=1, prefill_chunk=16, prefix_cache_bytes=10**6
    )
    run(batcher, [make_request("slides", [*range(31)], 40)])  # full after 2 ids, 19 and 36
    assert (batcher.num_read, batcher.num_read_again) == (31, 3 * 16)
    run(batcher, [make_request("known", [*range(31)], 1)])
    assert (batcher.num_read, batcher.num_read_again) == (31, 3 * 16)


def test_prompts_that_are_forgotten_are_read_again(compiled: bool) -> None:
    """The ids are the same, and none is kept any more."""
    batcher = Batcher(
        Decoder(make_model(context_length=32), compiled=compiled), slots=1, prefill_chunk=16, prefix_cache_bytes=10**6
    )
    found = [run(batcher, [make_request("a", [*range(20)], 5)])[0]]
    batcher.forget_prefixes()
    found += [run(batcher, [make_request("a", [*range(20)], 5)])[0] for _ in range(2)]
    assert found[0] == found[1] == found[2]
    assert batcher.num_read == 60


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_text_that_slides_goes_on_beside_a_stream_of_long_prompts(before: int, compiled: bool) -> None:
    """Prompts and windows are read in turns, whatever was read before: neither waits for the other to end."""
    batcher = Batcher(Decoder(make_model(context_length=32), compiled=compiled), slots=6, prefill_chunk=16)
    dice = random.Random(1)

    def long_prompt(number: int) -> Request:
        return make_request(f"long {number}", [dice.randrange(257) for _ in range(32)], 1)

    for number in range(before):
        run(batcher, [make_request(f"before {number}", [number], 1)])
    batcher.submit(make_request("slides", [*range(31)], 200))
    told: list[int] = []
    for step in range(120):
        for number in range(3):
            batcher.submit(long_prompt(3 * step + number))
        told += [step for event in batcher.step() if isinstance(event, Drawn) and event.request_id == "slides"]
    assert max(later - earlier for earlier, later in itertools.pairwise([*told, 120])) < 12


def test_alternatives_are_the_same_beside_a_text_that_asks_for_more() -> None:
    """Where logits are equal, which of them are among the first few does not depend on the neighbour."""
    model = make_model()
    model.lm_head.weight.data[1::2] = model.lm_head.weight.data[:-1:2]  # ids in pairs with equal logits
    decoder = Decoder(model, reproducible=True)
    one = make_request("one", [1, 2, 3], num_logprobs=5)

    def tops(*others: Request) -> list[list[tuple[int, float]]]:
        batcher = Batcher(decoder, slots=2)
        for request in (one, *others):
            batcher.submit(request)
        events = [event for _ in range(60) for event in batcher.step() if isinstance(event, Drawn)]
        return [event.logprobs.top for event in events if event.request_id == "one" and event.logprobs is not None]

    assert len(tops()) == 30
    assert tops() == tops(make_request("two", [4, 5], num_logprobs=20))


def test_of_a_long_prompt_only_its_last_window_counts(compiled: bool) -> None:
    """What comes before it may be left out, past the next windows too, unless its ids have a penalty of their own."""
    decoder = Decoder(make_model(), compiled=compiled)
    prompt = torch.randint(0, 257, (50,)).tolist()

    def text(prompt: list[int], **penalties: float) -> list[int]:
        return run(Batcher(decoder, slots=1), [make_request("a", prompt, penalties=Penalties(**penalties))])[0]["a"]

    assert text(prompt, presence=0.5) == text(prompt[-16:], presence=0.5)
    assert text(prompt, repetition=5.0) != text(prompt[-16:], repetition=5.0)


def test_the_end_that_was_drawn_is_scored_as_the_other_ids_are(compiled: bool) -> None:
    """Its log-probability is the model's own; nothing is said where nobody asks, or where the limit ends the text."""
    model, prompt = make_model(), [5, 6, 7]
    batcher = Batcher(Decoder(model, compiled=compiled), slots=3)
    ids = greedy_without_cache(model, prompt, 8)
    end = next(token_id for token_id in ids if token_id != ids[0])
    before = ids[: ids.index(end)]
    asked = {"ends": frozenset([end]), "num_logprobs": 1}
    _, ends = run(
        batcher,
        [
            make_request("asked", prompt, 8, **asked),
            make_request("quiet", prompt, 8, ends=frozenset([end])),
            make_request("limit", prompt, len(before), **asked),
        ],
    )
    with torch.no_grad():
        expected = model(torch.tensor([prompt + before]))[0, -1].log_softmax(-1)[end].item()
    found = ends["asked"].end
    assert found is not None
    assert (found.token_id, [token_id for token_id, _ in found.top]) == (end, [end])
    assert found.logprob == pytest.approx(expected, abs=1e-4)
    assert (ends["asked"].reason, ends["quiet"], ends["limit"].end) == ("stop", Finished("quiet", "stop"), None)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_slot_takes_memory_when_it_is_used(compiled: bool) -> None:
    """Sixteen slots of 134 MB in all take nearly nothing at first, and one short text a part of one slot."""
    decoder = Decoder(make_model(context_length=4096, d_model=64, num_heads=4, num_layers=4), compiled=compiled)
    run(Batcher(decoder, slots=1), [make_request("warm", [1], 2)])
    before = resident_bytes()
    batcher = Batcher(decoder, slots=16)
    assert resident_bytes() - before < 8e6
    run(batcher, [make_request("one", [1] * 20, 5)])
    assert resident_bytes() - before < 24e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_scores_of_a_long_prompt_take_little_memory() -> None:
    """1,024 positions of 50,000 ids: all logits at once would be 205 MB, and twice that to normalise."""
    decoder = Decoder(make_model(context_length=1024, vocab_size=50_000), compiled=False)
    batcher = Batcher(decoder, slots=1)
    run(batcher, [make_request("warm", [1] * 4, 1, num_prompt_logprobs=5)])
    before, peak = resident_bytes(), 0
    batcher.submit(make_request("long", [7] * 1024, 0, num_prompt_logprobs=5))
    while not batcher.is_idle:
        batcher.step()
        peak = max(peak, resident_bytes())
    assert peak - before < 100e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "found none"),
        ({"prompt": [257]}, "ids from 0 to 256, found ids from 257 to 257"),
        ({"prompt": [256], "num_prompt_logprobs": 0}, "ids from 0 to 255"),
        ({"prompt": [1], "max_new_tokens": -1}, "at least 0, got -1"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_answered_is_an_error(settings: dict[str, Any], message: str, compiled: bool) -> None:
    """At once, and nothing is left of it."""
    batcher = Batcher(Decoder(make_model(), compiled=compiled), slots=1, vocab_size=256)
    with pytest.raises(ValueError, match=message):
        batcher.submit(Request(**{"request_id": "", "max_new_tokens": 1, **settings}))
    assert batcher.is_idle


@pytest.mark.parametrize(
    "settings", [{"slots": 0}, {"slots": 1, "prefill_chunk": 8}, {"slots": 1, "prefill_chunk": 48}]
)
def test_a_batcher_that_cannot_be_is_an_error(settings: dict[str, Any], compiled: bool) -> None:
    """No slot, or chunks that are not on the grid."""
    with pytest.raises(ValueError, match=r"batcher: (slots|prefill_chunk) must be"):
        Batcher(Decoder(make_model(), compiled=compiled), **settings)
