"""The other end of `WandbLogger`: a separate process that owns the W&B run. It is run by path and imports no room.

Requests come as JSON lines on stdin: the options of `wandb.init` first, then `{"log": {...}}` and
`{"artifact": {...}}`; the end of the input finishes the run. Answers are JSON lines: `{"ready": true}`,
`{"note": ...}` and `{"failed": ...}`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Serve the requests on stdin."""
    # wandb may print: keep the pipe for answers, and send what is printed to stderr, to the messages for people.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        _serve(sys.stdin, answers)
    except BaseException as error:  # wandb.init turns some failures into SystemExit or KeyboardInterrupt
        _answer(answers, "failed", f"{type(error).__name__}: {error}")
        # This skips any clean-up at exit that would wait for the same network once more.
        os._exit(1)


def _serve(requests: Iterable[str], answers: TextIO) -> None:
    lines = iter(requests)
    first = json.loads(next(lines))
    import wandb

    known = getattr(getattr(wandb, "Settings", None), "model_fields", {})
    settings = {key: value for key, value in first["settings"].items() if key in known}
    run = wandb.init(**first["init"], settings=settings)
    run.define_metric("*", step_metric="step")
    _answer(answers, "ready", True)
    for line in lines:
        request = json.loads(line)
        if "log" in request:
            run.log(request["log"])
        else:
            _upload(wandb, run, answers, **request["artifact"])
    # If the trainer was killed, nobody else can end this process when the upload hangs.
    watchdog = threading.Timer(first["finish_limit"], os._exit, args=(1,))
    watchdog.daemon = True
    watchdog.start()
    run.finish()


def _upload(wandb: Any, run: Any, answers: TextIO, *, path: str, name: str, type: str) -> None:
    if not Path(path).exists():
        _answer(answers, "note", f"{path} was gone before it could be uploaded as {name}")
        return
    try:
        artifact = wandb.Artifact(name=name, type=type)
        if Path(path).is_dir():
            artifact.add_dir(path)
        else:
            artifact.add_file(path)
        run.log_artifact(artifact)
    except (OSError, ValueError) as error:  # an old checkpoint may be removed while it is read, or W&B refuse a name
        _answer(answers, "note", f"{path} could not be uploaded as {name}: {error}")


def _answer(answers: TextIO, kind: str, value: object) -> None:
    answers.write(json.dumps({kind: value}) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
