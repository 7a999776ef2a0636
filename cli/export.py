"""`transformerlm-export`: a checkpoint or a tokenizer in, files for other tools out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.export")

from collections.abc import Sequence

from cli.checkpoints import described
from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.export import ExportConfig

# What --help shows.
SHORT = ("checkpoint", "format", "output", "dtype", "verify", "overwrite")
EXAMPLES = (
    ("for transformers, vLLM and others", "--config export"),
    ("for llama.cpp and others", "--checkpoint runs/first --format=gguf --output exports/first.gguf"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-export", ExportConfig, export, short=SHORT, examples=EXAMPLES), argv)


def export(config: ExportConfig) -> None:
    """Write the output in the format that the configuration names, and say what was checked of it."""
    with working("exporting"):
        verified = _WRITERS[config.format](config)
    note(f"{config.output}: written; {verified}")


def _export_hf(config: ExportConfig) -> str:
    from transformerlm.interop.hf_export import write_hf
    from transformerlm.training.checkpoint import resolve

    checkpoint = resolve(config.checkpoint)
    verified = write_hf(
        checkpoint,
        config.output,
        dtype=config.dtype,
        max_shard_mb=config.max_shard_mb,
        verify=config.verify,
        overwrite=config.overwrite,
    )
    note(described(config.checkpoint, checkpoint))
    return verified


def _export_gguf(config: ExportConfig) -> str:
    from transformerlm.interop.gguf import write_gguf
    from transformerlm.training.checkpoint import resolve

    checkpoint, settings = resolve(config.checkpoint), {"verify": config.verify, "overwrite": config.overwrite}
    verified = write_gguf(checkpoint, config.output, dtype=config.dtype, **settings)
    note(described(config.checkpoint, checkpoint))
    return verified


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


# Each writes the output, or nothing, and returns one line about how it was verified.
_WRITERS = {
    "hf": _export_hf,
    "gguf": _export_gguf,
    "tokenizer_json": _export_tokenizer_json,
    "tiktoken": _export_tiktoken,
}
