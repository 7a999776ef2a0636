"""A tokenizer without a model, from the files of other tools, turned into a tokenizer directory of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformerlm.interop import tokenizer_json
from transformerlm.interop.tiktoken_ranks import read_ranks, to_ranks
from transformerlm.interop.verify import NOT_ASKED, verify_ranks, verify_tokenizer_json
from transformerlm.tokenizer.io import MERGES_FILE, SPECIALS_FILE, VOCAB_FILE, tokenizer_files
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, whole_directory
from transformerlm.utils.strings import check_is_no_string


def import_tokenizer(
    source: Path,
    out: Path,
    *,
    form: str,
    pattern: str,
    special_tokens: Sequence[str],
    verify: bool = True,
    overwrite: bool = False,
) -> str:
    """Write the tokenizer directory `out`, and return one line about how it was verified.

    Args:
        source: a `tokenizer.json`, a file of ranks, or a directory with `vocab.json` and `merges.txt`,
            or the beginning of such names (`gpt2` of `gpt2-vocab.json`).
        out: the directory to write.
        form: "tokenizer_json", "gpt2" or "tiktoken".
        pattern: for "gpt2" and "tiktoken": how text is split, which their files do not say.
        special_tokens: for "gpt2" and "tiktoken": those that their files do not name.
        verify: compare with the library that the files come from.
        overwrite: replace an `out` that exists.

    Raises:
        TypeError: `special_tokens` is one string.
        FileExistsError: `out` exists already, and `overwrite` is not set.
        ValueError: a file is malformed, or the library gives other ids.
    """
    check_is_no_string(special_tokens, "special_tokens")
    check_free(out, overwrite=overwrite, holds=VOCAB_FILE, beside=(MERGES_FILE, SPECIALS_FILE))
    if form == "tokenizer_json":
        tokenizer = tokenizer_json.from_file(source)
    elif form == "gpt2":
        files = tokenizer_files(source)[:2]
        if missing := [path for path in files if not path.exists()]:
            raise FileNotFoundError(
                f"{missing[0]}: expected GPT-2's {VOCAB_FILE} and {MERGES_FILE} in a directory, found none "
                "(elsewhere they are called encoder.json and vocab.bpe)"
            )
        tokenizer = Tokenizer.from_files(*files, special_tokens, pattern=pattern)
        tokenizer_json.check_reachable(tokenizer)
    else:
        tokenizer = read_ranks(source, pattern=pattern, special_tokens=special_tokens)
    with whole_directory(out) as directory:
        tokenizer.save(directory)
        return _verify(tokenizer, source, form) if verify else NOT_ASKED


def _verify(tokenizer: Tokenizer, source: Path, form: str) -> str:
    if form == "tiktoken":
        return verify_ranks(tokenizer, to_ranks(tokenizer))
    text = source.read_text(encoding="utf-8") if form == "tokenizer_json" else tokenizer_json.to_json(tokenizer)
    return verify_tokenizer_json(tokenizer, text)
