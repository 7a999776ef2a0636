"""Dropout: the formula, its masks as a function of keys, and where a model drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformerlm.models.dropout import KEYS_OF_LAYER, dropout, dropped, num_keys
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM

SIZES = {"vocab_size": 50, "context_length": 12, "d_model": 16, "num_layers": 2, "num_heads": 2}
EVERYWHERE = {"embedding": 0.2, "attention": 0.3, "residual": 0.4}


def random_keys(*shape: int, seed: int = 0) -> torch.Tensor:
    """Keys `(*shape, 2)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (*shape, 2), dtype=torch.int64, generator=generator).to(torch.int32)


def make_model(**changes: Any) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(**{**SIZES, "dropout": EVERYWHERE, **changes}).train()


def some_ids(batch: int = 4) -> torch.Tensor:
    return torch.randint(0, 50, (batch, 12), generator=torch.Generator().manual_seed(1))


def hashed_in_plain_numbers(first: int, second: int, place: int) -> int:
    """The same hash with Python's integers, as an unsigned word."""
    word = place ^ (first % 2**32)
    word = word * 0x7FEB352D % 2**32
    word = word ^ (word >> 15) ^ (second % 2**32)
    word = word * 0x846CA68B % 2**32
    return word ^ (word >> 16)


def test_what_is_dropped_follows_the_formula() -> None:
    """Python's integers, which do not overflow, give the same mask, up to the last number of an odd shape."""
    keys = random_keys(3)
    found = dropped(keys, (5, 7), 0.3).flatten(1)
    threshold = round(0.3 * 2**32)
    for row, (first, second) in enumerate(keys.tolist()):
        words = [hashed_in_plain_numbers(first, second, place) for place in range(35)]
        expected = [(word + 2**31) % 2**32 < threshold for word in words]  # as a signed word, lowest first
        assert found[row].tolist() == expected


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_probability(probability: float) -> None:
    """Over the numbers of one key, over keys, and in pairs that are neighbours, as for independent draws."""
    masks = dropped(random_keys(300), (1000,), probability).double()
    sigma = (probability * (1 - probability)) ** 0.5
    assert abs(masks.mean() - probability) < 4 * sigma / 300_000**0.5
    for dim, count in ((0, 300), (1, 1000)):
        deviations = (masks.mean(dim=dim) - probability) / (sigma / count**0.5)
        assert deviations.std() == pytest.approx(1.0, abs=0.15)
        assert deviations.abs().max() < 5.5
    together = {"numbers": masks[:, 1:] * masks[:, :-1], "keys": masks[1:] * masks[:-1]}
    for pairs in together.values():
        assert abs(pairs.mean() - probability**2) < 4 * (probability**2 * (1 - probability**2) / 299_000) ** 0.5


def test_kept_numbers_are_scaled_and_gradients_pass_through_them_alone() -> None:
    """`x / (1 - p)` where kept, 0 where dropped, the same for the gradient; infinite numbers are dropped too."""
    x, key = torch.randn(4, 6, 8, requires_grad=True), random_keys(4)
    gone = dropped(key, (6, 8), 0.25)
    result = dropout(x, 0.25, key)
    torch.testing.assert_close(result, torch.where(gone, 0.0, x / 0.75))
    result.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(gone, 0.0, 1 / 0.75))
    assert 0 < gone.sum() < gone.numel()
    assert dropout(torch.full((4, 6, 8), torch.inf), 0.25, key)[gone].eq(0).all()


def test_nothing_is_dropped_without_a_key_or_a_probability() -> None:
    """The very same tensor comes back."""
    x = torch.randn(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, random_keys(2)) is x


def test_a_probability_near_one_drops_nearly_all() -> None:
    """The largest float below 1 is no overflow."""
    assert dropped(random_keys(2), (500,), 1 - 2**-53).all()


@pytest.mark.parametrize("changes", [{}, {"norm_position": "post"}, {"num_kv_heads": 1, "qk_norm": True}], ids=str)
def test_each_row_drops_by_its_own_keys_in_any_batch(changes: dict[str, Any]) -> None:
    """A row alone, or among others, has the same vectors, to the last bits that a batch may change."""
    model, ids, keys = make_model(**changes), some_ids(), random_keys(num_keys(2), 4)
    together = model(ids, dropout_keys=keys)
    for row in range(4):
        alone = model(ids[row : row + 1], dropout_keys=keys[:, row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids, dropout_keys=keys.flip(1)), together, atol=1e-2)


def place_of_key(index: int) -> str:
    """Where the model uses a key."""
    return "embedding" if index == 0 else ("attention", "residual", "residual")[(index - 1) % KEYS_OF_LAYER]


@pytest.mark.parametrize("index", range(num_keys(2)))
def test_each_key_is_that_of_one_place(index: int) -> None:
    """Another key there changes the result if numbers are dropped there, and does not if none are."""
    ids, keys, place = some_ids(), random_keys(num_keys(2), 4), place_of_key(index)
    others = keys.clone()
    others[index] = random_keys(4, seed=1)
    with torch.no_grad():
        for probabilities, changes in ((EVERYWHERE, True), ({**EVERYWHERE, place: 0.0}, False)):
            model = make_model(dropout=probabilities)
            same = torch.equal(model(ids, dropout_keys=keys), model(ids, dropout_keys=others))
            assert same is not changes


def test_recomputed_activations_have_the_same_masks() -> None:
    """`activation_checkpointing` changes no gradient."""
    ids, keys, gradients = some_ids(), random_keys(num_keys(2), 4), []
    for recompute in (False, True):
        model = make_model(activation_checkpointing=recompute)
        model(ids, dropout_keys=keys).square().mean().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_the_mean_over_masks_is_the_model_without_dropout() -> None:
    """Dropping from the embedding and the stream keeps the mean of what a last, linear, layer adds."""
    settings = {"norm_position": "none", "num_layers": 1, "dropout": {"residual": 0.5}}
    model, ids = make_model(**settings), some_ids(1)
    with torch.no_grad():
        model.layers[0].attn.output_proj.weight.zero_()
        many = model(ids.expand(4000, -1), dropout_keys=random_keys(num_keys(1), 4000)).mean(dim=0)
        torch.testing.assert_close(many, model(ids)[0], rtol=0.05, atol=0.05)


def test_a_model_in_training_does_not_leave_dropout_out_in_silence() -> None:
    """Without keys it is refused where gradients are recorded; evaluation and a model without dropout need none."""
    model, ids = make_model(), some_ids()
    with pytest.raises(ValueError, match="expected dropout_keys"):
        model(ids)
    with pytest.raises(ValueError, match="expected 7 rows of dropout_keys, got 4"):
        model(ids, dropout_keys=random_keys(4, 4))
    plain = make_model(dropout=None)
    torch.testing.assert_close(model.eval()(ids), plain(ids), rtol=0, atol=0)
    torch.testing.assert_close(make_model(dropout=dict.fromkeys(EVERYWHERE, 0.0))(ids), plain(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ({"residual": 1.0}, r"model\.dropout\.residual: expected at least 0 and below 1, got 1\.0"),
        ({"attention": -0.1}, r"model\.dropout\.attention: expected at least 0"),
        ({"hidden": 0.1}, r"model\.dropout: expected embedding, attention, residual, got hidden"),
    ],
)
def test_probabilities_are_checked(probabilities: dict[str, float], message: str) -> None:
    """A place that does not exist, and a probability that is none, are named."""
    with pytest.raises(ValueError, match=message):
        ModelSettings(**SIZES, dropout=probabilities)


@pytest.mark.slow
def test_compiled_masks_are_the_same_bits() -> None:
    """The words wrap around in compiled code as they do elsewhere, also after the last whole vector."""
    compiled = torch.compile(dropped, dynamic=True)
    for shape in ((200, 301), (7,), (3, 5, 7)):
        keys = random_keys(37)
        assert torch.equal(compiled(keys, shape, 0.37), dropped(keys, shape, 0.37))
    model, ids, keys = make_model(), some_ids(), random_keys(num_keys(2), 4)
    torch.testing.assert_close(torch.compile(model)(ids, dropout_keys=keys), model(ids, dropout_keys=keys))
