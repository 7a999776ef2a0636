"""The README of an exported model: how to open it, and how it was trained."""

from __future__ import annotations

from pathlib import Path

from transformerlm.interop.llama import architecture_of
from transformerlm.models.estimates import count_parameters
from transformerlm.training.checkpoint import load_config_of, load_tokenizer, read_state

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- transformerlm
- {architecture}
---

# {name}

A decoder-only Transformer of the {title} architecture, trained with transformerlm.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/{name}")
model = AutoModelForCausalLM.from_pretrained("path/to/{name}")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True)[0]))
```

## Facts

| | |
|---|---|
{facts}
"""


def model_card(checkpoint: Path, *, name: str) -> str:
    """Return the README of the model in a checkpoint; of the data it gives the files' names, not where they lie."""
    config, state, tokenizer = load_config_of(checkpoint), read_state(checkpoint), load_tokenizer(checkpoint)
    model, training, optimizer = config.model, config.training, config.optimizer
    facts = {
        "parameters": f"{count_parameters(model.model_dump()):,}",
        "layers, width, heads": f"{model.num_layers}, {model.d_model}, {model.num_heads}",
        "context": f"{model.context_length:,} tokens",
        "tokenizer": f"byte-level BPE, {tokenizer.vocab_size:,} tokens, pattern {tokenizer.pattern}",
        "tokenizer sha256": tokenizer.fingerprint(),
        "dataset": config.logging.dataset or config.data.train.name,
    }
    if "imported_from" in state:
        facts = {**facts, "dataset": "unknown", "imported from": state["imported_from"]}
    else:
        facts |= {
            "steps": f"{state['step']:,} of {training.max_steps:,}",
            "tokens seen": f"{state['tokens']:,}",
            "sequences per step": f"{training.batch_size:,}",
            "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {config.schedule.name}",
            "seed": str(training.seed),
        }
    if state.get("best_val_loss") is not None:
        facts["best validation loss"] = f"{state['best_val_loss']:.4f} nats per token, at step {state['best_step']:,}"
    rows = (f"| {key} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for key, value in facts.items())
    architecture = architecture_of(model.model_dump())
    return _CARD.format(name=name, architecture=architecture, title=architecture.title(), facts="\n".join(rows))
