"""`transformerlm-export`: a checkpoint or a tokenizer in, files for other tools out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.export")

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.checkpoints import described
from cli.hints import hint_lines
from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.export import ExportConfig

if TYPE_CHECKING:
    from transformerlm.interop.model_card import CardNotes

# What --help shows.
SHORT = ("checkpoint", "format", "output", "dtype", "license", "language", "verify", "overwrite")
EXAMPLES = (
    ("for transformers, vLLM and others", "--config export"),
    ("for llama.cpp and others", "--checkpoint runs/first --format=gguf --output exports/first.gguf"),
    ("for a friend's browser", "--checkpoint runs/first --format=html --output exports/first.html"),
)
SAMPLE_SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-export", ExportConfig, export, short=SHORT, examples=EXAMPLES), argv)


def export(config: ExportConfig) -> None:
    """Write the output in the format that the configuration names, and say how it was checked."""
    with working("exporting"):
        verified = _written(config)
    note(f"{config.output}: written; {verified}")
    if config.format == "gguf":
        _say_how_to_open(config)


def _written(config: ExportConfig) -> str:
    """Write the output, or nothing; return one line about how it was verified, and say which checkpoint it is of."""
    from transformerlm.checkpoints.directory import resolve

    if config.format in _OF_TOKENIZERS:
        return _OF_TOKENIZERS[config.format](config)
    checkpoint = resolve(config.checkpoint)
    verified = _OF_MODELS[config.format](config, checkpoint)
    note(described(config.checkpoint, checkpoint))
    return verified


def _export_hf(config: ExportConfig, checkpoint: Path) -> str:
    from transformerlm.interop.hf_export import write_hf

    return write_hf(
        checkpoint,
        config.output,
        dtype=config.dtype,
        max_shard_mb=config.max_shard_mb,
        verify=config.verify,
        overwrite=config.overwrite,
        notes=partial(_card_notes, config, checkpoint),
    )


def _card_notes(config: ExportConfig, checkpoint: Path, directory: Path) -> CardNotes:
    """Return what the card says besides facts: for a model that was trained here, also a sample and the loss curve."""
    from transformerlm.checkpoints.validation import read_state
    from transformerlm.experiments.loss_curve import save_loss_curve
    from transformerlm.interop.model_card import CardNotes

    notes = CardNotes(license=config.license, languages=config.language)
    if "imported_from" in read_state(checkpoint):
        return notes
    notes = _with_sample(notes, checkpoint)
    folder = checkpoint.absolute().parent
    if folder.name == "checkpoints":  # a checkpoint may have been copied without its run
        with suppress(OSError, ValueError):  # or the run without its losses
            picture = save_loss_curve(folder.parent, directory / "loss.png")
            notes = replace(notes, picture=picture.name)
    return notes


def _with_sample(notes: CardNotes, checkpoint: Path) -> CardNotes:
    """Add a text that the model writes with the run's own settings for samples."""
    from transformerlm.checkpoints.load import load_config_of
    from transformerlm.inference.predictor import Predictor

    samples = load_config_of(checkpoint).samples
    prompt, settings = samples.prompts[0], samples.sampling.model_dump()
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    sample = predictor.generate(prompt, seed=SAMPLE_SEED, allow_special=samples.allow_special, **settings)
    chosen = ["temperature", "top_p", *(key for key in ("top_k", "min_p") if settings[key])]
    drawn = ", ".join(f"{key} = {settings[key]}" for key in chosen)
    beginning = f"after the prompt {json.dumps(prompt, ensure_ascii=False)}" if prompt else "from the start of a text"
    return replace(notes, sample=sample, sample_settings=f"Written {beginning} with {drawn}, seed = {SAMPLE_SEED}:")


def _export_gguf(config: ExportConfig, checkpoint: Path) -> str:
    from transformerlm.interop.gguf import write_gguf

    settings = {"verify": config.verify, "overwrite": config.overwrite}
    return write_gguf(checkpoint, config.output, dtype=config.dtype, **settings)


def _export_html(config: ExportConfig, checkpoint: Path) -> str:
    from transformerlm.interop.html import write_html

    verified = write_html(
        checkpoint,
        config.output,
        license=config.license,
        languages=config.language,
        verify=config.verify,
        overwrite=config.overwrite,
    )
    return f"{config.output.stat().st_size / 1e6:.1f} MB; {verified}"


def _say_how_to_open(config: ExportConfig) -> None:
    """Write the commands that come next; the Modelfile is beside the file."""
    from transformerlm.interop.gguf import modelfile_path

    path = str(modelfile_path(config.output))
    name = re.sub(r"[^a-z0-9_.-]+", "-", config.output.stem.lower()).strip("-.") or "model"
    hints = [
        ("open it with Ollama", shlex.join(["ollama", "create", name, "-f", path])),
        ("then write or chat with it", shlex.join(["ollama", "run", name])),
    ]
    note("\n".join(hint_lines(hints)))


def _export_tokenizer_json(config: ExportConfig) -> str:
    from transformerlm.interop.sources import leading_token_of, open_tokenizer
    from transformerlm.interop.tokenizer_json import write_tokenizer_json

    tokenizer = open_tokenizer(config.checkpoint)
    leading = leading_token_of(config.checkpoint, tokenizer)
    return write_tokenizer_json(
        tokenizer, config.output, leading=leading, verify=config.verify, overwrite=config.overwrite
    )


def _export_tiktoken(config: ExportConfig) -> str:
    from transformerlm.interop.sources import open_tokenizer
    from transformerlm.interop.tiktoken_ranks import write_ranks

    tokenizer = open_tokenizer(config.checkpoint)
    return write_ranks(tokenizer, config.output, verify=config.verify, overwrite=config.overwrite)


_OF_MODELS = {"hf": _export_hf, "gguf": _export_gguf, "html": _export_html}
_OF_TOKENIZERS = {"tokenizer_json": _export_tokenizer_json, "tiktoken": _export_tiktoken}
