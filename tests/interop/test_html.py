"""A model's page is one whole file, or is not there; tests/interop/browser opens it."""

from __future__ import annotations

import errno
import hashlib
import re

import pytest

from tests.interop.models import make_checkpoint
from transformerlm.checkpoints.load import load_model
from transformerlm.interop import html as interop
from transformerlm.interop.html import check_size, estimated_bytes, read_html, write_html
from transformerlm.models.settings import ModelSettings
from transformerlm.tokenizer import Tokenizer

LARGE = {"context_length": 64, "d_model": 1024, "num_heads": 16}


def test_a_page_is_the_same_each_time_and_reads_back(files, tmp_path):
    """Two exports are equal byte for byte, in several blocks too; the facts and the run's sampling are in it."""
    checkpoint = make_checkpoint(tmp_path, files)
    outcome = write_html(checkpoint, tmp_path / "new" / "a.html", license="mit", languages=["de", "en"])
    assert outcome.startswith("verified: ")
    assert outcome.endswith("arrays read back equal")
    write_html(checkpoint, tmp_path / "a.html", license="mit", languages=["de", "en"])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "new" / "a.html").read_bytes()
    data, parts = read_html(tmp_path / "a.html")
    assert data["facts"]["license"] == "mit"
    assert (data["language"], data["facts"]["language"]) == ("de", "de, en")
    assert (data["sampling"]["temperature"], data["sampling"]["seed"]) == (0.8, None)
    assert data["num_parameters"] == load_model(checkpoint).num_parameters()
    assert parts["embedding"].shape == (290 * 32,)


def test_weights_come_in_blocks(files, tmp_path, monkeypatch):
    """A model larger than a block has several, and reads back; one block fewer is noticed."""
    monkeypatch.setattr(interop, "BLOCK_BYTES", 3 * 1024)
    page = tmp_path / "a.html"
    write_html(make_checkpoint(tmp_path, files), page)
    blocks = re.findall(r'class="weights">[^<]*</script>\n', page.read_text(encoding="utf-8"))
    assert len(blocks) > 5
    page.write_text(page.read_text(encoding="utf-8").replace(blocks[2], "></script>"), encoding="utf-8")
    with pytest.raises(OSError, match=r"expected [\d,]+ bytes of weights, found"):
        read_html(page)


def test_a_name_is_no_markup(files, tmp_path):
    """The file's name is the model's on the page, as text."""
    page = tmp_path / "a<img src=x>&amp;.html"
    write_html(make_checkpoint(tmp_path, files), page)
    text = page.read_text(encoding="utf-8")
    assert "<title>a&lt;img src=x&gt;&amp;amp;</title>" in text
    assert "<img" not in text


def test_the_policy_allows_nothing_but_the_page_s_own_script(files, tmp_path):
    """No source is named but hashes, and the worker's blob; nothing can be connected to."""
    write_html(make_checkpoint(tmp_path, files), tmp_path / "a.html", verify=False)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src 'sha256-[\w+/=]+'; img-src data:; "
        r"base-uri 'none'; form-action 'none'; worker-src blob:",
        policy,
    )


def test_a_model_that_is_too_large_is_refused(files):
    """The error says how large the page would be, and what has no limit; the estimate is close."""
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    with pytest.raises(ValueError, match=r"at most 256 MB, found a model that makes one of [\d,]+ MB; format gguf"):
        check_size(ModelSettings(vocab_size=290, num_layers=24, **LARGE), tokenizer)
    check_size(ModelSettings(vocab_size=290, num_layers=8, **LARGE), tokenizer)


def test_the_estimate_is_the_size(files, tmp_path):
    """Weights are nearly all of it, and the rest is less than 200 kB."""
    checkpoint = make_checkpoint(tmp_path, files, d_model=256, ffn="silu", num_kv_heads=1)
    write_html(checkpoint, tmp_path / "a.html", verify=False)
    estimate = estimated_bytes(load_model(checkpoint).settings, vocab_size=290)
    assert estimate < (tmp_path / "a.html").stat().st_size < estimate + 200_000


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_existing_file_is_replaced_only_if_asked(overwrite, files, tmp_path):
    """Without `overwrite` it stays as it is."""
    page = tmp_path / "a.html"
    page.write_text("mine")
    checkpoint = make_checkpoint(tmp_path, files)
    if overwrite:
        write_html(checkpoint, page, overwrite=True)
        assert read_html(page)[0]["header"]["pattern"] == "gpt2"
    else:
        with pytest.raises(FileExistsError, match="is there already"):
            write_html(checkpoint, page)
        assert page.read_text() == "mine"


def test_nothing_is_left_of_a_page_that_cannot_be_written(files, tmp_path, monkeypatch):
    """A full disk, and a file that does not read back, leave the old file and no new one."""
    checkpoint, page = make_checkpoint(tmp_path, files), tmp_path / "a.html"
    page.write_text("old")
    before = hashlib.sha256(page.read_bytes()).hexdigest()

    def fill_disk(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("_read_back", "_blocks"):
        with monkeypatch.context() as patch:
            patch.setattr(interop, name, fill_disk)
            with pytest.raises(OSError, match=r"a\.html: cannot be written: No space left on device"):
                write_html(checkpoint, page, overwrite=True)
        assert hashlib.sha256(page.read_bytes()).hexdigest() == before
        assert not list(tmp_path.glob("*.tmp"))


def test_what_is_no_such_page_is_not_read(tmp_path):
    """Any other file is refused."""
    (tmp_path / "a.html").write_text("<p>hello</p>")
    with pytest.raises(OSError, match="not a page of a model"):
        read_html(tmp_path / "a.html")
