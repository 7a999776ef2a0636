"""`python -m transformerlm train ...` is `transformerlm train ...`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # the working directory comes last: it may hold a `cli.py`
        sys.path.append(sys.path.pop(0))
    from cli.entry import transformerlm

    transformerlm()
