"""The README of an exported model: how to open it, what it writes, how it was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.train import TrainConfig
from transformerlm.checkpoints.load import load_config_of, load_tokenizer
from transformerlm.checkpoints.validation import read_state
from transformerlm.interop.llama import architecture_of
from transformerlm.models.estimates import count_parameters
from transformerlm.models.settings import ModelSettings
from transformerlm.token_files.index import facts_path
from transformerlm.tokenizer.tokenizer import Tokenizer

_MAX_SPECIALS = 10
_MAX_NAMES = 5

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
{fields}tags:
- transformerlm
- {architecture}
---

# {name}

A decoder-only Transformer of the {title} architecture, {done} with transformerlm.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # this directory, or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True, tokenizer=tokenizer)[0]))
```
{sections}
## Facts

| | |
|---|---|
{facts}
"""


@dataclass(frozen=True)
class CardNotes:
    """What a card says besides the facts in the checkpoint; it omits what is None or empty."""

    license: str | None = None
    """An identifier of the Hub, such as "mit"."""
    languages: Sequence[str] = ()
    """Codes such as "en"."""
    sample: str | None = None
    """Text that the model wrote; `sample_settings` says how."""
    sample_settings: str = ""
    picture: str | None = None
    """The name of the loss curve's file, beside the card."""


def model_card(checkpoint: Path, *, name: str, notes: CardNotes | None = None) -> str:
    """Return the README of the model in a checkpoint; it names the files of the data, but not their folders."""
    notes = notes or CardNotes()
    config, facts = load_config_of(checkpoint), card_facts(checkpoint)
    rows = (f"| {key} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for key, value in facts.items())
    architecture = architecture_of(ModelSettings(**config.model.model_dump()))
    return _CARD.format(
        fields=_fields(notes),
        name=name,
        architecture=architecture,
        title=architecture.title(),
        done="exported" if "imported from" in facts else "trained",
        sections=_sections(notes),
        facts="\n".join(rows),
    )


def card_facts(checkpoint: Path) -> dict[str, str]:
    """Return the facts of a checkpoint in words: sizes, tokenizer, data, training."""
    return _facts(load_config_of(checkpoint), read_state(checkpoint), load_tokenizer(checkpoint))


def _fields(notes: CardNotes) -> str:
    """Return the lines of the front matter that only a person can fill in, in quotes: YAML reads a bare no as false."""
    lines = [f"license: {json.dumps(notes.license)}"] if notes.license else []
    lines += ["language:", *(f"- {json.dumps(code)}" for code in notes.languages)] if notes.languages else []
    return "".join(f"{line}\n" for line in lines)


def _sections(notes: CardNotes) -> str:
    parts = []
    if notes.sample is not None:
        longest = max(map(len, re.findall("`+", notes.sample)), default=0)
        fence = "`" * max(3, longest + 1)
        parts.append(f"\n## A sample\n\n{notes.sample_settings}\n\n{fence}text\n{notes.sample.strip()}\n{fence}\n")
    if notes.picture is not None:
        parts.append(f"\n## Loss\n\n![The loss over the steps]({notes.picture})\n")
    return "".join(parts)


def _facts(config: TrainConfig, state: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    model, training, optimizer = ModelSettings(**config.model.model_dump()), config.training, config.optimizer
    sidecar = _sidecar(config.data.train, sha256=state.get("data", {}).get("train_sha256"))
    facts = {
        "parameters": f"{count_parameters(model):,}",
        "layers, width, heads": f"{model.num_layers}, {model.d_model}, {model.num_heads}"
        + (f" of {model.d_head}" if model.d_query != model.d_model else ""),
        "context": f"{model.context_length:,} tokens",
        "tokenizer": f"byte-level BPE, {tokenizer.vocab_size:,} tokens, pattern {tokenizer.pattern}",
        "special tokens": ", ".join(f"`{token}`" for token in tokenizer.special_tokens[:_MAX_SPECIALS]) or "none",
        "tokenizer sha256": tokenizer.fingerprint(),
    }
    if "imported_from" in state:
        return facts | {"dataset": "unknown", "imported from": state["imported_from"]} | _best(state)
    if sidecar.get("bytes") and sidecar.get("tokens"):
        facts["bytes per token"] = f"{sidecar['bytes'] / sidecar['tokens']:.2f}, of the text it was trained on"
    return {
        **facts,
        "dataset": config.logging.dataset or _text_names(sidecar) or config.data.train.name,
        "steps": f"{state['step']:,} of {training.max_steps:,}",
        **({"tokens seen": f"{state['tokens']:,}"} if "tokens" in state else {}),
        "sequences per step": f"{training.batch_size:,}",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {config.schedule.name}",
        "seed": str(training.seed),
        **_best(state),
    }


def _best(state: dict[str, Any]) -> dict[str, str]:
    if state.get("best_val_loss") is None:
        return {}
    loss = f"{state['best_val_loss']:.4f} nats per token, at step {state['best_step']:,}"
    return {"best validation loss": loss}


def _sidecar(tokens: Path, *, sha256: str | None) -> dict[str, Any]:
    """Return what make-data wrote beside the token file, or nothing if another file has taken its place."""
    try:
        record = json.loads(facts_path(tokens).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and sha256 is not None and record.get("sha256") == sha256 else {}


def _text_names(sidecar: dict[str, Any]) -> str:
    """Return the names of the first few files that the text came from."""
    names = [Path(source["path"]).name for source in sidecar.get("sources", [])]
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
