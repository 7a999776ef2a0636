"""What a run's configuration would be if nobody had set a key."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from config.keys import iter_keys
from config.train import TrainConfig


@cache
def default_config() -> dict[str, Any]:
    """Return the defaults of training's keys by their dotted names, as `config_of` has a run's own.

    A key that must be set has none, and one that may be without a value is not in a run's configuration either.
    """
    known = [(key.name, key.default) for key in iter_keys(TrainConfig) if key.default not in (None, "none")]
    return {name: json.loads(default) for name, default in known if default is not None}
