"""A Llama directory becomes a checkpoint of ours that computes the same, or is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.cli.commands import call
from tests.interop.models import LLAMA3, SPECIALS, make_llama, make_tokenizer
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.document_ids import DocumentIds, recorded_ids
from transformerlm.checkpoints.load import load_model, load_tokenizer
from transformerlm.inference.predictor import Predictor
from transformerlm.interop.gguf import write_gguf
from transformerlm.interop.hf_export import write_hf
from transformerlm.interop.hf_import import read_hf
from transformerlm.interop.tokenizer_json import leading_token, to_json
from transformerlm.tokenizer import Tokenizer

VARIANTS = {
    "untied, grouped": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"kind": "qwen3", "tie_word_embeddings": True},
    "scaled as Llama 3.1": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "max_position_embeddings": 256},
    "scaled Qwen3": {"kind": "qwen3", "rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    "other theta and eps": {"rope_theta": 500_000.0, "rms_norm_eps": 1e-3, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, files):
    """Return a directory with model and tokenizer, which tests copy before they change it."""
    torch.set_num_threads(1)
    return make_llama(tmp_path_factory.mktemp("llama"), tokenizer=make_tokenizer(files.text))


@pytest.fixture
def copy(llama, tmp_path):
    """Return a copy of the directory to change."""
    return shutil.copytree(llama, tmp_path / "llama")


def change_config(directory, **changes):
    """Set keys of a config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(directory, change):
    """Change the tensors of a model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(changes, tmp_path):
    """Within 1e-4 in fp32, for each choice that both sides have; and the command's own check says so."""
    from transformers import AutoModelForCausalLM

    source = make_llama(tmp_path, **changes)
    outcome = read_hf(source, tmp_path / "run", with_tokenizer=False)
    assert outcome.startswith("verified with transformers: logits differ by ")
    length = changes.get("max_position_embeddings", 64)
    ids = torch.randint(512, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(source).float().eval()(ids).logits
        ours = load_model(resolve(tmp_path / "run"))(ids)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_half_precision_are_read(dtype, tmp_path):
    """Several files with an index, in bf16 or fp16, become one file in fp32 with the same numbers."""
    source = make_llama(tmp_path, shard="30KB", dtype=dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    assert "verified" in read_hf(source, tmp_path / "run", with_tokenizer=False)
    weights = load_file(resolve(tmp_path / "run") / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_the_tokenizer_comes_with_the_model(llama, files, tmp_path):
    """The checkpoint has the tokenizer of the tokenizer.json."""
    outcome = read_hf(llama, tmp_path / "run")
    assert "the ids of" in outcome
    assert load_tokenizer(resolve(tmp_path / "run")).fingerprint() == make_tokenizer(files.text).fingerprint()


def test_an_import_can_be_exported_again(llama, tmp_path):
    """Import and export give the weights of the source, number for number."""
    read_hf(llama, tmp_path / "run", verify=False)
    write_hf(resolve(tmp_path / "run"), tmp_path / "out", verify=False)
    first, again = (load_file(directory / "model.safetensors") for directory in (llama, tmp_path / "out"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "| imported from | llama |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, r'config\.json: rope_scaling\.rope_type: .*"yarn"'),
        ({"rope_parameters": {**LLAMA3, "factor": 0.5}}, r"config\.json: rope_scaling\.factor: .*found 0\.5"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 5}}, r"rope_scaling: .*low_freq_factor: expected less than"),
        ({"num_attention_heads": 3, "head_dim": None}, r"config\.json: .*d_model \(32\) is not divisible by num_heads"),
        ({"head_dim": 12}, r"expected [\d,]+ numbers in weights, found "),
        ({"head_dim": "8"}, r"config\.json: d_head: .*found 8"),
        ({"hidden_size": "32"}, r"config\.json: d_model: .*found 32"),
        ({"vocab_size": 10**12}, r"config\.json: vocab_size: "),
        ({"num_hidden_layers": 3}, r"weights do not fit the model of config\.json: model\.layers\.2\."),
        ({"intermediate_size": 2**21}, r"expected [\d,]+ numbers in weights, found "),
        ({"num_key_value_heads": 4}, r"expected [\d,]+ numbers in weights, found "),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, copy, tmp_path):
    """The error names keys of another architecture, wrong types, and sizes that contradict the weights."""
    change_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        read_hf(copy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"do not fit .*: model\.norm\.weight"),
        (lambda tensors: tensors.update({"bias": torch.zeros(1)}), r"do not fit .*: bias"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(4, 8)}), r"expected shape \(32,\), found"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), r"ln_final\.weight: expected finite"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            r"model\.norm\.weight: expected dtype F32, F16 or BF16, found I8",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, copy, tmp_path):
    """The error names a tensor that is missing, unknown, not finite, or of another shape or dtype."""
    change_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        read_hf(copy, tmp_path / "run")


def test_what_follows_from_other_weights_is_passed_over(copy, tmp_path):
    """The angles that old files keep, and a head that is the embedding once more, are not needed."""
    change_config(copy, tie_word_embeddings=True)
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(copy, lambda tensors: tensors.update(angles))
    change_weights(
        copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    read_hf(copy, tmp_path / "run")
    assert load_model(resolve(tmp_path / "run")).hparams()["tie_embeddings"]


@pytest.mark.parametrize("rows", [520, 519])
def test_a_head_of_its_own_beside_a_tied_one_is_refused(rows, copy, tmp_path):
    """Transformers does not tie such a model, so one of the two is wrong; nobody can know which."""
    change_config(copy, tie_word_embeddings=True)
    change_weights(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:rows].clone()}))
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected the numbers of the embedding.*tie_word"):
        read_hf(copy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pickles_are_not_read(copy, tmp_path):
    """A directory with a .bin in place of safetensors is refused, with the reason."""
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found neither \(a \.bin or \.pt holds a pickle"):
        read_hf(copy, tmp_path / "run")


@pytest.mark.parametrize("name", ["../llama/model.safetensors", "/etc/passwd", "a\\b.safetensors", 7, None])
def test_an_index_cannot_lead_out(name, copy, tmp_path):
    """A weight_map that names anything but a .safetensors file beside it is refused."""
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: expected weight_map to name \.safetensors files"):
        read_hf(copy, tmp_path / "run")


def test_a_weight_in_two_shards_is_refused(copy, tmp_path):
    """Nobody can know which of the two is meant."""
    shutil.copy(copy / "model.safetensors", copy / "b.safetensors")
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected each weight in one file"):
        read_hf(copy, tmp_path / "run")


def test_a_link_out_of_the_directory_is_refused(copy, tmp_path):
    """No file of the directory may be elsewhere."""
    (copy / "model.safetensors").rename(tmp_path / "elsewhere")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="found a link out of it"):
        read_hf(copy, tmp_path / "run")


def test_a_tokenizer_of_another_kind_can_be_left_out(copy, tmp_path):
    """The error names what was found and the key that skips it; with that key only the model is imported."""
    record = json.loads((copy / "tokenizer.json").read_text())
    record["normalizer"] = {"type": "NFKC"}
    (copy / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"normalizer: expected null or NFC, found .*NFKC.*set tokenizer = false"):
        read_hf(copy, tmp_path / "run")
    read_hf(copy, tmp_path / "run", with_tokenizer=False, verify=False)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(resolve(tmp_path / "run"))


def test_a_tokenizer_larger_than_the_model_is_refused(copy, tmp_path):
    """An id that the model has no embedding for cannot be used."""
    tokenizer = Tokenizer({index: bytes([index]) for index in range(256)}, [], [f"<{n}>" for n in range(500)])
    from transformerlm.interop.tokenizer_json import to_json

    (copy / "tokenizer.json").write_text(to_json(tokenizer))
    with pytest.raises(ValueError, match="expected at most 520 tokens, found 756"):
        read_hf(copy, tmp_path / "run")


def test_no_directory_is_no_model(tmp_path):
    """A source that is missing, or a file, is refused in one line."""
    with pytest.raises(FileNotFoundError, match="expected the directory of a model"):
        read_hf(tmp_path / "nowhere", tmp_path / "run")


def test_a_training_run_is_never_overwritten(llama, tmp_path):
    """An imported model is replaced if asked; one that was trained since, or any other run, is not."""
    run = tmp_path / "run"
    read_hf(llama, run, verify=False)
    read_hf(llama, run, verify=False, overwrite=True)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"expected nothing to overwrite but such an output, found metrics\.jsonl"):
        read_hf(llama, run, verify=False, overwrite=True)
    assert (run / "checkpoints/step-00000000").is_dir()


def test_a_file_in_place_of_a_model_is_told_apart_from_nothing(llama, tmp_path):
    """The message says that a file is there, and which key a tokenizer's file needs."""
    with pytest.raises(FileNotFoundError, match=r"found a file \(for a tokenizer's file set format\)"):
        read_hf(llama / "tokenizer.json", tmp_path / "run")


def test_where_documents_end_comes_with_the_model(files, tmp_path):
    """The source's beginning, several ends and padding are in the checkpoint, and in exports of it."""
    tokenizer = make_tokenizer(files.text)
    ids = {"bos_token_id": 510, "eos_token_id": [511, 509], "pad_token_id": 509}
    source = make_llama(tmp_path, tokenizer=tokenizer)
    change_config(source, bos_token_id=510, eos_token_id=509, pad_token_id=509)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [511, 509]}))
    read_hf(source, tmp_path / "run", verify=False)
    checkpoint = resolve(tmp_path / "run")
    found = Predictor.from_checkpoint(checkpoint, device="cpu").document_ids
    assert found == DocumentIds(510, (511, 509), 509)
    write_hf(checkpoint, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        record = json.loads((tmp_path / "out" / name).read_text())
        assert {key: record[key] for key in ids} == ids
    write_gguf(checkpoint, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    written = [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("bos", "eos", "eot", "padding")]
    assert written == [510, 511, 509, 509]


def test_a_token_before_each_text_comes_with_the_model(files, tmp_path):
    """As in Llama 3, inference and both exports put the token there, and transformers gives the same ids."""
    tokenizer = make_tokenizer(files.text)
    source = make_llama(tmp_path, tokenizer=tokenizer)
    (source / "tokenizer.json").write_text(to_json(tokenizer, leading=SPECIALS[1]))
    change_config(source, bos_token_id=510, eos_token_id=509)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read_hf(source, tmp_path / "run", verify=False)
    predictor = Predictor.from_checkpoint(tmp_path / "run", device="cpu")
    assert predictor.document_ids == DocumentIds(510, (509,), starts_texts=True)
    prompt = predictor._encode("Ada", allow_special=False)
    assert prompt == [510, *tokenizer.encode("Ada")]
    assert predictor._encode(f"{SPECIALS[1]}Ada", allow_special=True) == prompt
    assert predictor._encode("", allow_special=False) == [510]
    write_hf(resolve(tmp_path / "run"), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs("Ada")["input_ids"] == prompt
    alone = ["--format=tokenizer_json", "--checkpoint", tmp_path / "run", "--output", tmp_path / "alone.json"]
    assert call("export", *alone).code == 0
    assert leading_token(tmp_path / "alone.json") == SPECIALS[1]
    write_gguf(resolve(tmp_path / "run"), tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_an_end_that_is_no_special_token_is_left_out_with_a_word(files, tmp_path):
    """Files that never set the ids have those of another model's tokenizer."""
    source = make_llama(tmp_path, tokenizer=make_tokenizer(files.text))
    change_config(source, eos_token_id=2)
    with pytest.warns(UserWarning, match=r"eos_token_id: expected special tokens of the tokenizer, found 2: left out"):
        read_hf(source, tmp_path / "run", verify=False)
    checkpoint = resolve(tmp_path / "run")
    assert recorded_ids(checkpoint, load_tokenizer(checkpoint)) is None
