"""What a build of token files was asked for, with all that follows from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config.schemas import ClusterConfig
from databuilder.checks import check_outputs
from databuilder.encoding import Array, token_tables
from databuilder.reports import SplitReport
from databuilder.sources import SourceFiles
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.loss_mask import MARKED_TYPE
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat
from transformerlm.tokenizer.parallel import ProgressCallback
from transformerlm.utils.json_files import values_sha256


@dataclass(frozen=True)
class Build:
    """The arguments of `build_dataset`, its sources found; `outputs` are train and, where there is one, valid."""

    sources: Sequence[SourceFiles]
    outputs: Sequence[Path]
    tokenizer: Tokenizer
    valid_fraction: float
    separator: str
    allow_special: bool
    refuse_invalid: bool
    overwrite: bool
    num_workers: int | None
    cluster: ClusterConfig
    progress: ProgressCallback | None
    chat: ChatFormat | None = None

    @property
    def paths(self) -> list[Path]:
        """The files of all sources."""
        return [path for source in self.sources for path in source.paths]

    def check_outputs(self, *, is_publishing: bool = False) -> None:
        """Refuse outputs as `checks.check_outputs` does; those of a build that is being put in place are its own."""
        check_outputs(self.outputs, self.paths, overwrite=self.overwrite or is_publishing)

    def check_split(self, num_documents: Sequence[int]) -> None:
        """Refuse inputs that leave one side of the split without a document.

        Raises:
            ValueError: they do.
        """
        if self.valid_fraction > 0 and 0 in num_documents:
            where = f"{self.paths[0]}: " if len(self.paths) == 1 else ""
            raise ValueError(
                f"{where}valid_fraction: expected at least one document on each side, found {sum(num_documents)} in "
                f"all at {self.valid_fraction} (documents end at {self.separator!r}; transformerlm-init --text cuts "
                "a text without it at blank lines)"
            )

    @property
    def num_bytes(self) -> int:
        """The size of the text on the disk."""
        return sum(source.disk_bytes for source in self.sources)

    @property
    def num_files(self) -> int:
        """The number of files that the text is in."""
        return len(self.paths)

    @property
    def in_shards(self) -> bool:
        """Whether the outputs are folders of shards."""
        return self.outputs[0].suffix == ".shards"

    @property
    def pipes(self) -> list[Path]:
        """The inputs that can be read only once."""
        return [path for path in self.paths if not path.is_file()]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    @property
    def stream_dtype(self) -> np.dtype[Any]:
        """The type in which ids are on their way to the output: those of conversations are marked."""
        return self.dtype if self.chat is None else MARKED_TYPE

    @property
    def id_bytes(self) -> Array:
        """The bytes that each id stands for, 0 for the separator, uint32 `(vocab_size,)`."""
        return token_tables(self.tokenizer, self.separator)[0]

    @property
    def separator_id(self) -> int:
        """The separator's id."""
        return self.tokenizer.special_token_ids[self.separator]

    @property
    def writing(self) -> dict[str, Any]:
        """The keywords with which token files are written."""
        return {"separator_id": self.separator_id, "has_mask": self.chat is not None}

    @property
    def part_bytes(self) -> int:
        """The size of a part of the text."""
        return int(self.cluster.part_mb * 1_000_000)

    def settings(self) -> dict[str, Any]:
        """Return all that the parts and the output depend on."""
        return {
            "command": "make-data",
            "tokenizer_sha256": self.tokenizer.fingerprint(),
            "separator": self.separator,
            "allow_special": self.allow_special,
            "refuse_invalid": self.refuse_invalid,
            "valid_fraction": self.valid_fraction,
            **self._chat_facts,
            "outputs": [path.name for path in self.outputs],
            "part_bytes": self.part_bytes,
            "sources": [
                {
                    "weight": source.weight,
                    "text_field": source.text_field,
                    "files": [
                        {"path": str(path), "bytes": path.stat().st_size, "mtime": path.stat().st_mtime_ns}
                        for path in source.paths
                    ],
                }
                for source in self.sources
            ],
        }

    @property
    def _chat_facts(self) -> dict[str, Any]:
        return {} if self.chat is None else {"chat": self.chat.to_json()}

    def own_facts(self, split: SplitReport) -> dict[str, Any]:
        """Return what a sidecar says of its own file."""
        mixture = {"mixture": [asdict(source) for source in split.sources]} if self.sources[0].weighted else {}
        return {"bytes": split.bytes, "documents": split.documents, **mixture}

    def shared_facts(self) -> dict[str, Any]:
        """Return what the sidecars of all outputs say; those of shares also name the settings, for late ones."""
        settings = {"settings_sha256": values_sha256(self.settings(), kept_in="")} if self.cluster.on == "share" else {}
        paths = [path for source in self.sources for path in source.paths]
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_sha256": self.tokenizer.fingerprint(),
            "separator": self.separator,
            "separator_id": self.separator_id,
            **self._chat_facts,
            "sources": [{"path": str(path), "bytes": path.stat().st_size} for path in paths],
            **settings,
        }

    def is_made(self) -> bool:
        """Return whether the outputs are there and say that they are of these texts and this tokenizer.

        To a share they must also say that shares with these settings made them.
        """
        with suppress(OSError, ValueError):
            known = self.shared_facts()
            found = [TokenDataset(path).metadata for path in self.outputs]
            return all(facts.get(key) == value for facts in found for key, value in known.items())
        return False
