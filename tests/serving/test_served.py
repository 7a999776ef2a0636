"""What the routes share: the tokenizer that they use is the one that the engine has read."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from tests.serving.fake_engine import FakeEngine, write_checkpoint
from tests.serving.web import settings
from transformerlm.serving.served import Served


def test_a_tokenizer_that_was_replaced_meanwhile_is_not_read(tmp_path):
    """Between the engine's reading and the web process's, a training may begin anew at the same place."""
    engine = FakeEngine(write_checkpoint(tmp_path))
    engine.state = "ok"
    files = sorted((tmp_path / "tiny/checkpoints/step-00000140/tokenizer").iterdir())
    sums = {f"tokenizer/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    engine.facts = replace(engine.facts, tokenizer_sums=sums)
    served = Served(config=settings(), engine=engine, tell=lambda event, facts: None)
    served.load_tokenizer()
    assert served.tokens().vocab == engine.tokenizer.vocab
    files[0].write_bytes(files[0].read_bytes() + b"\n")
    with pytest.raises(OSError, match=f"{files[0].name}: expected the file that the engine has read, found another"):
        served.load_tokenizer()
