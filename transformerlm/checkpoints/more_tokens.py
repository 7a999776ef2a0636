"""More special tokens for a tokenizer, or for a checkpoint with its tokenizer: old ids stay, new ones follow.

The model gets a row of the embedding, and one of the output head, for each id that it has no row for. A new row is the
mean of the rows that were in use, with a little noise. So the new ids begin about as likely as an average token, and
take little from the others (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). The noise
tells several new tokens apart. All other weights stay, bit for bit, and with them the logits of the old ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config.io import dump_toml
from config.train import FineTuningConfig, TrainConfig
from transformerlm.checkpoints import chat_format, document_ids
from transformerlm.checkpoints.directory import resolve_verified
from transformerlm.checkpoints.load import load_config_of, load_model, load_tokenizer
from transformerlm.checkpoints.naming import run_of
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.io import MERGES_FILE, SPECIALS_FILE, VOCAB_FILE, tokenizer_files
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, whole_directory

NOISE = 0.02
"""The standard deviation of the noise in a new row, as a share of that of the rows in use, for each feature."""
EXTENDED = "extended_from"
"""Where `state.json` says which checkpoint has got which tokens."""
_KEPT = ("tokens", document_ids.KEY, chat_format.KEY, "imported_from")


@dataclass(frozen=True)
class AddedTokens:
    """What came of it: `ids` of the new tokens, those that were `known` before, and how the model has grown.

    `vocab_size` is the model's before and after; None: there was only a tokenizer.
    """

    path: Path
    tokenizer: Path
    ids: dict[str, int]
    known: dict[str, int]
    vocab_size: tuple[int, int] | None = None


def add_tokens(
    source: Path, out: Path, special_tokens: Sequence[str], *, seed: int = 0, overwrite: bool = False
) -> AddedTokens:
    """Write `out`, what `source` names with these special tokens more; `source` stays as it is.

    A tokenizer's directory becomes a tokenizer's directory. A run or a checkpoint becomes a run with one checkpoint,
    beside which is its tokenizer. `seed` is that of the noise.

    Raises:
        FileExistsError: `out` exists already, and `overwrite` is not set.
        FileNotFoundError: there is nothing at `source`.
        ValueError: a token cannot be added, `source` is damaged or has no tokenizer, or `out` is a part of it.
    """
    is_tokenizer = tokenizer_files(source)[0].exists()
    holds, *beside = (VOCAB_FILE, MERGES_FILE, SPECIALS_FILE) if is_tokenizer else ("checkpoints", "tokenizer")
    _check_apart(source, out)
    check_free(out, overwrite=overwrite, holds=holds, beside=beside)
    if is_tokenizer:
        tokenizer = Tokenizer.from_directory(source)
        extended = tokenizer.with_special_tokens(special_tokens)
        with whole_directory(out) as directory:
            extended.save(directory)
        return AddedTokens(out, out, *_told(tokenizer, extended, special_tokens))
    return _extend_checkpoint(source, out, special_tokens, seed=seed)


def _check_apart(source: Path, out: Path) -> None:
    """Refuse an output that is the source, in it, or around it."""
    theirs, ours = run_of(source).resolve(), out.resolve()
    if ours == theirs or theirs.is_relative_to(ours) or ours.is_relative_to(theirs):
        raise ValueError(f"output: expected a directory apart from the source, found {out} for {source}")


def _extend_checkpoint(source: Path, out: Path, special_tokens: Sequence[str], *, seed: int) -> AddedTokens:
    checkpoint, state = resolve_verified(source)
    if not (checkpoint / "tokenizer").exists():
        raise ValueError(
            f"{checkpoint}: expected a checkpoint with its tokenizer, found none, as in one that was imported without"
        )
    tokenizer = load_tokenizer(checkpoint)
    extended = tokenizer.with_special_tokens(special_tokens)
    ids, known = _told(tokenizer, extended, special_tokens)
    model = load_model(checkpoint, is_verified=True)
    old_size = model.vocab_size
    model = grow(model, max(old_size, extended.vocab_size), num_used=tokenizer.vocab_size, seed=seed)
    config = _for_new_run(load_config_of(checkpoint), model.vocab_size, tokenizer=out / "tokenizer")
    about = {"checkpoint": str(checkpoint), "special_tokens": list(ids)}
    snapshot = Snapshot.of(
        model,
        Optimizer(list(model.parameters()), {"lr": 0.0}),  # what every checkpoint holds; no step was made with it
        extended,
        config_toml=_about(state, ids, checkpoint) + dump_toml(config),
        state={key: state[key] for key in _KEPT if key in state} | {EXTENDED: about},
    )
    with whole_directory(out) as directory:
        most = config.checkpoint.max_file_mb * 10**6
        saved = save_checkpoint(directory / "checkpoints", state["step"], snapshot, max_file_bytes=most)
        extended.save(directory / "tokenizer")
    path = out / "checkpoints" / saved.name
    return AddedTokens(path, out / "tokenizer", ids, known, (old_size, model.vocab_size))


def _about(state: dict[str, Any], ids: dict[str, int], checkpoint: Path) -> str:
    """Return the comment over the configuration."""
    only = ", and only [model] says anything, for it was imported" if "imported_from" in state else ""
    return f"# {', '.join(ids) or 'nothing'} added to {checkpoint.name}: a run that begins with it is new{only}\n"


def _told(before: Tokenizer, after: Tokenizer, special_tokens: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the ids of the tokens that are new, and of those that were there before."""
    ids = {token: after.special_token_ids[token] for token in special_tokens}
    known = before.special_token_ids
    return {name: one for name, one in ids.items() if name not in known}, {
        name: one for name, one in ids.items() if name in known
    }


def _for_new_run(config: TrainConfig, vocab_size: int, *, tokenizer: Path) -> TrainConfig:
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    data = config.data.model_copy(update={"tokenizer": tokenizer})
    plain = FineTuningConfig()  # the weights are a plain model's: LoRA's matrices are in them
    return config.model_copy(update={"model": model, "data": data, "fine_tuning": plain})


def grow(model: TransformerLM, vocab_size: int, *, num_used: int, seed: int = 0) -> TransformerLM:
    """Return a model with a row for each of `vocab_size` ids, the first rows being those of `model`.

    `num_used` rows of it are those of tokens, of which a new row is the mean, with noise of `seed`: see the top of this
    file. A model that has enough rows is returned as it is.

    Raises:
        ValueError: `vocab_size` is less than the model's, or `num_used` is not one of its numbers of rows.
    """
    if vocab_size < model.vocab_size or not 0 < num_used <= model.vocab_size:
        raise ValueError(
            f"grow: expected a vocab_size of {model.vocab_size} or more and num_used of 1 to {model.vocab_size}, got "
            f"{vocab_size} and {num_used}"
        )
    if vocab_size == model.vocab_size:
        return model
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = dict(model.named_parameters())
    for name in ("token_embeddings.weight", "lm_head.weight"):
        if name in weights:  # a tied head is the embedding
            weights[name] = _with_rows(weights[name].detach(), vocab_size, num_used=num_used, generator=generator)
    grown = TransformerLM(replace(model.settings, vocab_size=vocab_size))
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter.copy_(weights[name])
    return grown.train(model.training)


def _with_rows(weight: Tensor, num_rows: int, *, num_used: int, generator: torch.Generator) -> Tensor:
    """Return a matrix with `num_rows` rows, `(num_rows, d_model)`, of which the last ones are new."""
    used = weight[:num_used].double().cpu()  # (num_used, d_model)
    shape = (num_rows - len(weight), weight.shape[1])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = used.mean(dim=0) + NOISE * used.std(dim=0, correction=0) * noise  # (num_rows - rows before, d_model)
    return torch.cat([weight, rows.to(weight)])
