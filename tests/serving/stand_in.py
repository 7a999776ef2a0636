"""A stand-in for the engine process: it speaks the same lines, needs no torch, and behaves as the test asks.

A request's prompt says what happens: [1] makes a token every few milliseconds until its limit, [2] kills the process,
[3] never makes a token though pings are answered, [4] stops answering, [5] writes what is no line, [6] makes its tokens
after it has read its window again for a while. The first argument is the path of a file that counts the starts; the
second says which starts fail.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from transformerlm.serving.engine import ModelFacts, Piece, StepReport
from transformerlm.serving.protocol import ASK, SETTINGS, TOLD, Ask, Refused, Told

AGAIN = 1500
"""Steps that read again, of at least two milliseconds each."""


def tell(told: Told) -> None:
    sys.stdout.buffer.write(TOLD.encode(told))
    sys.stdout.buffer.flush()


def facts(start: int, path: str) -> ModelFacts:
    return ModelFacts(
        path=path,
        checkpoint=f"step-{start:08d}",
        step=start,
        val_loss=None,
        fingerprint=f"{start}-00000000",
        parameters=1,
        vocab_size=290,
        context_length=16,
        precision="fp32",
        device="cpu",
        end_ids=[],
        start_id=None,
        starts_texts=False,
    )


def main() -> None:
    settings = SETTINGS.decode(sys.stdin.buffer.readline())
    counter, fails = Path(sys.argv[1]), sys.argv[2:]
    start = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(start))
    with Path(f"{counter}.earlier").open("a") as file:
        print(settings.earlier and settings.earlier.checkpoint, file=file)
    if "first" in fails or ("later" in fails and start > 1):
        tell(Told(failed=f"no good: {settings.checkpoint}"))
        return
    inbox: SimpleQueue[Ask | None] = SimpleQueue()
    Thread(
        target=lambda: [inbox.put(ASK.decode(line)) for line in sys.stdin.buffer] and os._exit(0), daemon=True
    ).start()
    tell(Told(serving=facts(1, settings.checkpoint), checkpoints=["step-00000001", "step-00000009"]))
    texts: dict[str, list[int]] = {}  # tokens made, or below 0 steps that read again, and the limit
    while True:
        time.sleep(0.002)
        try:
            while True:
                take(inbox.get(block=False), texts)
        except Empty:
            step(texts)


def take(ask: Ask, texts: dict[str, list[int]]) -> None:
    if ask.ping is not None:
        tell(Told(pong=ask.ping))
    for one in ask.submit:
        if one.checkpoint == "step-00000009":
            tell(Told(refused=[Refused(request_id=one.request_id, reason="damaged", is_checkpoint=True)]))
        elif one.prompt[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        elif one.prompt[0] == 4:
            time.sleep(3600)
        elif one.prompt[0] == 5:
            sys.stdout.buffer.write(b"{}{}\n")
            sys.stdout.buffer.flush()
        else:
            begins = -AGAIN if one.prompt[0] == 6 else 0
            texts[one.request_id] = [begins, -1 if one.prompt[0] == 3 else one.max_tokens]
    for name in ask.cancel:
        if texts.pop(name, None):
            tell(Told(pieces=[(name, Piece(finish="cancelled"))]))


def step(texts: dict[str, list[int]]) -> None:
    pieces, again = [], 0
    for name, text in list(texts.items()):
        if text[1] < 0:
            continue
        text[0] += 1
        if text[0] <= 0:
            again += 8
            continue
        ended = text[0] == text[1]
        pieces.append((name, Piece(text="x", token_ids=[5], num_tokens=text[0], finish="length" if ended else "")))
        if ended:
            del texts[name]
    if pieces or again:
        counts = {"prompt_tokens": 0, "generated_tokens": len(pieces), "reused_tokens": 0, "read_again_tokens": again}
        report = StepReport(seconds=0.1, choice_seconds=0.0, **counts)
        tell(Told(pieces=pieces, report=report))


if __name__ == "__main__":
    main()
