"""Writing and reading tiktoken's ranks: a line for each token with its bytes in base64 and its rank, which is its id.

tiktoken keeps no merges: it joins the two neighbours whose joined bytes have the lowest rank. That is BPE by our merges
if, and only if, each token has one merge, the merges are in the order of the ids, and each merge joins the two parts
that the lower ranks encode the token to. Special tokens and the pattern are not in the file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from transformerlm.interop.verify import NOT_ASKED, verify_ranks
from transformerlm.tokenizer.io import MAX_FILE_BYTES
from transformerlm.tokenizer.pretokenize import PATTERNS
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, write_whole
from transformerlm.utils.json_files import read_limited

_MAX_TOKEN_BYTES = 4096  # the time to find a token's merge grows with the square of its length


def write_ranks(tokenizer: Tokenizer, out: Path, *, verify: bool = True, overwrite: bool = False) -> str:
    """Write a file of ranks, and return one line about how it was verified.

    Raises:
        FileExistsError: it exists already, and `overwrite` is not set.
        ValueError: the merges cannot be expressed as ranks, or tiktoken gives other ids.
    """
    check_free(out, overwrite=overwrite)
    ranks = to_ranks(tokenizer)
    outcome = verify_ranks(tokenizer, ranks) if verify else NOT_ASKED
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    write_whole(out, "".join(lines))
    pattern, specials = PATTERNS[tokenizer.pattern], tokenizer.special_token_ids
    return f"{outcome}; give tiktoken.Encoding pat_str={pattern!r} and special_tokens={specials}"


def to_ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the rank of each token except the special ones, lowest first.

    Raises:
        ValueError: ranks would merge in another way than the merges do.
    """
    specials = set(tokenizer.special_token_ids.values())
    ranks = {tokenizer.vocab[index]: index for index in range(tokenizer.vocab_size) if index not in specials}
    if tokenizer.ignore_merges or merges_of(ranks) != tokenizer.merges:
        raise ValueError(
            "tokenizer: its merges cannot be expressed as tiktoken's ranks: expected one merge for each token, in the "
            "order of the ids"
        )
    return ranks


def read_ranks(path: Path, *, pattern: str, special_tokens: Sequence[str]) -> Tokenizer:
    """Return the tokenizer of a file of ranks; special tokens get ids that it leaves out, then those after the last.

    Raises:
        ValueError: a line that is not a token and a rank, a rank that occurs twice, or a token that no two others form.
        OSError: it cannot be read.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_limited(path, max_bytes=MAX_FILE_BYTES).splitlines(), 1):
        if not line:
            continue
        token, rank = _parse(line, f"{path}:{number}")
        if token in ranks:
            raise ValueError(f"{path}:{number}: expected each token once, found {token[:40]!r} again")
        ranks[token] = rank
    try:
        vocab = {rank: token for token, rank in ranks.items()}
        specials = [special.encode() for special in special_tokens if special.encode() not in ranks]
        free = (rank for rank in range(len(ranks) + len(specials)) if rank not in vocab)
        vocab |= dict(zip(free, specials, strict=False))
        return Tokenizer(vocab, merges_of(ranks), special_tokens, pattern=pattern)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(line: bytes, where: str) -> tuple[bytes, int]:
    parts = line.split(b" ")
    try:
        token = base64.b64decode(parts[0], validate=True)
    except binascii.Error:
        token = b""
    if len(parts) != 2 or not 0 < len(token) <= _MAX_TOKEN_BYTES or not (parts[1].isdigit() and len(parts[1]) < 10):
        raise ValueError(f"{where}: expected a token in base64, a blank and its rank, found {line[:60]!r}")
    return token, int(parts[1])


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merges that ranks stand for, in their order.

    Raises:
        ValueError: a token that lower ranks do not form from two parts.
    """
    return list(_merges(ranks))


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            best, place = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                raise ValueError(
                    f"expected tokens that lower ranks make of two parts, found {token[:40]!r} (of Llama 3 and others "
                    "like it, import the tokenizer.json)"
                )
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        yield parts[0], parts[1]
