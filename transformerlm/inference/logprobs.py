"""Log-probabilities of ids, the model's own: before temperature, penalties and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformerlm.inference.requests import TokenLogprobs
from transformerlm.utils.dtypes import upcast


def log_probabilities(logits: Tensor, token_ids: Sequence[int], *, num_top: int) -> list[TokenLogprobs]:
    """Return the log-probability of each row's id, and those of the `num_top` most likely ids.

    `logits` are `(rows, vocab)`, one row a place. Of equals the lower id comes first. It takes memory for one fp32 copy
    of the logits: who has many places calls it for some of them at a time.
    """
    wide = upcast(logits)
    chosen = torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
    totals = wide.logsumexp(dim=-1, keepdim=True)  # (rows, 1)
    own = (wide.gather(-1, chosen.unsqueeze(-1)) - totals).squeeze(-1).tolist()
    count = min(num_top, logits.shape[-1])
    values, ids = wide.topk(count, dim=-1)  # (rows, count)
    tops = zip(ids.tolist(), (values - totals).tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, sorted(zip(*top, strict=True), key=lambda one: (-one[1], one[0])))
        for token_id, logprob, top in zip(token_ids, own, tops, strict=True)
    ]
