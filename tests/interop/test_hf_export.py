"""An exported directory opens in `transformers` as it is, with the same ids and logits, or is not there."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from config.extras import how_to_install
from config.schemas import SamplingConfig
from tests.interop.models import SCALING, make_checkpoint, make_tokenizer
from tests.small_disk import files_of_at_most
from transformerlm.checkpoints.load import load_model
from transformerlm.checkpoints.validation import CheckpointError
from transformerlm.interop.hf_export import to_sampling, write_hf
from transformerlm.tokenizer.pretokenize import PATTERNS

VARIANTS = {
    "plain": {},
    "tied, grouped": {"tie_embeddings": True, "num_kv_heads": 2},
    "norms of queries and keys": {"qk_norm": True, "num_kv_heads": 2},
    "heads of their own size": {"num_kv_heads": 2, "d_head": 12},
    "both": {"qk_norm": True, "num_kv_heads": 2, "d_head": 12},
    "scaled as Llama 3.1": {"rope_scaling": SCALING, "rope_theta": 500.0},
    "one kv head, other theta and eps": {"num_kv_heads": 1, "rope_theta": 500_000.0, "norm_eps": 1e-3},
}


def open_llama(directory):
    """Open a directory as its users do."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).float().eval()


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS)
def test_transformers_computes_the_same_logits(model, files, tmp_path):
    """Within 1e-4 in fp32, on the text's ids up to the whole context; and the command's own check says so."""
    checkpoint = make_checkpoint(tmp_path, files, **model)
    outcome = write_hf(checkpoint, tmp_path / "out")
    assert outcome.startswith("verified with transformers: the ids of ")
    ids = torch.randint(290, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = open_llama(tmp_path / "out")(ids).logits, load_model(checkpoint)(ids)
    assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_transformers_gives_the_same_ids(pattern, files, tmp_path):
    """AutoTokenizer encodes and decodes like ours, even special tokens of which one begins another."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(files.text, pattern=pattern)
    write_hf(make_checkpoint(tmp_path, files, tokenizer=tokenizer), tmp_path / "out", verify=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    text = "Ada sees\r\n a tree.<|user|>\nBob<|user|> 12345 我<|endoftext|>  Zoë's 🍎 "
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token, theirs.model_max_length) == ("<|endoftext|>", 64)


def test_large_models_are_split_into_shards(files, tmp_path):
    """Above max_shard_mb there are several files and an index that transformers follows."""
    checkpoint = make_checkpoint(tmp_path, files, d_model=256, num_heads=8, d_ff=512)
    outcome = write_hf(checkpoint, tmp_path / "out", max_shard_mb=2)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert all((tmp_path / "out" / shard).stat().st_size < 2.1e6 for shard in shards)
    assert "verified" in outcome


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounded_weights_are_what_is_verified(dtype, kind, files, tmp_path):
    """The file and the config.json have the dtype, and logits are those of the rounded weights."""
    checkpoint = make_checkpoint(tmp_path, files)
    assert "verified with" in write_hf(checkpoint, tmp_path / "out", dtype=dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {kind}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(kind).partition(".")[2]


def test_a_weight_beyond_fp16_is_refused(files, tmp_path, monkeypatch):
    """It would be written as infinity."""
    model = load_model(checkpoint := make_checkpoint(tmp_path, files))
    with torch.no_grad():
        model.layers[0].attn.q_proj.weight[0, 0] = 70_000.0
    monkeypatch.setattr("transformerlm.interop.hf_export.load_model", lambda _: model)
    with pytest.raises(
        ValueError, match=r"dtype: expected fp32 or bf16 for layers\.0\.attn\.q_proj\.weight, found fp16"
    ):
        write_hf(checkpoint, tmp_path / "out", dtype="fp16", verify=False)
    assert not (tmp_path / "out").exists()


def test_the_card_gives_the_facts_of_the_training(files, tmp_path):
    """The README names sizes, steps, loss and data, and no place on the machine where it was trained."""
    write_hf(make_checkpoint(tmp_path, files), tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("library_name: transformers", "| steps | 7 of 12 |", "| tokens seen | 1,280 |", "1.5000 nats"):
        assert fact in card
    assert "| dataset | train.npy |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("sampling", "keys"),
    [
        ({}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}),
        (
            {"top_k": 7, "min_p": 0.1, "temperature": 1.5, "top_p": 1.0},
            {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 7, "min_p": 0.1},
        ),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"top_p": 0.0}, {"do_sample": False}),
    ],
)
def test_transformers_samples_as_the_run_does(sampling, keys):
    """The run's own settings become those of `generate`; if they take the most likely token, nothing is sampled."""
    from transformers import GenerationConfig

    found = to_sampling(SamplingConfig(**sampling))
    assert found == keys
    GenerationConfig(**found).validate(strict=True)


def test_the_settings_of_a_run_are_written(files, tmp_path):
    """`generation_config.json` has the end token and the sampling of `[samples]`."""
    write_hf(make_checkpoint(tmp_path, files), tmp_path / "out", verify=False)
    record = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (record["do_sample"], record["temperature"], record["top_p"]) == (True, 0.8, 0.95)
    assert record["eos_token_id"] is not None


def test_another_architecture_is_refused_and_leaves_nothing(files, tmp_path):
    """The setting is named, and no directory is begun."""
    checkpoint = make_checkpoint(tmp_path, files, norm_position="post", ffn="silu")
    with pytest.raises(ValueError, match=r"model.norm_position: .*; model.ffn: expected \"swiglu\", found \"silu\""):
        write_hf(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_damaged_checkpoint_is_refused(files, tmp_path):
    """Weights that do not have their sha256 are not exported."""
    checkpoint = make_checkpoint(tmp_path, files)
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        write_hf(checkpoint, tmp_path / "out")


def test_what_transformers_computes_differently_is_not_left(files, tmp_path, monkeypatch):
    """If the check finds other logits, the command fails and there is no directory."""
    monkeypatch.setattr("transformerlm.interop.llama.halves_from_pairs", lambda name, weight, d_head: weight)
    with pytest.raises(ValueError, match="verify: logits differ by up to"):
        write_hf(make_checkpoint(tmp_path, files), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_output_is_replaced_only_when_asked(files, tmp_path):
    """An existing export is refused; with overwrite it is replaced as a whole; another directory never is."""
    checkpoint, out = make_checkpoint(tmp_path, files), tmp_path / "out"
    write_hf(checkpoint, out, verify=False)
    with pytest.raises(FileExistsError, match="is there already"):
        write_hf(checkpoint, out, verify=False)
    (out / "model-00001-of-00002.safetensors").write_text("")
    write_hf(checkpoint, out, verify=False, overwrite=True)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    (out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"expected nothing to overwrite but such an output, found thesis\.tex in it"):
        write_hf(checkpoint, out, verify=False, overwrite=True)
    assert (out / "thesis.tex").exists()
    with pytest.raises(ValueError, match=r"expected a directory with config\.json to overwrite, found none"):
        write_hf(checkpoint, tmp_path / "run", verify=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_without_transformers_it_says_what_was_not_checked(files, tmp_path, monkeypatch):
    """The directory is still written, and the line names the install command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = write_hf(make_checkpoint(tmp_path, files), tmp_path / "out")
    assert outcome == f"not verified, as transformers is not installed: {how_to_install('interop')}"
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on file sizes")
def test_a_full_disk_is_one_error_that_names_the_file(files, tmp_path):
    """If the system refuses to write the weights, an OSError has their path, and nothing is left of the output."""
    checkpoint = make_checkpoint(tmp_path, files)
    with files_of_at_most(50_000), pytest.raises(OSError, match=r"model\.safetensors: cannot be written: "):
        write_hf(checkpoint, tmp_path / "out", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
