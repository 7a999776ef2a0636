"""Small random models of both sides: a checkpoint of ours, and a directory that `transformers` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from config.io import dump_toml
from tests.training.tiny_run import END, TinyFiles, tiny_config
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.interop.verify import HARD_TEXTS
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer, train_bpe
from transformerlm.training.optim import AdamW, parameter_groups

# One scaling of the rotary embedding, in Hugging Face's names and in ours.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 32}
SPECIALS = [END, "<|user|>", "<|user|>\n"]


def make_tokenizer(text: Path, *, pattern: str = "gpt2") -> Tokenizer:
    """Train a tokenizer with two special tokens of which one begins the other."""
    hard = text.with_name("hard.txt")
    hard.write_text(text.read_text(encoding="utf-8") + 3 * "".join(HARD_TEXTS), encoding="utf-8", newline="")
    return Tokenizer(*train_bpe(hard, 512, SPECIALS, pattern=pattern), SPECIALS, pattern=pattern)


def make_checkpoint(
    home: Path,
    files: TinyFiles,
    *,
    tokenizer: Tokenizer | None = None,
    state: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Save a random model with norms that are not all one, and return the checkpoint; its state may hold more."""
    tokenizer = tokenizer or Tokenizer.from_directory(files.tokenizer)
    sizes = {"vocab_size": tokenizer.vocab_size + 3, "context_length": 64, "num_heads": 4, "d_ff": 48}
    config = tiny_config(files, home, {f"model.{key}": value for key, value in {**sizes, **model}.items()})
    torch.manual_seed(0)
    network = TransformerLM(**config.model.model_dump())
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    optimizer = AdamW(parameter_groups(network, weight_decay=0.1), 1e-3)
    state = {"tokens": 1280, "best_val_loss": 1.5, "best_step": 7, **(state or {})}
    snapshot = Snapshot.of(network, optimizer, tokenizer, config_toml=dump_toml(config), state=state)
    return save_checkpoint(home / "run" / "checkpoints", 7, snapshot)


def make_llama(
    home: Path, *, kind: str = "llama", shard: str = "5GB", tokenizer: Tokenizer | None = None, **changes: Any
) -> Path:
    """Save a random model of the `kind` by `transformers`, with a tokenizer.json if there is a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from transformerlm.interop.tokenizer_json import to_json

    sizes = {
        "vocab_size": 520,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    directory = home / "llama"
    none = {"bos_token_id": None, "eos_token_id": None}  # else the defaults of Meta's first Llama
    settings = {**sizes, **none, **({"head_dim": 8} if kind == "qwen3" else {}), **changes}
    dtype = settings.pop("dtype", torch.float32)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    network.save_pretrained(directory, max_shard_size=shard)
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(to_json(tokenizer), encoding="utf-8")
    return directory
