"""A tokenizer from files of other tools: the same ids, in a directory that all our commands open."""

from __future__ import annotations

import json

import pytest

from transformerlm.interop.tiktoken_ranks import write_ranks
from transformerlm.interop.tokenizer_import import import_tokenizer
from transformerlm.interop.tokenizer_json import write_tokenizer_json
from transformerlm.tokenizer import Tokenizer


def write(tokenizer, form, home):
    """Write a tokenizer in another tool's form."""
    if form == "tokenizer_json":
        write_tokenizer_json(tokenizer, home / "source", verify=False)
    elif form == "tiktoken":
        write_ranks(tokenizer, home / "source", verify=False)
    else:
        tokenizer.save(home / "source")
        (home / "source" / "special_tokens.json").unlink()
    return home / "source"


@pytest.mark.parametrize("form", ["tokenizer_json", "tiktoken", "gpt2"])
def test_each_form_gives_the_same_tokenizer(form, tokenizer, tmp_path):
    """The directory holds the tokenizer that was written, verified by the library of its format."""
    outcome = import_tokenizer(
        write(tokenizer, form, tmp_path),
        tmp_path / "out",
        form=form,
        pattern=tokenizer.pattern,
        special_tokens=tokenizer.special_tokens,
    )
    assert outcome.startswith(f"verified with {'tiktoken' if form == 'tiktoken' else 'tokenizers'}: ")
    assert Tokenizer.from_directory(tmp_path / "out").fingerprint() == tokenizer.fingerprint()


def test_a_refusal_leaves_nothing(tokenizer, tmp_path):
    """A vocabulary with a token that no merge makes is refused, and there is no directory."""
    source = write(tokenizer, "gpt2", tmp_path)
    vocab = json.loads((source / "vocab.json").read_text())
    (source / "vocab.json").write_text(json.dumps({**vocab, "zzzzz": len(vocab)}))
    with pytest.raises(ValueError, match="expected a merge for each token"):
        import_tokenizer(source, tmp_path / "out", form="gpt2", pattern="gpt2", special_tokens=tokenizer.special_tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_ids_in_the_library_are_an_error(tokenizer, tmp_path):
    """A tiktoken file read with the wrong pattern gives what tiktoken gives with that pattern."""
    source = write(tokenizer, "tiktoken", tmp_path)
    other = "cl100k" if tokenizer.pattern == "gpt2" else "gpt2"
    import_tokenizer(source, tmp_path / "out", form="tiktoken", pattern=other, special_tokens=["<s>"])
    assert Tokenizer.from_directory(tmp_path / "out").pattern == other


def test_a_tokenizer_is_replaced_only_when_asked(tokenizer, tmp_path):
    """An existing output is refused; with overwrite it is replaced if it is a tokenizer."""
    source = write(tokenizer, "tokenizer_json", tmp_path)
    settings = {"form": "tokenizer_json", "pattern": "gpt2", "special_tokens": [], "verify": False}
    import_tokenizer(source, tmp_path / "out", **settings)
    with pytest.raises(FileExistsError):
        import_tokenizer(source, tmp_path / "out", **settings)
    import_tokenizer(source, tmp_path / "out", **settings, overwrite=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"expected a directory with vocab\.json to overwrite"):
        import_tokenizer(source, tmp_path / "other", **settings, overwrite=True)
    (tmp_path / "out" / "model.safetensors").write_text("")  # a model's directory has these files, too
    with pytest.raises(ValueError, match=r"found model\.safetensors in it"):
        import_tokenizer(source, tmp_path / "out", **settings, overwrite=True)
