"""The lines between the two processes: what is written is read back, and nothing else is."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from transformerlm.serving.engine import Logprobs, ModelFacts, Piece, StepReport, TextRequest
from transformerlm.serving.protocol import ASK, SETTINGS, TOLD, Ask, Refused, Settings, Skipped, Told
from transformerlm.tokenizer.chat import ChatFormat

FACTS = ModelFacts(
    path="runs/r/checkpoints/step-00000140",
    checkpoint="step-00000140",
    step=140,
    val_loss=None,
    fingerprint="140-01234567",
    parameters=10,
    vocab_size=290,
    context_length=16,
    precision="fp32",
    device="cpu",
    end_ids=[256],
    start_id=None,
    starts_texts=False,
    tokenizer_sums={"tokenizer/vocab.json": "ab12"},
)
LOGPROBS = Logprobs(token_ids=[3, 4], logprobs=[None, -math.inf], top=[[], [(4, -0.25), (7, -math.inf)]])
TELLING = [
    Told(pieces=[("a", Piece(text="é\n\u2028", token_ids=[3, 4], logprobs=LOGPROBS, num_tokens=2, step=1))]),
    Told(pieces=[("a", Piece(finish="stop", stop_string="\n\n", prompt_logprobs=LOGPROBS)), ("b", Piece(text="x"))]),
    Told(report=StepReport(seconds=0.5, choice_seconds=0.1, prompt_tokens=3, generated_tokens=2, reused_tokens=0)),
    Told(pieces=[("a", Piece(finish="stop", end=LOGPROBS)), ("b", Piece(finish="error", error="KeyError: 3"))]),
    Told(serving=FACTS, checkpoints=["step-00000140"]),
    Told(serving=replace(FACTS, chat=ChatFormat().to_json())),
    Told(serving=replace(FACTS, chat=ChatFormat(user="U\u2028:", end="\n", special_tokens=("<a>",)).to_json())),
    Told(
        refused=[Refused(request_id="a", reason="gone", is_checkpoint=True, is_for_now=True)], pong=3, is_loading=True
    ),
    Told(skipped=[Skipped(checkpoint="step-00000150", reason="damaged")], failed="no"),
]
ASKING = [
    Ask(submit=[TextRequest(request_id="a", prompt=[1, 2], max_tokens=3, seed=2**63 - 1)]),
    Ask(submit=[TextRequest(request_id="a", prompt=[], max_tokens=3, seed=0, logit_bias={5: -100.0}, stop=["\n"])]),
    Ask(submit=[TextRequest(request_id="a", prompt=[1], max_tokens=3, seed=0, end_ids=[7])]),
    Ask(cancel=["a", "b"], ping=7),
]


@pytest.mark.parametrize("message", TELLING)
def test_what_the_engine_tells_is_read_back(message):
    """Each kind of answer is one line, and comes back equal."""
    line = TOLD.encode(message)
    assert line.count(b"\n") == 1
    assert TOLD.decode(line) == message


@pytest.mark.parametrize("message", ASKING)
def test_what_is_asked_is_read_back(message):
    """Each kind of wish is one line, and comes back equal."""
    line = ASK.encode(message)
    assert line.count(b"\n") == 1
    assert ASK.decode(line) == message


def test_settings_are_read_back():
    """The first line of all comes back equal."""
    settings = Settings(
        checkpoint="runs/ü",
        device="cpu",
        precision="int8",
        threads=None,
        slots=2,
        prefill_chunk=16,
        prefix_cache_mb=0,
        reproducible=True,
        follow="best",
        interval=2.0,
        earlier=FACTS,
    )
    assert SETTINGS.decode(SETTINGS.encode(settings)) == settings


def test_a_line_holds_what_is_not_the_default():
    """A piece of text costs its text and its ids."""
    line = TOLD.encode(Told(pieces=[("a", Piece(text="x", token_ids=[3]))]))
    assert line == b'{"pieces":[["a",{"text":"x","token_ids":[3]}]]}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[", "Invalid JSON"),
        (b'{"sumbit": []}', "sumbit"),
        (b'{"ping": "3"}', "ping: Input should be a valid integer"),
        (b'{"ping": 3.0}', "ping: Input should be a valid integer"),
        (b'{"cancel": [1]}', "cancel.0: Input should be a valid string"),
        (b'{"submit": [{"request_id": "a", "prompt": [], "max_tokens": 1}]}', "submit.0.seed"),
        (b'{"submit": [{"request_id": "a", "prompt": [], "max_tokens": 1, "seed": 1, "sede": 1}]}', "submit.0.sede"),
        (b'{"submit": [{"request_id": "a", "prompt": [true], "max_tokens": 1, "seed": 1}]}', "submit.0.prompt.0"),
    ],
)
def test_a_line_that_is_not_exactly_that_is_refused(line, message):
    """Unknown and missing fields and other types are errors that name the place, in nested objects too."""
    with pytest.raises(ValueError, match=message):
        ASK.decode(line)


def test_the_web_side_needs_no_torch():
    """It would take 200 MB and seconds: not the lines, nor the client of the engine, nor the server with all routes."""
    code = (
        "import sys, transformerlm.serving.engine_client, transformerlm.serving.protocol\n"
        "if {'torch', 'numpy'} & set(sys.modules): sys.exit(1)\n"
        "import transformerlm.serving.web_server\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
