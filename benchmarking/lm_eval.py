"""EleutherAI's lm-evaluation-harness with our models.

    python -m benchmarking.lm_eval run --model transformerlm --model_args checkpoint=runs/first --tasks NAME ...

The harness finds models in its own registry and has no entry points for others, so this command registers ours and then
calls the harness's command, which reads the arguments.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.lm_eval")

import importlib
import importlib.util
import sys

from config.extras import how_to_install


def main() -> None:
    """Run the harness's command; exit with 2 and one line if it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        print(f"lm-eval is not installed: {how_to_install('eval')}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module("benchmarking.lm_eval_model")
    importlib.import_module("lm_eval.__main__").cli_evaluate()
