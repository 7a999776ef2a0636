"""A stand-in for transformerlm-train that needs no torch: a finished run whose loss follows a known law.

    python fake_train.py CONFIG

A run whose name has the word that FAKE_FAIL names fails.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tomllib
from pathlib import Path

E, A, ALPHA, B, BETA = 1.5, 20.0, 0.3, 60.0, 0.35


def num_parameters(model: dict) -> int:
    """Return the parameters of a model with its `d_ff` given, and neither tied nor grouped."""
    d_model, num_layers = model["d_model"], model["num_layers"]
    layer = 4 * d_model**2 + 3 * d_model * model["d_ff"] + 2 * d_model
    return 2 * model["vocab_size"] * d_model + num_layers * layer + d_model


def main(path: str) -> int:
    """Write the run of a TOML file; return the exit code."""
    config = tomllib.loads(Path(path).read_text())
    model, training, name = config["model"], config["training"], config["logging"]["run_name"]
    run_dir = Path(config["runs_dir"]) / name
    if os.environ.get("FAKE_FAIL", "\0") in name:
        print("error: no luck", file=sys.stderr)
        return 1
    parameters = num_parameters(model)
    tokens_per_step, steps = training["batch_size"] * model["context_length"], training["max_steps"]
    noise = math.exp(random.Random(name).gauss(0, 0.002))
    loss = (E + A / parameters**ALPHA + B / (steps * tokens_per_step) ** BETA) * noise
    started = {"parameters": parameters, "flops_per_token": 6 * parameters, "tokens_per_step": tokens_per_step}
    records = [
        {"event": "started", "step": 0, **started},
        {"step": steps, "metrics.loss": loss, "time.elapsed_s": steps * parameters * 1e-6},
        {"step": steps, "metrics.val_loss": loss, "metrics.val_bits_per_byte": loss / 2},
        {"event": "finished", "step": steps, "reason": "max_steps"},
    ]
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(Path(path).read_text())
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
