"""A GGUF file holds the checkpoint's weights and tokenizer, or does not exist; llama.cpp computes what we do."""

from __future__ import annotations

import ctypes
import errno
import sys
import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from torch.testing import assert_close

from cli.train import train
from tests.interop.models import SCALING, make_checkpoint, make_tokenizer
from tests.tokenizer.from_ranks import from_ranks
from tests.training.tiny_run import tiny_config
from transformerlm.checkpoints.document_ids import KEY, DocumentIds
from transformerlm.checkpoints.load import load_model
from transformerlm.inference.predictor import Predictor
from transformerlm.interop import gguf as interop
from transformerlm.interop.gguf import write_gguf
from transformerlm.interop.hf_export import write_hf
from transformerlm.interop.verify import hard_texts
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.io import text_to_token

PARTS = {
    "attn_norm": "ln1", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
    "attn_output": "attn.output_proj", "ffn_norm": "ln2",
    "ffn_gate": "ffn.w1", "ffn_down": "ffn.w2", "ffn_up": "ffn.w3",
}  # fmt: skip
NAMES = {"token_embd.weight": "token_embeddings.weight", "output_norm.weight": "ln_final.weight"} | {
    f"blk.{layer}.{theirs}.weight": f"layers.{layer}.{ours}.weight"
    for layer in (0, 1)
    for theirs, ours in PARTS.items()
}


def read_tensors(path):
    """Return the type's name and the numbers of each tensor, as the `gguf` package reads them."""
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: (one.tensor_type.name, dequantize(one.data, one.tensor_type)) for one in tensors}


def read_metadata(path):
    """Return the values of a file's keys."""
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_the_checkpoint_s(dtype, tied, files, tmp_path):
    """Each weight has llama.cpp's name and its own rows, exact in fp32 and for vectors, otherwise rounded."""
    checkpoint = make_checkpoint(tmp_path, files, tie_embeddings=tied, num_kv_heads=2)
    outcome = write_gguf(checkpoint, tmp_path / "new" / "m.gguf", dtype=dtype)
    assert outcome == f"verified with gguf: {20 + (not tied)} tensors read back equal"
    names = NAMES if tied else {**NAMES, "output.weight": "lm_head.weight"}
    found, weights = read_tensors(tmp_path / "new" / "m.gguf"), load_file(checkpoint / "model.safetensors")
    assert found.keys() == names.keys()
    for theirs, ours in names.items():
        weight = weights[ours][:290] if "emb" in ours or "head" in ours else weights[ours]  # the tokenizer has 290 ids
        kind, numbers = found[theirs]
        if weight.ndim == 1 or dtype == "fp32":
            assert kind == "F32"
            assert_close(torch.tensor(numbers), weight, rtol=0, atol=0)
        elif dtype == "q8_0" and weight.shape[1] % 32 == 0:
            assert kind == "Q8_0"
            largest = weight.reshape(len(weight), -1, 32).abs().amax(-1, keepdim=True)
            bound = (largest * (0.5 / 127 + 2**-11)).expand(-1, -1, 32).reshape(weight.shape)
            assert bool(((torch.tensor(numbers) - weight).abs() <= bound * 1.001).all())
        else:
            assert kind == {"q8_0": "F16", "fp16": "F16", "bf16": "BF16"}[dtype]
            rounded = weight.bfloat16() if dtype == "bf16" else weight.half()
            assert_close(torch.tensor(numbers), rounded.float(), rtol=0, atol=0)


def test_the_metadata_is_the_model_s(files, tmp_path):
    """llama.cpp's keys hold sizes, rotary base, norm and the type of the weights, and there are no other keys."""
    write_gguf(
        make_checkpoint(tmp_path, files, num_kv_heads=1, rope_theta=5e5, norm_eps=1e-3),
        tmp_path / "m.gguf",
        dtype="q8_0",
    )
    found = {key: value for key, value in read_metadata(tmp_path / "m.gguf").items() if "tokenizer" not in key}
    assert found == {
        "general.architecture": "llama",
        "general.name": "m",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 290,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 5e5,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-3)),
    }


@pytest.mark.parametrize("model", [{"d_head": 12}, {"tie_embeddings": True, "num_kv_heads": 2}, {}])
def test_a_qwen3_computes_the_same_logits(model, files, tmp_path):
    """With the names that llama.cpp's converter gives to Hugging Face's, the tensors are a Qwen3 with our logits."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tmp_path, files, vocab_size=290, qk_norm=True, **model)
    write_gguf(checkpoint, tmp_path / "m.gguf")
    write_hf(checkpoint, tmp_path / "hf", verify=False)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf", local_files_only=True)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    tensors = {name: torch.tensor(numbers) for name, (_, numbers) in read_tensors(tmp_path / "m.gguf").items()}
    weights = {name: names.get_name(name, (".weight",)) for name, _ in theirs.named_parameters()}
    theirs.load_state_dict({name: tensors.pop(place) for name, place in weights.items()}, strict=False)
    assert not tensors
    ids = torch.randint(290, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(theirs(ids).logits, load_model(checkpoint)(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_of_their_own_size_are_written(qk_norm, files, tmp_path):
    """Else llama.cpp would take them to be as wide as the model divided by their number."""
    write_gguf(make_checkpoint(tmp_path, files, d_head=12, qk_norm=qk_norm), tmp_path / "m.gguf")
    found, name = read_metadata(tmp_path / "m.gguf"), "qwen3" if qk_norm else "llama"
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert [found[f"{name}.{key}"] for key in keys] == [12, 12, 12]


def test_a_scaled_rotary_embedding_comes_as_factors(files, tmp_path):
    """Divided by them, the frequencies are those with which transformers computes the same model."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import AutoConfig

    checkpoint = make_checkpoint(tmp_path, files, rope_scaling=SCALING, rope_theta=500.0)
    write_gguf(checkpoint, tmp_path / "m.gguf", dtype="q8_0")
    write_hf(checkpoint, tmp_path / "hf", verify=False)
    theirs = modeling.LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path / "hf")).inv_freq
    kind, factors = read_tensors(tmp_path / "m.gguf")["rope_freqs.weight"]
    assert kind == "F32"
    assert_close(500.0 ** -(torch.arange(4) / 4) / torch.tensor(factors), theirs, rtol=1e-5, atol=0)
    assert not any("scaling" in key for key in read_metadata(tmp_path / "m.gguf"))


def test_a_scaled_qwen3_is_refused(files, tmp_path):
    """Under that architecture llama.cpp reads no factors."""
    checkpoint = make_checkpoint(tmp_path, files, rope_scaling=SCALING, qk_norm=True)
    with pytest.raises(ValueError, match=r"model\.rope_scaling: expected none, found .*qk_norm"):
        write_gguf(checkpoint, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_the_sizes_of_a_qwen3_stand_under_its_name(files, tmp_path):
    """Its heads may have another size than width / number of heads, so the file gives it."""
    write_gguf(make_checkpoint(tmp_path, files, qk_norm=True), tmp_path / "m.gguf")
    found = read_metadata(tmp_path / "m.gguf")
    sizes = [found[f"qwen3.{key}"] for key in ("attention.key_length", "attention.value_length", "embedding_length")]
    assert (found["general.architecture"], sizes) == ("qwen3", [8, 8, 32])


def test_the_tokenizer_is_the_checkpoint_s(files, tmp_path):
    """Tokens, merges and special tokens read back as they were, and texts end where ours do."""
    tokenizer = make_tokenizer(files.text)
    write_gguf(make_checkpoint(tmp_path, files, tokenizer=tokenizer), tmp_path / "m.gguf")
    found = read_metadata(tmp_path / "m.gguf")
    specials = set(tokenizer.special_token_ids.values())
    for index, text in enumerate(found["tokenizer.ggml.tokens"]):
        assert tokenizer.vocab[index] == (text.encode() if index in specials else text_to_token(text))
        assert found["tokenizer.ggml.token_type"][index] == (3 if index in specials else 1)
    merges = [tuple(map(text_to_token, merge.split(" "))) for merge in found["tokenizer.ggml.merges"]]
    assert merges == tokenizer.merges
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    end = tokenizer.special_token_ids["<|endoftext|>"]
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == end
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_further_ends_of_a_text_have_places_of_their_own_or_are_named(files, tmp_path):
    """An imported model may end texts at several tokens; llama.cpp has room for three, the warning names the rest."""
    tokenizer = make_tokenizer(files.text)
    first, second, third = tokenizer.special_token_ids.values()
    for ends in ((second, third, first), (second, third, first, 5)):
        state = {KEY: DocumentIds(first, ends).to_state()}
        home = tmp_path / str(len(ends))
        checkpoint = make_checkpoint(home, files, tokenizer=tokenizer, state=state)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            write_gguf(checkpoint, home / "m.gguf")
        found = read_metadata(home / "m.gguf")
        assert [found[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [second, third, first]
        said = [str(one.message) for one in told if "that end a text" in str(one.message)]
        left = found["tokenizer.ggml.tokens"][5]
        assert said == [f"GGUF has room for 3 tokens that end a text: {left!r} left out"] * (len(ends) - 3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("norm_position", "post"), ("position", "none"), ("ffn", "silu"), ("logit_soft_cap", 30.0)],
)
def test_a_model_that_is_no_llama_is_refused(setting, value, files, tmp_path):
    """The error names the setting, and there is no file."""
    with pytest.raises(ValueError, match=f"model.{setting}: expected"):
        write_gguf(make_checkpoint(tmp_path, files, **{setting: value}), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize(("pattern", "name"), [("smollm", "smollm"), ("llama3", "llama-bpe"), ("qwen2", "qwen2")])
def test_a_pattern_has_llama_cpp_s_name(pattern, name, files, tmp_path):
    """llama.cpp cuts as SmolLM, Llama 3 and Qwen2 do, under these names."""
    tokenizer = make_tokenizer(files.text, pattern=pattern)
    write_gguf(make_checkpoint(tmp_path, files, tokenizer=tokenizer), tmp_path / "m.gguf")
    found = read_metadata(tmp_path / "m.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(files, tmp_path):
    """The error names another pattern, a missing end token, missing merges, or a special token that merges form."""
    vocab = {**{value: bytes([value]) for value in range(256)}, 256: "Ж".encode()}
    merges = [(b"\xd0", b"\x96")]
    cases = {
        "expected the pattern gpt2, llama3, qwen2, smollm, found 'cl100k'": Tokenizer(
            vocab, merges, ["<s>"], pattern="cl100k"
        ),
        "expected ignore_merges with the pattern llama3 alone": Tokenizer(vocab, merges, ["<s>"], ignore_merges=True),
        "that llama.cpp does not find in plain text, found '##'": Tokenizer(vocab, merges, ["##"], pattern="llama3"),
        "expected merges that make each token of its bytes, found others for 'abc'": Tokenizer(
            dict(enumerate([*(bytes([value]) for value in range(256)), b"bc", b"ab", b"abc"])),
            [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")],
            ["<s>"],
            pattern="llama3",
        ),
        "found 0 special tokens": Tokenizer(vocab, merges, []),
        "and 0 merges": Tokenizer({index: vocab[index] for index in range(256)}, [], ["<s>"]),
        "or merges make it": Tokenizer(vocab, merges, ["Ж"]),
    }
    for number, (message, tokenizer) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            write_gguf(make_checkpoint(tmp_path / str(number), files, tokenizer=tokenizer), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_weight_that_the_type_cannot_hold_is_refused(files, tmp_path, monkeypatch):
    """Infinity is not written in its place; the error names the weight and the type."""
    checkpoint = make_checkpoint(tmp_path, files)
    model = load_model(checkpoint)
    with torch.no_grad():
        model.layers[1].ffn.w3.weight[0, 0] = 70_000.0
    monkeypatch.setattr(interop, "load_model", lambda directory: model)
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight: expected numbers that F16 can hold, found 70000"):
        write_gguf(checkpoint, tmp_path / "m.gguf", dtype="fp16")
    write_gguf(checkpoint, tmp_path / "m.gguf", dtype="bf16")


def test_a_file_that_is_there_stays_unless_asked(files, tmp_path):
    """Without overwrite it is not changed; with overwrite it is replaced."""
    checkpoint = make_checkpoint(tmp_path, files)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        write_gguf(checkpoint, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    write_gguf(checkpoint, tmp_path / "m.gguf", overwrite=True)
    assert len(read_tensors(tmp_path / "m.gguf")) == 21


def test_a_disk_that_fills_up_leaves_nothing(files, tmp_path, monkeypatch):
    """The error says so in one line, and no part of a file is left."""

    def fail(writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match=r"m.gguf: cannot be written: No space left on device"):
        write_gguf(make_checkpoint(tmp_path, files), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_file_that_reads_back_differently_is_not_kept(files, tmp_path, monkeypatch):
    """A changed byte is found before the file gets its name."""

    write = interop._write

    def write_damaged(writer, path):
        write(writer, path)
        with path.open("r+b") as file:
            file.seek(-40, 2)
            file.write(b"\x55")

    monkeypatch.setattr(interop, "_write", write_damaged)
    with pytest.raises(OSError, match="does not read back as it was written"):
        write_gguf(make_checkpoint(tmp_path, files), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    """One line names the extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'gguf is not installed: in the clone, pip install -e ".\[gguf\]"'):
        write_gguf(tmp_path, tmp_path / "m.gguf")


# --- llama.cpp, where it is installed ------------------------------------------------------------------------------


def open_llama(path, **settings):
    """Open a file with llama.cpp; its cache of keys and values is fp32, as ours."""
    llama_cpp = pytest.importorskip("llama_cpp")
    fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **fp32, **settings)


def piece_of(llama, index):
    """Return a token's bytes; llama-cpp-python's own detokenize cuts those of more than 32."""
    from llama_cpp import llama_token_to_piece

    buffer = (ctypes.c_char * 1024)()
    return bytes(buffer[: llama_token_to_piece(llama._model.vocab, index, buffer, len(buffer), 0, True)])


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "qwen2", "smollm", "ignore_merges"])
def test_llama_cpp_gives_the_same_ids(pattern, files, tmp_path):
    """Hard texts, special tokens read or spelled out, encode to our ids and decode to the text."""
    tokenizer = from_ranks(0) if pattern == "ignore_merges" else make_tokenizer(files.text, pattern=pattern)
    write_gguf(make_checkpoint(tmp_path, files, tokenizer=tokenizer), tmp_path / "m.gguf")
    llama = open_llama(tmp_path / "m.gguf")
    for text in hard_texts(tokenizer):
        if "\u017f" in text and pattern not in ("gpt2", "smollm"):
            continue  # which llama.cpp does not take for an s
        ids = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == tokenizer.encode(text), text
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode_ordinary(text), text
        assert b"".join(piece_of(llama, index) for index in ids) == text.encode()


@pytest.mark.parametrize(
    ("dtype", "tied"), [("fp32", True), ("fp32", False), ("fp16", True), ("bf16", False), ("q8_0", True)]
)
@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "scaled"])
def test_llama_cpp_computes_the_same_logits(dtype, tied, scaling, files, tmp_path):
    """Grouped queries, another rotary base, its scaling, a tied head or not: logits are as close as the type allows."""
    model = {"tie_embeddings": tied, "num_kv_heads": 2, "rope_theta": 5e5, "rope_scaling": scaling}
    checkpoint = make_checkpoint(tmp_path, files, **model)
    write_gguf(checkpoint, tmp_path / "m.gguf", dtype=dtype)
    llama, ids = open_llama(tmp_path / "m.gguf"), list(range(100, 164))
    llama.eval(ids)
    with torch.no_grad():
        ours = load_model(checkpoint)(torch.tensor([ids]))[0, :, :290]
    error = (torch.tensor(llama.scores[: len(ids)]) - ours).abs().max() / ours.abs().max()
    assert error < {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2, "q8_0": 1e-1}[dtype]  # q8_0 rounds activations too


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """Return the checkpoint of a short training, where llama.cpp is installed."""
    pytest.importorskip("llama_cpp")
    home = tmp_path_factory.mktemp("trained")
    train(tiny_config(files, home, {"model.context_length": 64, "model.num_kv_heads": 1, "training.max_steps": 40}))
    return home / "run" / "checkpoints" / "step-00000040"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_llama_cpp_says_the_same(dtype, trained, tmp_path):
    """The greedy text after a prompt is the same."""
    write_gguf(trained, tmp_path / "m.gguf", dtype=dtype)
    prompt = "Ada sees the sea.\nÉmile"
    answer = open_llama(tmp_path / "m.gguf").create_completion(prompt, max_tokens=30, temperature=0, repeat_penalty=1.0)
    ours = Predictor.from_checkpoint(trained, device="cpu").generate(prompt, max_new_tokens=30, temperature=0)
    assert prompt + answer["choices"][0]["text"] == ours
    assert len(ours) > len(prompt) + 20


def test_a_modelfile_tells_ollama_the_context_and_the_sampling(files, tmp_path):
    """It is beside the file, names it, and is replaced with it only if asked."""
    checkpoint = make_checkpoint(tmp_path, files)
    write_gguf(checkpoint, tmp_path / "m.gguf")
    assert (tmp_path / "m.Modelfile").read_text() == (
        "FROM ./m.gguf\nPARAMETER num_ctx 64\nPARAMETER temperature 0.8\nPARAMETER top_p 0.95\nPARAMETER min_p 0.0\n"
        "PARAMETER top_k 0\nPARAMETER repeat_penalty 1.0\n"
    )
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(FileExistsError, match=r"m\.Modelfile: is there already"):
        write_gguf(checkpoint, tmp_path / "m.gguf")
    write_gguf(checkpoint, tmp_path / "m.gguf", overwrite=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" END\n", '" END\n"'),
        ("{{ x }}", '"{{ x }}"'),
        ('"', '"""""""'),
        ('a "b"\nc', '"""a "b"\nc"""'),
        ('"""', None),
        ("\x03", None),
        ("\u3000", None),
    ],
)
def test_a_modelfile_quotes_what_its_reader_takes_back(text, value):
    """It knows no escapes: quotes come in three, and what its reader would cut or drop is not written."""
    assert interop._modelfile_value(text) == value
