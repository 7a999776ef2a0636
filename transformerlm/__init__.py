"""Raw text in, a language model out: the names that most programs need, each loaded when it is first asked for.

    from transformerlm import Tokenizer, TransformerLM, generate

`__version__` needs neither torch nor numpy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformerlm.inference.generate import generate
    from transformerlm.inference.predictor import Predictor
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.tokenizer.bpe_trainer import train_bpe
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.tokenizer.tokenizer import Tokenizer as BPETokenizer

    __version__: str

__all__ = ["BPETokenizer", "Predictor", "Tokenizer", "TransformerLM", "__version__", "generate", "train_bpe"]

_HOMES = {
    "BPETokenizer": ("transformerlm.tokenizer.tokenizer", "Tokenizer"),
    "Predictor": ("transformerlm.inference.predictor", "Predictor"),
    "Tokenizer": ("transformerlm.tokenizer.tokenizer", "Tokenizer"),
    "TransformerLM": ("transformerlm.models.transformer", "TransformerLM"),
    "generate": ("transformerlm.inference.generate", "generate"),
    "train_bpe": ("transformerlm.tokenizer.bpe_trainer", "train_bpe"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("transformerlm")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'transformerlm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    rooms = {name for name, value in globals().items() if getattr(value, "__package__", "").startswith(f"{__name__}.")}
    return sorted({*__all__, *rooms, *(name for name in globals() if name.startswith("__"))})


def _hidden_package() -> str:
    """Say which package beside ours a file of the user's hides, such as a `config.py`; empty: none."""
    home = Path(__file__).resolve().parents[1]
    for name in ("config", "logger", "profiling"):
        spec = getattr(sys.modules.get(name), "__spec__", None) or find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found and found.parent != home / name:
            return (
                f"transformerlm has a package called {name}, and {found} is found in its place: rename that, or start "
                "Python with -P (PYTHONSAFEPATH=1), which leaves the script's directory off the import path"
            )
    return ""


# The commands see to it themselves: `python -m transformerlm` imports this while its first word is still "-m".
_is_command = sys.argv[:1] == ["-m"] and "transformerlm" in sys.orig_argv
if not _is_command and (_problem := _hidden_package()):
    raise ImportError(_problem)
