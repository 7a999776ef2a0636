"""`transformerlm-import`: files of other tools in, a checkpoint or a tokenizer out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.import_")

from collections.abc import Sequence

from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.import_ import ImportConfig

# What --help shows.
SHORT = ("source", "format", "output", "tokenizer", "pattern", "special_tokens", "overwrite")
EXAMPLES = (
    ("a model in Hugging Face's format", "--source models/llama --output runs/imported"),
    ("a tokenizer alone", "--source models/llama/tokenizer.json --format=tokenizer_json --output data/tokenizer"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-import", ImportConfig, import_, short=SHORT, examples=EXAMPLES), argv)


def import_(config: ImportConfig) -> None:
    """Write the output, and say how it was checked."""
    with working("importing"):
        verified = _read(config)
    note(f"{config.output}: written; {verified}")
    if config.format == "hf" and not config.tokenizer:
        note("warning: imported without its tokenizer: enough for checkpoint.init_from, not for generating text")


def _read(config: ImportConfig) -> str:
    if config.format == "hf":
        from transformerlm.interop.hf_import import read_hf

        return read_hf(
            config.source,
            config.output,
            with_tokenizer=config.tokenizer,
            verify=config.verify,
            overwrite=config.overwrite,
        )
    from transformerlm.interop.tokenizer_import import import_tokenizer

    return import_tokenizer(
        config.source,
        config.output,
        form=config.format,
        pattern=config.pattern or "gpt2",
        special_tokens=config.special_tokens,
        verify=config.verify,
        overwrite=config.overwrite,
    )
