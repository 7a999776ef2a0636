"""A checkpoint with more special tokens: the model knows what it knew, and has room for what it will learn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints.helpers import flip_bit, make_training
from tests.training.tiny_run import VOCAB_SIZE
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.load import load_config_of, load_model, load_tokenizer
from transformerlm.checkpoints.more_tokens import add_tokens, grow
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import CheckpointError, verify
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer

NEW = ["<|im_start|>", "<|im_end|>"]
TOLD = {"tokens": 7, "document_ids": None, "data": {"train_sha256": "a"}, "wandb_id": "b"}


@pytest.fixture
def run(files, tmp_path) -> Path:
    """Return a run with one checkpoint, of step 2."""
    return make_run(files, tmp_path / "run")


def make_run(files, run: Path, changes: dict | None = None) -> Path:
    """Save a run with one checkpoint, of step 2."""
    snapshot = make_training(files, changes)[2]
    save_checkpoint(run / "checkpoints", 2, replace(snapshot, state=TOLD))
    return run


def logits_of(model: TransformerLM) -> torch.Tensor:
    """Return the logits of some ids that every model here has."""
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12))


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_same_for_all_old_ids(tied, files, tmp_path):
    """All old weights stay, bit for bit; so the old ids have their logits, and what follows is as likely as before."""
    run = make_run(files, tmp_path / "run", {"model.tie_embeddings": tied})
    added = add_tokens(run, tmp_path / "out", NEW)
    assert added.ids == {"<|im_start|>": VOCAB_SIZE, "<|im_end|>": VOCAB_SIZE + 1}
    assert (added.known, added.vocab_size) == ({}, (VOCAB_SIZE, VOCAB_SIZE + 2))
    before, after = load_model(resolve(run)), load_model(resolve(tmp_path / "out"))
    assert load_config_of(added.path).model.vocab_size == after.vocab_size == VOCAB_SIZE + 2
    weights = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        assert torch.equal(weights[name][: len(weight)], weight), name
    torch.testing.assert_close(logits_of(after)[..., :VOCAB_SIZE], logits_of(before), rtol=1e-5, atol=1e-5)


def test_new_tokens_begin_as_likely_as_an_average_one(files):
    """Their logits are about the mean of all, so the two together take little from the others; no two are equal."""
    model = make_training(files)[0].eval()
    grown = grow(model, VOCAB_SIZE + 2, num_used=VOCAB_SIZE, seed=3)
    logits = logits_of(grown)
    mean = logits[..., :VOCAB_SIZE].mean(dim=-1, keepdim=True)
    spread = logits[..., :VOCAB_SIZE].std(dim=-1, keepdim=True)
    assert ((logits[..., VOCAB_SIZE:] - mean).abs() < 0.2 * spread).all()
    assert logits.softmax(dim=-1)[..., VOCAB_SIZE:].sum(dim=-1).max() < 3 / VOCAB_SIZE
    first, second = grown.token_embeddings.weight[VOCAB_SIZE:]
    assert not torch.equal(first, second)


def test_the_seed_decides_the_noise(files):
    """The same seed gives the same rows, another one others; rows that no token uses do not count."""
    model = make_training(files)[0]
    rows = [
        grow(model, VOCAB_SIZE + 2, num_used=VOCAB_SIZE, seed=seed).token_embeddings.weight[VOCAB_SIZE:]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    with torch.no_grad():
        model.token_embeddings.weight[-5:] = 1e6
    few = grow(model, VOCAB_SIZE + 2, num_used=VOCAB_SIZE - 5).token_embeddings.weight[VOCAB_SIZE:]
    assert few.abs().max() < 10


@pytest.mark.parametrize(("vocab_size", "num_used"), [(VOCAB_SIZE - 1, 5), (VOCAB_SIZE, 0), (400, VOCAB_SIZE + 1)])
def test_a_model_does_not_shrink(vocab_size, num_used, files):
    """The numbers are named."""
    with pytest.raises(ValueError, match=f"expected a vocab_size of {VOCAB_SIZE} or more"):
        grow(make_training(files)[0], vocab_size, num_used=num_used)


def test_rows_to_spare_are_taken_first(files, tmp_path):
    """A model with more rows than its tokenizer has ids stays as it is, and grows only by what it lacks."""
    run = make_run(files, tmp_path / "run", {"model.vocab_size": VOCAB_SIZE + 2})
    added = add_tokens(run, tmp_path / "out", NEW)
    assert added.vocab_size == (VOCAB_SIZE + 2, VOCAB_SIZE + 2)
    models = [load_model(resolve(path)) for path in (run, tmp_path / "out")]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    assert add_tokens(run, tmp_path / "more", [*NEW, "<|note|>"]).vocab_size == (VOCAB_SIZE + 2, VOCAB_SIZE + 3)


def test_the_checkpoint_says_where_it_comes_from(run, tmp_path):
    """Step, tokens and where documents end are the old ones; what only a run of its own could resume with is gone."""
    source = resolve(run)
    added = add_tokens(run, tmp_path / "out", NEW)
    state = verify(added.path)
    assert (state["step"], state["tokens"], state["document_ids"]) == (2, 7, None)
    assert state["extended_from"] == {"checkpoint": str(source), "special_tokens": NEW}
    assert state.keys().isdisjoint({"data", "wandb_id"})
    assert added.path == resolve(tmp_path / "out")
    for directory in (added.tokenizer, added.path / "tokenizer"):
        assert Tokenizer.from_directory(directory).special_tokens == ["<|endoftext|>", *NEW]
    config = load_config_of(added.path)
    assert config.data.tokenizer == tmp_path / "out/tokenizer"
    assert config.optimizer == load_config_of(source).optimizer


def test_nothing_of_the_source_changes(run, tmp_path):
    """Every file of it has the bytes it had, and there is no other file."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    add_tokens(run, tmp_path / "out", NEW)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_same_arguments_give_the_same_files(run, tmp_path):
    """Weights and tokenizer of two calls are equal to the byte."""
    paths = [add_tokens(run, tmp_path / name, NEW).path for name in ("one", "two")]
    names = ["model.safetensors", "tokenizer/vocab.json", "tokenizer/special_tokens.json"]
    for name in names:
        assert paths[0].joinpath(name).read_bytes() == paths[1].joinpath(name).read_bytes()


def test_tokens_that_are_there_are_told_apart(run, tmp_path):
    """A token that is special already has its id, and the model grows only for the others."""
    added = add_tokens(run, tmp_path / "out", ["<|endoftext|>", "<|im_end|>"])
    assert list(added.ids) == ["<|im_end|>"]
    assert added.known == load_tokenizer(resolve(run)).special_token_ids
    assert added.vocab_size == (VOCAB_SIZE, VOCAB_SIZE + 1)


def test_a_tokenizer_alone_becomes_a_tokenizer(files, tmp_path):
    """There is no model, and the directory is the tokenizer's."""
    added = add_tokens(files.tokenizer, tmp_path / "out", NEW)
    assert (added.path, added.tokenizer, added.vocab_size) == (tmp_path / "out", tmp_path / "out", None)
    assert Tokenizer.from_directory(tmp_path / "out").vocab_size == VOCAB_SIZE + 2


def test_an_output_that_exists_is_kept_unless_it_may_be_overwritten(run, tmp_path):
    """With overwrite only an output of the same kind is replaced: a run that was trained is not."""
    add_tokens(run, tmp_path / "out", NEW)
    with pytest.raises(FileExistsError, match="out: is there already"):
        add_tokens(run, tmp_path / "out", ["<|note|>"])
    add_tokens(run, tmp_path / "out", ["<|note|>"], overwrite=True)
    assert Tokenizer.from_directory(tmp_path / "out/tokenizer").special_tokens == ["<|endoftext|>", "<|note|>"]
    (tmp_path / "out/metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"found metrics\.jsonl in it, too"):
        add_tokens(run, tmp_path / "out", NEW, overwrite=True)


@pytest.mark.parametrize("place", [".", "run", "run/checkpoints/more", "run/../run"])
def test_the_output_is_apart_from_the_source(place, run, tmp_path):
    """In the source or around it, overwriting would destroy what it reads."""
    with pytest.raises(ValueError, match="output: expected a directory apart from the source"):
        add_tokens(run / "latest", tmp_path / place, NEW, overwrite=True)


def test_a_damaged_checkpoint_or_one_without_a_tokenizer_is_refused(run, tmp_path):
    """The line names the file; nothing is written."""
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    flip_bit(resolve(other) / "model.safetensors")
    whole = pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is whole")
    with whole, pytest.warns(UserWarning, match=r"model\.safetensors is damaged"):
        add_tokens(other, tmp_path / "out", NEW)
    with pytest.raises(CheckpointError, match="no such checkpoint or run directory"):
        add_tokens(tmp_path / "nowhere", tmp_path / "out", NEW)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_tokenizer_is_refused(files, tmp_path):
    """Nobody knows which ids are taken."""
    snapshot = replace(make_training(files)[2], tokenizer=None)
    save_checkpoint(tmp_path / "run/checkpoints", 2, snapshot)
    with pytest.raises(ValueError, match="expected a checkpoint with its tokenizer, found none"):
        add_tokens(tmp_path / "run", tmp_path / "out", NEW)


def test_a_failed_write_leaves_nothing(run, tmp_path, monkeypatch):
    """The directory takes its name when all of it is there."""
    monkeypatch.setattr(Tokenizer, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        add_tokens(run, tmp_path / "out", NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
