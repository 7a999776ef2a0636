"""Log-probabilities of ids, the model's own: before temperature, penalties and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformerlm.inference.requests import TokenLogprobs
from transformerlm.utils.dtypes import upcast


def log_probabilities(logits: Tensor, token_ids: Sequence[int], *, num_top: int) -> list[TokenLogprobs]:
    """Return the log-probability of each row's id, and those of its `num_top` most likely ids, in descending order.

    `logits` are `(rows, vocab)`, one row a place of a text. Equals are in the order of their ids; if not all of them
    have room, which ones do is the same in any batch. Beside the result it takes memory for two fp32 copies of the
    logits, so who has many places gives some of them at a time.
    """
    wide, chosen = upcast(logits), torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
    totals = wide.logsumexp(dim=-1, keepdim=True)  # (rows, 1)
    own = (wide.gather(-1, chosen.unsqueeze(-1)) - totals).squeeze(-1).tolist()
    values, ids = wide.topk(min(num_top, logits.shape[-1]), dim=-1)  # (rows, num_top) each
    return [
        TokenLogprobs(token_id, logprob, sorted(zip(*top, strict=True), key=lambda pair: (-pair[1], pair[0])))
        for token_id, logprob, *top in zip(token_ids, own, ids.tolist(), (values - totals).tolist(), strict=True)
    ]
