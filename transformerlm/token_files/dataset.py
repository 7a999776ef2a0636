"""Reading a token file: its ids as a memory map, and the facts of the sidecar beside it."""

from __future__ import annotations

from pathlib import Path

from transformerlm.token_files.array import open_token_array
from transformerlm.token_files.sidecar import read_sidecar, sidecar_path
from transformerlm.utils.files import file_sha256

_SCAN_ELEMENTS = 2**22


class TokenDataset:
    """A token file written by transformerlm-make-data, memory-mapped, with the facts of its sidecar.

    `tokens` is the read-only array; `num_tokens`, `num_bytes`, `num_documents`, `vocab_size`, `tokenizer_sha256` and
    `sha256` come from the JSON file beside it. Raises FileNotFoundError if one of the two is missing, and ValueError
    if one is malformed or they contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = read_sidecar(self.path)
        self.tokens = open_token_array(self.path)
        self.num_tokens: int = self.metadata["tokens"]
        self.num_bytes: int = self.metadata["bytes"]
        self.num_documents: int = self.metadata["documents"]
        self.vocab_size: int = self.metadata["vocab_size"]
        self.tokenizer_sha256: str = self.metadata["tokenizer_sha256"]
        self.sha256: str = self.metadata["sha256"]
        if len(self.tokens) != self.num_tokens:
            raise _contradiction(self.path, "tokens", self.num_tokens, len(self.tokens))
        if self.tokens.dtype.name != self.metadata["dtype"]:
            raise _contradiction(self.path, "dtype", self.metadata["dtype"], self.tokens.dtype.name)

    def __len__(self) -> int:
        return self.num_tokens

    def max_id(self) -> int:
        """Return the largest id in the file, reading it once in blocks; -1 when it is empty."""
        starts = range(0, self.num_tokens, _SCAN_ELEMENTS)
        return max((int(self.tokens[start : start + _SCAN_ELEMENTS].max()) for start in starts), default=-1)

    def verify(self) -> None:
        """Read the whole file, and raise ValueError if its sha256 is not the sidecar's."""
        if (found := file_sha256(self.path)) != self.sha256:
            raise _contradiction(self.path, "sha256", self.sha256, found)


def _contradiction(path: Path, key: str, promised: object, found: object) -> ValueError:
    return ValueError(
        f"{path}: {key} is {promised} in {sidecar_path(path).name}, found {found} in the file; "
        "run transformerlm-make-data again"
    )
