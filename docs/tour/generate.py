"""Generating on one page: the ids so far go in, one id comes out and is appended, over and over.

    python docs/tour/generate.py

`transformerlm/inference` draws the same ids with the same seed. It adds a cache of keys and values, so that one more id
costs the work of one id instead of the whole window's; packed weights; drafts; ends of texts; several texts at a time.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from bpe import NUM_MERGES, TEXT, decode, encode, learn
from torch import Tensor
from train import BATCH, SCHEDULE, SIZES, train
from transformer import Transformer


def keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Keep the `top_k` most likely ids (Fan et al. 2018) of `logits` (vocab_size), which are in order."""
    return logits if top_k is None else logits.masked_fill(torch.arange(len(logits)) >= top_k, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest ids, the most likely first, whose probabilities sum to `top_p` or more (Holtzman et al. 2020)."""
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over all that are more likely
    return logits.masked_fill((before >= top_p) & (before > 0), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep the ids that are at least `min_p` times as likely as the most likely one (Nguyen et al. 2024)."""
    return logits if min_p == 0.0 else logits.masked_fill(logits < logits.max() + math.log(min_p), -torch.inf)


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """Return the place where the sum of the probabilities passes a number drawn evenly from [0, 1)."""
    sums = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    number = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(torch.searchsorted(sums, number * sums[-1], right=True))


def sample(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Return the next id for `logits` (vocab_size); a temperature of 0 takes the most likely one."""
    if temperature == 0.0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is None and top_p == 1.0:  # nothing needs the order
        return draw(keep_min_p(logits, min_p), generator)
    logits, ids = logits.sort(descending=True, stable=True)
    return int(ids[draw(keep_min_p(keep_top_p(keep_top_k(logits, top_k), top_p), min_p), generator)])


@torch.no_grad()
def generate(
    model: Transformer, prompt: Sequence[int], *, context_length: int, seed: int = 0, **settings: Any
) -> Iterator[int]:
    """Yield the ids that follow a prompt, without end. The model sees one window of at most `context_length` ids."""
    generator = torch.Generator().manual_seed(seed)
    window = list(prompt)[-context_length:]
    while True:
        logits = model(torch.tensor([window]))[0, -1]  # (vocab_size): what may follow the last id
        window.append(sample(logits, generator, **settings))
        yield window[-1]
        if len(window) > context_length:
            window = window[-(context_length // 2) :]  # read on from half a window, as the product does


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a model more threads are slower
    torch.manual_seed(0)
    merges, model = learn(TEXT, NUM_MERGES), Transformer(**SIZES)
    losses = list(train(model, encode(TEXT, merges), batch=BATCH, schedule=SCHEDULE))
    print(f"trained: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    for chosen in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.5}, {"temperature": 1.5, "top_k": 3}):
        ids = generate(model, encode("The fox", merges), context_length=BATCH["context_length"], seed=1, **chosen)
        print(chosen, repr(decode(list(islice(ids, 20)), merges)))
