"""What somebody meant by an unknown key: first the words of other projects, then the most similar name."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

# What other projects call our keys, which newcomers type first. Of several names, the first that a command has counts.
# A dotted name means that key only; a name without a dot means any key of that name.
SYNONYMS: dict[str, tuple[str, ...]] = {
    # nanoGPT and its kin
    "lr": ("learning_rate",),
    "max_lr": ("learning_rate",),
    "min_lr": ("min_learning_rate",),
    "n_layer": ("num_layers",),
    "n_layers": ("num_layers",),
    "n_head": ("num_heads",),
    "n_heads": ("num_heads",),
    "n_kv_head": ("num_kv_heads",),
    "n_kv_heads": ("num_kv_heads",),
    "n_embd": ("d_model",),
    "dim": ("d_model",),
    "block_size": ("context_length",),
    "seq_len": ("context_length",),
    "sequence_length": ("context_length",),
    "max_seq_len": ("context_length",),
    "max_iters": ("training.max_steps",),
    "steps": ("training.max_steps",),
    "warmup_iters": ("warmup_steps",),
    "grad_clip": ("max_grad_norm",),
    "gradient_clip_val": ("max_grad_norm",),
    "weight_tying": ("tie_embeddings",),
    "eval_iters": ("eval_tokens",),
    "eval_batches": ("eval_tokens",),
    "dtype": ("precision",),
    "out_dir": ("runs_dir", "output_dir", "output"),
    "wandb_log": ("logging.backend",),
    "wandb_project": ("wandb.project",),
    "wandb_run_name": ("logging.run_name",),
    "patience": ("early_stop_patience",),
    "start": ("prompt",),
    # Hugging Face
    "hidden_size": ("d_model",),
    "num_hidden_layers": ("num_layers",),
    "num_attention_heads": ("num_heads",),
    "num_key_value_heads": ("num_kv_heads",),
    "head_dim": ("d_head",),
    "intermediate_size": ("d_ff",),
    "hidden_act": ("ffn",),
    "activation": ("ffn",),
    "max_position_embeddings": ("context_length",),
    "n_positions": ("context_length",),
    "n_ctx": ("context_length",),
    "rms_norm_eps": ("norm_eps",),
    "tie_word_embeddings": ("tie_embeddings",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "output_dir": ("runs_dir", "output"),
    "per_device_train_batch_size": ("training.micro_batch_size",),
    "train_batch_size": ("training.batch_size",),
    "save_steps": ("checkpoint.interval",),
    "save_interval": ("checkpoint.interval",),
    "save_total_limit": ("checkpoint.keep",),
    "eval_steps": ("training.eval_interval",),
    "logging_steps": ("training.log_interval",),
    "warmup_ratio": ("warmup_steps",),
    "lr_scheduler_type": ("schedule.name",),
    "optim": ("optimizer.name",),
    "adam_beta1": ("beta1",),
    "adam_beta2": ("beta2",),
    "adam_epsilon": ("optimizer.eps",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "torch_compile": ("training.compile",),
    "report_to": ("logging.backend",),
    "resume_from_checkpoint": ("checkpoint.resume",),
    "max_length": ("max_new_tokens",),
    "num_return_sequences": ("num_samples",),
    "model_name_or_path": ("checkpoint.init_from", "checkpoint"),
    "tokenizer_name": ("data.tokenizer", "tokenizer"),
}
# Words without a key of ours: a key whose presence makes the answer useful, and the answer.
EXPLAINED: dict[str, tuple[str, str]] = {
    "epochs": ("training.max_steps", "the length of a run is training.max_steps"),
    "gradient_accumulation_steps": (
        "training.micro_batch_size",
        "accumulation is training.batch_size / training.micro_batch_size",
    ),
    "bias": ("model.d_model", "no layer of the model has a bias"),
    "do_sample": ("sampling.temperature", "sampling.temperature = 0 takes the most likely token"),
}
_SAME = {
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "grad_accum_steps": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
}


def hint(dotted: str, names: Sequence[str], *, sections: bool, prefix: str = "") -> str:
    """Return what to add, in brackets, to the refusal of an unknown key: what was most likely meant, or an explanation.

    Args:
        dotted: the unknown key.
        names: all keys that there are.
        sections: whether a section is a name, too: in a file it is, on the command line it is not.
        prefix: goes before a suggested name.
    """
    leaf = _plain(dotted.rpartition(".")[2])
    key, text = EXPLAINED.get(_SAME.get(leaf, leaf), ("", ""))
    if key in names:
        return f" ({text})"
    section = dotted.rpartition(".")[0]
    found = nearest(dotted, names, sections=sections)
    if not prefix:
        found = [name.removeprefix(f"{section}.") for name in found]
    return f" (did you mean {' or '.join(prefix + name for name in found)}?)" if found else ""


def nearest(dotted: str, names: Sequence[str], *, sections: bool) -> list[str]:
    """Return the names that `dotted` most likely stands for; several if they are equally likely."""
    section, _, leaf = dotted.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    if sections and not section:
        siblings |= {name.split(".")[0]: name.split(".")[0] for name in names if "." in name}
    for wanted in (_plain(leaf), *SYNONYMS.get(_plain(leaf), ())):
        exact = [name for name in names if wanted in (name, name.rpartition(".")[2])]
        if wanted in siblings or exact:
            return [siblings[wanted]] if wanted in siblings else exact[:3]
    elsewhere: dict[str, str] = {}
    for name in names:
        elsewhere.setdefault(name.rpartition(".")[2], name)
    near, far = closest(leaf, siblings, cutoff=0.6), closest(leaf, elsewhere, cutoff=0.75)
    if far and (not near or _likeness(far[0], leaf) > _likeness(near[0], leaf)):
        return [elsewhere[name] for name in far]
    near = near or [name for name in siblings if name == leaf[::-1]]  # two letters in the wrong order are not alike
    return [siblings[name] for name in near] or closest(dotted, names, cutoff=0.75)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _likeness(name: str, word: str) -> tuple[float, int]:
    """Return how similar two words are; the same letters break a tie, so that to_pk means top_k."""
    ours, theirs = Counter(name), Counter(word)
    apart = ((ours - theirs) + (theirs - ours)).total()
    return difflib.SequenceMatcher(None, name, word).ratio(), -apart


def closest(word: str, names: Iterable[str], *, cutoff: float) -> list[str]:
    """Return the names most similar to a word, each at least `cutoff` (of 1) similar; several if they are equal."""
    likeness = {name: _likeness(name, word) for name in difflib.get_close_matches(word, names, n=3, cutoff=cutoff)}
    return sorted(name for name in likeness if likeness[name] == max(likeness.values()))
