"""What 8 bits cost: loss and greedy texts of `int8` against `fp32`, on text of yours.

    python -m benchmarking.int8_price runs/first data/valid.txt

A window is as many ids as fit the context, or `--length`. In each, every id is predicted from those before it, twice
in int8: one row at a time, as a single text is generated, and all rows at once, as a prompt is read. Then the model
continues texts greedily, in each precision, and the line says after how many ids the two differ. JSON on stdout.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.int8_price")

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarking.machine import describe
from transformerlm.utils.strings import in_words

if TYPE_CHECKING:
    import torch

    from transformerlm.inference.generate import Decoder


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.int8_price", description="Compare a model's int8 with its fp32, on text."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint or a run directory")
    parser.add_argument(
        "text",
        type=Path,
        help="a file of text that the model has not been trained on; or of ids, .npy, for a model without a tokenizer",
    )
    parser.add_argument("--windows", type=int, default=32, help="how many pieces of the text to measure (default: 32)")
    parser.add_argument("--length", type=int, help="how many ids each piece has (default: as many as fit the context)")
    parser.add_argument("--new_tokens", type=int, default=64, help="how many ids to generate for each (default: 64)")
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(measure(**vars(arguments))))
    except (ValueError, OSError) as error:
        parser.error(in_words(error))


def measure(checkpoint: Path, text: Path, *, windows: int, length: int | None, new_tokens: int) -> dict[str, Any]:
    """Return the losses in nats, how often the most likely id is the same, and where greedy texts part.

    Raises:
        ValueError: the text has less than two ids, or one that the model does not have.
        OSError: a file that cannot be read.
    """
    import torch

    from transformerlm.checkpoints.directory import resolve
    from transformerlm.checkpoints.load import load_model
    from transformerlm.inference.generate import Decoder

    directory = resolve(checkpoint)
    model = load_model(directory)
    size = min(length or model.context_length, model.context_length)
    pieces = _windows(_ids(directory, text, model.vocab_size), size=size, number=windows)
    decoders = {"fp32": Decoder(model), "int8": Decoder(model, int8=True)}
    with torch.inference_mode():
        exact, rough = ([_one_by_one(decoder, piece) for piece in pieces] for decoder in decoders.values())
        as_prompt = [_at_once(decoders["int8"], piece) for piece in pieces]
        parted = [_parted_after(decoders, piece, new_tokens) for piece in pieces]
    same = torch.cat([one.most_likely == other.most_likely for one, other in zip(exact, rough, strict=True)])
    losses = {"fp32": _loss(exact), "int8": _loss(rough), "int8_prompt": _loss(as_prompt)}
    return {
        **describe(threads=torch.get_num_threads()),
        "benchmark": "int8_price",
        "checkpoint": str(directory),
        "parameters": model.num_parameters(),
        "predicted_tokens": len(same),
        **{f"loss_{name}": loss for name, loss in losses.items()},
        "loss_rises_percent": 100 * (losses["int8"] / losses["fp32"] - 1),
        "loss_rises_percent_prompt": 100 * (losses["int8_prompt"] / losses["fp32"] - 1),
        "same_first_choice_percent": 100 * same.double().mean().item(),
        "greedy_texts": len(parted),
        "greedy_texts_equal": sum(after == new_tokens for after in parted),
        "greedy_parted_after": sorted(parted),
    }


class _Predicted(NamedTuple):
    """What a decoder says of each id of a window but the first: its loss in nats, and which id is the most likely."""

    nats: torch.Tensor
    most_likely: torch.Tensor


def _ids(checkpoint: Path, text: Path, vocab_size: int) -> Any:
    """Return the ids of a text, or those in a file of ids."""
    import numpy as np

    from transformerlm.checkpoints.load import load_tokenizer

    if text.suffix != ".npy":
        if not (checkpoint / "tokenizer").is_dir():
            raise ValueError(f"{checkpoint} has no tokenizer: give a .npy file of ids instead of {text}")
        return load_tokenizer(checkpoint).encode_file(text)
    ids = np.load(text, allow_pickle=False)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{text}: expected integers of shape (ids), found {ids.dtype} of shape {ids.shape}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"{text}: expected ids from 0 to {vocab_size - 1}, found {ids.min()} to {ids.max()}")
    return ids


def _windows(ids: Any, *, size: int, number: int) -> list[torch.Tensor]:
    """Return at most `number` pieces of `size` ids, evenly spread over the text."""
    import numpy as np
    import torch

    size = min(size, len(ids))
    if size < 2:
        raise ValueError(f"expected a text of two tokens or more, and windows of as many, found {size}")
    number = min(number, len(ids) // size)
    starts = np.linspace(0, len(ids) - size, number).astype(int)
    return [torch.from_numpy(ids[start : start + size].astype(np.int64)) for start in starts]


def _one_by_one(decoder: Decoder, ids: torch.Tensor) -> _Predicted:
    """Predict each id from those before it, a step an id."""
    import torch

    cache = decoder.make_cache(1, len(ids))
    return _predicted(torch.cat([decoder(one.view(1, 1), cache=cache)[0] for one in ids[:-1]]), ids)


def _at_once(decoder: Decoder, ids: torch.Tensor) -> _Predicted:
    """Predict each id from those before it, all at once."""
    return _predicted(decoder(ids[None, :-1], cache=decoder.make_cache(1, len(ids)))[0], ids)


def _predicted(logits: torch.Tensor, ids: torch.Tensor) -> _Predicted:
    from transformerlm.training.loss import cross_entropy

    return _Predicted(cross_entropy(logits, ids[1:], reduction="none"), logits.argmax(1))


def _loss(windows: Sequence[_Predicted]) -> float:
    import torch

    return torch.cat([each.nats for each in windows]).double().mean().item()


def _parted_after(decoders: dict[str, Decoder], ids: torch.Tensor, new_tokens: int) -> int:
    """Return how many new ids after the first half of a window are the same in both precisions."""
    from transformerlm.inference.generate import generate

    prompt = ids[: max(1, len(ids) // 2)].tolist()
    first, second = (
        generate(decoder, prompt, max_new_tokens=new_tokens, temperature=0.0) for decoder in decoders.values()
    )  # fmt: skip
    differ = [place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other]
    return differ[0] if differ else new_tokens
