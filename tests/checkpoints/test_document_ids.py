"""The token that ends a document is recorded once, by make-data or an imported model, and read by all who need it."""

from __future__ import annotations

import json
import warnings

import pytest

from cli.train import train
from databuilder.dataset_builder import build_dataset
from tests.cli.commands import call
from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.document_ids import DocumentIds, guess_ids, ids_of_checkpoint, ids_of_data
from transformerlm.checkpoints.validation import CheckpointError
from transformerlm.inference import predictor as inference
from transformerlm.inference.predictor import Predictor
from transformerlm.interop.gguf import write_gguf
from transformerlm.interop.hf_export import write_hf
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer, train_bpe

BOT, END = "<|bot|>", "<|end|>"
ONE_STEP = {"training.max_steps": 1, "schedule.warmup_steps": 0}
DOCUMENTS = [f"what is {a} plus {b}?{BOT}{a} plus {b} is {a + b}." for a in range(9) for b in range(9)]


def make_files(folder, *, separator: str = END) -> TinyFiles:
    """Write documents, a tokenizer whose first special token does not end them, and their token file."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text(separator.join(DOCUMENTS))
    tokenizer = Tokenizer(*train_bpe(text, 290, [BOT, END]), [BOT, END])
    tokenizer.save(folder / "tokenizer")
    build_dataset(text, tokenizer=tokenizer, train_path=folder / "train.npy", separator=separator)
    return TinyFiles(text, folder / "tokenizer", folder / "train.npy", folder / "train.npy")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the files of the documents."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Return the directory of a short run on them."""
    home = tmp_path_factory.mktemp("runs")
    train(tiny_config(files, home, {"training.max_steps": 4}))
    return home / "run"


def test_validation_documents_that_end_otherwise_are_refused(files, tmp_path):
    """Their losses would be of other texts; the message names both ends, and nothing is left behind."""
    other = make_files(tmp_path / "other")
    tokenizer = Tokenizer.from_directory(other.tokenizer)
    valid = tmp_path / "valid.npy"
    build_dataset(other.text, tokenizer=tokenizer, train_path=valid, separator=BOT)
    with pytest.raises(
        ValueError, match=r"data.valid: expected documents that end with '<\|end\|>'.*found '<\|bot\|>'"
    ):
        train(tiny_config(files, tmp_path / "runs", {**ONE_STEP, "data.valid": str(valid)}))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def end_id(files):
    """Return the id that ends a document."""
    return Tokenizer.from_directory(files.tokenizer).special_token_ids[END]


def change_sidecar(path, **changes):
    """Change keys of a token file's sidecar, or remove those that are `...`, as in files of older versions."""
    record = {**json.loads(path.with_suffix(".json").read_text()), **changes}
    record = {key: value for key, value in record.items() if value is not ... and key != "sidecar_sha256"}
    path.with_suffix(".json").write_text(json.dumps(record))


def test_the_separator_of_the_data_is_in_the_checkpoint(run, files, end_id):
    """Not the first special token, as one might guess."""
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids_of_checkpoint(resolve(run), tokenizer) == DocumentIds(end_id, (end_id,))
    assert tokenizer.special_token_ids[BOT] != end_id


def test_inference_starts_and_stops_there(run, end_id, monkeypatch):
    """An empty prompt is that token, and it ends a sample."""
    seen = {}
    monkeypatch.setattr(inference, "stream", lambda model, ids, **settings: seen.update(settings, ids=ids) or iter([]))
    list(Predictor.from_checkpoint(run, device="cpu").stream(""))
    assert (seen["ids"], tuple(seen["eos_token_id"])) == ([end_id], (end_id,))
    done = call("infer", "--checkpoint", run, "--prompt=what", "--sampling.max_new_tokens=2", "--device=cpu")
    assert done.records[0]["params.eos_token_id"] == end_id
    assert "warning" not in done.stderr


def test_evaluation_cuts_a_text_there(run, files):
    """Without a separator in the configuration the documents are those of make-data."""
    done = call("eval", "--checkpoint", run, "--input", files.text, "--resamples=0", "--device=cpu")
    assert done.records[0]["metrics.documents"] == len(DOCUMENTS), done.stderr


def test_exports_say_it(run, tmp_path, end_id):
    """Both of Hugging Face's files agree, and so does GGUF."""
    gguf = pytest.importorskip("gguf")
    write_hf(resolve(run), tmp_path / "hf", verify=False)
    for name in ("config.json", "generation_config.json"):
        record = json.loads((tmp_path / "hf" / name).read_text())
        assert [record[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [end_id, end_id, None]
    record = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (record["bos_token"], record["eos_token"]) == (END, END)
    write_gguf(resolve(run), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("bos", "eos")]
    assert found == [end_id, end_id]


def test_samples_of_training_stop_there(files, tmp_path, end_id, monkeypatch):
    """Samples use the run's own ids, and special tokens in a prompt are tokens if asked for."""
    seen = []
    monkeypatch.setattr(
        inference,
        "stream",
        lambda model, ids, **settings: seen.append((ids, set(settings["eos_token_id"]))) or iter([]),
    )
    changes = {**ONE_STEP, "samples.interval": 1, "samples.prompts": [BOT], "samples.allow_special": True}
    train(tiny_config(files, tmp_path, changes))
    assert seen
    assert all(each == ([end_id - 1], {end_id}) for each in seen)  # the first when prompts are checked before the run


def test_a_separator_that_is_given_cuts_the_text_only(run, files, tmp_path, end_id):
    """Documents of another text are cut at its own separator, but begin for the model as those of its data did."""
    (tmp_path / "other.txt").write_text("one\n---\ntwo\n---\nthree")
    one = ["eval", "--checkpoint", run, "--resamples=0", "--device=cpu"]
    (other,) = call("eval", *one[1:], "--input", tmp_path / "other.txt", "--separator=---").records
    (tmp_path / "same.txt").write_text(END.join(["one\n", "\ntwo\n", "\nthree"]))
    (same,) = call("eval", *one[1:], "--input", tmp_path / "same.txt").records
    assert other["metrics.documents"] == 3
    assert other["metrics.loss"] == same["metrics.loss"]


def test_checkpoints_that_end_documents_differently_need_a_separator(run, tmp_path):
    """Nobody can know which of the two separators a text has: it is refused, and the error says what to do."""
    other = make_files(tmp_path / "other", separator=BOT)
    train(tiny_config(other, tmp_path, ONE_STEP))
    both = ["--compare", run, tmp_path / "run", "--input", other.text, "--resamples=0", "--device=cpu"]
    done = call("eval", *both)
    assert (done.code, done.stdout) == (2, "")
    assert f"separator: expected one for both checkpoints, found {END!r} and {BOT!r}; set separator" in done.stderr
    assert call("eval", *both, f"--separator={BOT}").code == 0


def test_older_sidecars_are_read(files, tmp_path, end_id):
    """A sidecar without the id has the text; one without either says nothing; one that has no such token says so."""
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    copy = make_files(tmp_path / "copy")
    change_sidecar(copy.train, separator_id=...)
    assert ids_of_data(TokenDataset(copy.train), tokenizer) == DocumentIds(end_id, (end_id,))
    change_sidecar(copy.train, separator_id=None)
    assert ids_of_data(TokenDataset(copy.train), tokenizer) == DocumentIds()
    change_sidecar(copy.train, separator="<|nobody|>", separator_id=...)
    with pytest.raises(ValueError, match=r"expected a special token as the sidecar's separator, found '<\|nobody\|>'"):
        ids_of_data(TokenDataset(copy.train), tokenizer)
    with pytest.raises(ValueError, match=r"train\.npy: expected a special token as the sidecar's separator"):
        train(tiny_config(copy, tmp_path, ONE_STEP))
    assert not (tmp_path / "run" / "checkpoints").exists()
    change_sidecar(copy.train, separator=...)
    assert ids_of_data(TokenDataset(copy.train), tokenizer) is None


def test_an_old_checkpoint_is_guessed_with_a_word_where_that_may_be_wrong(tmp_path):
    """If its data said nothing, the first of several special tokens is used, and a warning names it."""
    copy = make_files(tmp_path / "copy")
    change_sidecar(copy.train, separator=..., separator_id=...)
    train(tiny_config(copy, tmp_path, ONE_STEP))
    with pytest.warns(UserWarning, match=r"nothing says which special token ends a document: taking the first of 2, "):
        found = Predictor.from_checkpoint(tmp_path / "run", device="cpu").document_ids
    assert found == guess_ids(Tokenizer.from_directory(copy.tokenizer))


def test_a_guess_that_is_hardly_wrong_is_made_without_a_word():
    """The guess is `<|endoftext|>` wherever it is, a single special token, or none at all."""
    vocab = {index: bytes([index]) for index in range(256)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for specials, expected in (([BOT, "<|endoftext|>"], 257), ([END], 256)):
            assert guess_ids(Tokenizer(vocab, [], specials)) == DocumentIds.of_separator(expected)
        assert guess_ids(Tokenizer(vocab, [])) == DocumentIds()


@pytest.mark.parametrize(
    "found",
    [
        7,
        [],
        {"bos_token_id": 1},
        {**DocumentIds().to_state(), "bos_token_id": "1"},
        {**DocumentIds().to_state(), "eos_token_ids": [-1]},
        {**DocumentIds().to_state(), "eos_token_ids": 7},
        {**DocumentIds().to_state(), "pad_token_id": 0.5},
        {**DocumentIds().to_state(), "starts_texts": 1},
        {**DocumentIds().to_state(), "bos_token_id": 1000},  # more than the tokenizer has
    ],
)
def test_ids_that_are_none_are_refused(found, files, tmp_path, monkeypatch):
    """A stranger's checkpoint may hold anything there: one line names the key."""
    monkeypatch.setattr("transformerlm.checkpoints.document_ids.read_state", lambda directory: {"document_ids": found})
    with pytest.raises(CheckpointError, match=r"expected ids below \d+ in document_ids of state\.json, found"):
        ids_of_checkpoint(tmp_path, Tokenizer.from_directory(files.tokenizer))
