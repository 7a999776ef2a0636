"""What is checked before a build: outputs that are somebody's own files stay, whatever is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from databuilder.checks import check_outputs
from transformerlm.token_files.sidecar import FACTS, write_facts


@pytest.mark.parametrize("content", ["", "my notes", "[1]", '{"name": "mine"}', '{"format": 1, "tokens": 7}'])
def test_overwrite_leaves_a_json_file_that_describes_no_token_file(tmp_path: Path, content: str) -> None:
    """A file that lacks what every sidecar has is somebody's own, and is refused by name."""
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=r"train\.json: expected the facts of a token file, .* found another file"):
        check_outputs([tmp_path / "train.npy"], [], overwrite=True)
    assert (tmp_path / "train.json").read_text() == content


def test_overwrite_takes_a_sidecar_or_none(tmp_path: Path) -> None:
    """One that a build wrote, or none where a build was killed before it wrote one."""
    outputs = [tmp_path / "train.npy", tmp_path / "valid.npy"]
    write_facts(tmp_path / "train.json", {"format": 1, **{name: kind() for name, kind in FACTS.items()}})
    (tmp_path / "valid.npy").write_bytes(b"half")
    check_outputs(outputs, [], overwrite=True)
    with pytest.raises(FileExistsError, match=r"train\.json: expected no such file yet"):
        check_outputs(outputs, [], overwrite=False)
