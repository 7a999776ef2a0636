"""`transformerlm-runs verify`: whether a run is what it says, as a receipt."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs_verify")

import json
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cli.terminal import note, plain
from cli.utils import EXIT_FAILED, Command
from cli.utils import main as run_command
from config.runs_verify import RunsVerifyConfig

# What --help shows.
SHORT = ("run", "share", "seed", "output.format")
EXAMPLES = (
    ("a run, by 5 % of its steps", "runs/first"),
    ("all of it that its checkpoints allow", "runs/first --share=1"),
    ("the same segments as another time, with the receipt as JSON", "runs/first --seed=7 --output.format=json"),
)
_VERDICTS = {
    "verified": "verified: what was checked is as the run says",
    "differs": "NOT verified: the run is not what it says",
    "undecided": "not verified: this cannot be told here",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-runs verify", RunsVerifyConfig, verify_run, first_word="run", short=SHORT, examples=EXAMPLES
    )
    run_command(command, argv)


def verify_run(config: RunsVerifyConfig) -> int:
    """Verify the run, print the receipt, and return 0 if it is verified, else 1."""
    from transformerlm.experiments.verify import verify

    seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    receipt = verify(config.run, share=config.share, seed=seed, note=note)
    if config.output.format == "json" or (config.output.format == "auto" and not sys.stdout.isatty()):
        print(json.dumps(receipt, allow_nan=False))
    else:
        print("\n".join(plain(line) for line in _in_words(receipt)))
    return 0 if receipt["verdict"] == "verified" else EXIT_FAILED


def _in_words(receipt: dict[str, Any]) -> Iterator[str]:
    yield f"{receipt['run']}: {_VERDICTS[receipt['verdict']]}"
    for finding in receipt["findings"]:
        yield f"  {finding['kind']}: {finding['what']}"
    replayed = f"{receipt['share_replayed']:.1%} of {receipt['steps']:,} steps"
    yield f"  replayed {replayed}, drawn by --seed={receipt['seed']}:"
    for one in receipt["replays"]:
        speed = "" if one["seconds"] is None else f"; {one['seconds']:.1f} s"
        speed += "" if not speed or one["claimed_seconds"] is None else f", in the run {one['claimed_seconds']:.1f} s"
        words = f"{one['lines']:,} lines {one['losses']}, weights {one['weights']}"
        yield f"    steps {one['begin'] + 1:,} to {one['end']:,}: {words}{speed}"
    yield "  not known:"
    yield from (f"    {line}" for line in receipt["cannot_know"])
