"""A whole training run on one page: the loop of `transformerlm/training/trainer.py`, built from the product's parts.

    python docs/examples/minimal_train.py data/train.npy data/valid.npy data/tokenizer model.safetensors

It takes the files that transformerlm-train-tokenizer and transformerlm-make-data write. With the same settings its
losses are those of transformerlm-train, which adds exact resuming from checkpoints, micro-batches, several GPUs, bf16,
skipped steps, time limits and logs. docs/tour/train.py is the same loop with its own parts, to read how they work.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import transformerlm

transformerlm.wait_politely()  # before torch is imported: threads that spin would slow a busy machine down

import torch
from safetensors.torch import save_file

from transformerlm import Predictor, Tokenizer, TransformerLM
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.training.data import get_batch, sequential_batches
from transformerlm.training.loop import evaluate
from transformerlm.training.loss import cross_entropy
from transformerlm.training.optim import AdamW, clip_grad_norm, parameter_groups
from transformerlm.training.schedule import learning_rate

MODEL = {"context_length": 128, "d_model": 256, "num_layers": 4, "num_heads": 4}
SCHEDULE = {"name": "cosine", "learning_rate": 3e-3, "min_learning_rate": 1e-4, "warmup_steps": 100, "max_steps": 1000}


def train(
    files: dict[str, str],
    *,
    sizes: dict[str, int],
    schedule: dict[str, Any],
    report: Callable[[int, dict[str, float]], object],
    batch_size: int = 16,
    seed: int = 0,
    eval_interval: int = 50,
) -> Predictor:
    """Train a model on the token file `files["train"]`, report its losses, and return what continues texts with it."""
    tokenizer, context_length = Tokenizer.from_directory(files["tokenizer"]), sizes["context_length"]
    data, held_out = TokenDataset(files["train"]).tokens, TokenDataset(files["valid"]).tokens
    torch.manual_seed(seed)
    model = TransformerLM(vocab_size=tokenizer.vocab_size, **sizes)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=0.0, betas=(0.9, 0.95))
    token_bytes = torch.tensor(tokenizer.token_byte_lengths())

    for step in range(1, schedule["max_steps"] + 1):
        # A batch depends on seed and step alone: inputs and targets (batch, seq), one token apart.
        inputs, targets = get_batch(data, batch_size=batch_size, context_length=context_length, seed=seed, step=step)
        loss = cross_entropy(model(inputs), targets)  # logits (batch, seq, vocab_size), mean loss in nats
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, **schedule)
        optimizer.step()
        losses = {"loss": loss.item()}
        if step % eval_interval == 0 or step == schedule["max_steps"]:
            windows = sequential_batches(
                held_out, batch_size=batch_size, context_length=context_length, max_windows=256
            )
            found = evaluate(model, windows, token_bytes=token_bytes, autocast=nullcontext)
            losses |= {"val_loss": found.loss, "val_bits_per_byte": found.bits_per_byte}
        report(step, losses)
    return Predictor(model.eval(), tokenizer)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    named = dict(zip(("train", "valid", "tokenizer"), sys.argv[1:4], strict=True))
    predictor = train(named, sizes=MODEL, schedule=SCHEDULE, report=lambda step, losses: print(step, losses))
    save_file(predictor.model.state_dict(), sys.argv[4])  # TransformerLM(...).load_state_dict(load_file(...)) takes it
    print(predictor.generate("", max_new_tokens=100, temperature=0.8, top_p=0.95, seed=0))
