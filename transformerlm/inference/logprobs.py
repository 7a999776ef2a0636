"""Log-probabilities of ids, the model's own: before temperature, penalties and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformerlm.inference.requests import TokenLogprobs
from transformerlm.utils.dtypes import upcast


def log_probabilities(logits: Tensor, token_ids: Sequence[int], *, num_top: int) -> list[TokenLogprobs]:
    """Return the log-probability of each row's id, and those of its `num_top` most likely ids, in descending order.

    `logits` are `(rows, vocab)`, one row a place of a text; of equals the lower id comes first. Beside the result it
    takes memory for two fp32 copies of the logits, so who has many places gives some of them at a time.
    """
    wide, chosen = upcast(logits), torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
    totals = wide.logsumexp(dim=-1, keepdim=True)  # (rows, 1)
    own = (wide.gather(-1, chosen.unsqueeze(-1)) - totals).squeeze(-1).tolist()
    values, ids = _most_likely(wide, min(num_top, logits.shape[-1]))  # (rows, num_top) each
    tops = zip(ids.tolist(), (values - totals).tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, list(zip(*top, strict=True)))
        for token_id, logprob, top in zip(token_ids, own, tops, strict=True)
    ]


def _most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` greatest logits of each row and their ids, `(rows, count)` each, equals in order of ids."""
    values, ids = logits.topk(count, dim=-1)
    if not count:
        return values, ids
    # Which of several equals topk gives, and in which order, depends on the row's neighbours.
    border = values[:, -1:]
    ids = torch.where(values > border, ids, logits.shape[-1])
    tied = (logits == border).int()
    room = (values == border).sum(dim=-1, keepdim=True)
    first = (tied * (tied.cumsum(dim=-1) <= room)).topk(count, dim=-1)
    places = torch.where(first.values > 0, first.indices, logits.shape[-1]).sort(dim=-1).values
    ids = torch.where(
        values > border, ids, places.gather(-1, (torch.arange(count, device=ids.device) - (count - room)).clamp_min(0))
    )
    ids = ids.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
