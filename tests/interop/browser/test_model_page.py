"""A model's page in a real browser, opened as a file: its texts are infer's, and it asks nobody for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.models import SCALING, make_checkpoint, make_tokenizer
from tests.training.tiny_run import END
from transformerlm.checkpoints.document_ids import KEY, DocumentIds
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.texts import Pieces, pieces_of
from transformerlm.interop import page as files_of_page
from transformerlm.interop.html import write_html
from transformerlm.interop.html_parts import tokenizer_parts
from transformerlm.interop.verify import hard_texts
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.pretokenize import PATTERNS
from transformerlm.utils.bundle import bundled

pytestmark = pytest.mark.browser
PROMPTS = ["", "A", "Ada", " the", "Bob", "sees", "\n", "two", "Zo", "É"]
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": None, "min_p": 0.0}
SAMPLED = [
    {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": None, "min_p": 0.0},
    {"temperature": 1.5, "top_p": 1.0, "top_k": 20, "min_p": 0.05},
]
VARIANTS = [
    {"qk_norm": True},
    {"num_kv_heads": 2, "d_head": 12, "qk_norm": True},
    {"num_kv_heads": 2, "rope_scaling": SCALING, "rope_theta": 500.0, "tie_embeddings": True},
    {"norm_position": "post", "ffn": "silu", "logit_soft_cap": 3.0},
    {"norm_position": "none", "position": "none", "d_ff": 50, "dropout": {"residual": 0.1}},
    {"d_ff": 600},  # more than share a scale, and no whole blocks
]
# A worker of the test's own: what the page's worker is told and says.
ASK = """async ({ blocks, requests }) => {
  const { header } = JSON.parse(document.querySelector("#data").textContent);
  const engine = document.querySelector("#engine").textContent;
  const worker = new Worker(URL.createObjectURL(new Blob([engine], { type: "text/javascript" })));
  const answer = () => new Promise((resolve, reject) => {
    let text = "";
    worker.onmessage = ({ data }) => {
      if (data.is === "text" || data.is === "end") text += data.text;
      if (data.is === "end" || data.is === "loaded") resolve(text);
      if (data.is === "error") reject(new Error(data.message));
    };
  });
  const loaded = answer();
  worker.postMessage({ do: "load", header });
  for (const text of blocks) worker.postMessage({ do: "chunk", text });
  worker.postMessage({ do: "build" });
  await loaded;
  const texts = [];
  for (const request of requests) {
    const text = answer();
    worker.postMessage({ do: "write", ...request });
    texts.push(await text);
  }
  worker.terminate();
  return texts;
}"""
PROBE = """
import { Tokenizer } from "/static/tokens.js";
globalThis.probe = (parts, texts, streams) => {
  const tokenizer = new Tokenizer(parts);
  const read = (ids) => {
    const one = tokenizer.reader();
    return [...ids, undefined].map((id) => one(id)).join("");
  };
  return [texts.map((text) => tokenizer.encode(text)), streams.map(read)];
};
"""


def ask(page, path: Path, requests):
    """Return the texts that the engine of a page writes."""
    blocks = re.findall(r'class="weights">([^<]*)<', path.read_text(encoding="utf-8"))
    return page.evaluate(ASK, {"blocks": blocks, "requests": requests})


def expected(predictor: Predictor, requests):
    """Return the texts that infer writes for the same requests, with special tokens left out."""
    texts = [
        "".join(
            predictor.stream(one["prompt"], max_new_tokens=one["max_new_tokens"], seed=one["seed"], **one["sampling"])
        )
        for one in requests
    ]
    return [re.sub(r"<\|endoftext\|>", "", text) for text in texts]


def requests_of(settings, *, tokens: int):
    """Return a request for each prompt, with a seed of its own."""
    return [
        {"prompt": prompt, "max_new_tokens": tokens, "seed": seed, "sampling": settings}
        for seed, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_texts_are_those_of_infer(variant, files, tmp_path, new_page):
    """Ten prompts, most likely tokens and drawn ones, by each kind of model: the text is infer's at int8."""
    checkpoint = make_checkpoint(tmp_path, files, **variant)
    write_html(checkpoint, tmp_path / "a.html")
    page = new_page((tmp_path / "a.html").as_uri())
    requests = requests_of(GREEDY, tokens=20) + [
        one for settings in SAMPLED for one in requests_of(settings, tokens=8)[:4]
    ]
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", precision="int8")
    assert ask(page, tmp_path / "a.html", requests) == expected(predictor, requests)


@pytest.mark.parametrize("starts_texts", [False, True])
def test_a_text_goes_on_past_the_context_as_infer_s_does(starts_texts, files, tmp_path, new_page):
    """A full window is read again from its middle, and a long prompt keeps its end; a start token is before both."""
    start = Tokenizer.from_directory(files.tokenizer).special_token_ids[END]
    state = {KEY: DocumentIds(start, (start,), starts_texts=starts_texts).to_state()}
    checkpoint = make_checkpoint(tmp_path, files, context_length=8, state=state)
    write_html(checkpoint, tmp_path / "a.html")
    page = new_page((tmp_path / "a.html").as_uri())
    requests = requests_of(GREEDY, tokens=30)[:3]
    requests.append({"prompt": "Quick zebras vex.", "max_new_tokens": 5, "seed": 0, "sampling": GREEDY})
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", precision="int8")
    with pytest.warns(UserWarning, match="more than context_length 8"):
        assert ask(page, tmp_path / "a.html", requests) == expected(predictor, requests)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_it_cuts_and_joins_texts_as_the_tokenizer_does(pattern, files, new_page):
    """Hard texts have the same ids; ids in any order give the same text, but for special tokens, which have none."""
    tokenizer = make_tokenizer(files.text, pattern=pattern)
    texts = [
        *hard_texts(tokenizer),
        "\u017f'\u017f 'S '\u017f",
        "\x1c\x85\ufeff a",
        "x" * 300 + " " * 300 + "\n" * 3 + " " * 40,
    ]
    ids = [tokenizer.encode_ordinary(text) for text in texts]
    special = set(tokenizer.special_token_ids.values())
    streams = [[(7 * number + 3 * at * at) % tokenizer.vocab_size for at in range(40)] for number in range(60)]
    parts = {name: part.tolist() for name, part in tokenizer_parts(tokenizer).items()}
    tokens = [list(tokenizer.vocab[index]) for index in range(tokenizer.vocab_size)]
    page = new_page("about:blank")
    page.evaluate(bundled("probe.js", lambda name: PROBE if name == "probe.js" else files_of_page.read(name)))
    found = page.evaluate(
        "([parts, texts, streams]) => probe({ ...parts, kinds: parts, "
        "tokens: parts.tokens.map((one) => Uint8Array.from(one)) }, texts, streams)",
        [parts | {"tokens": tokens, "pattern": pattern}, texts, streams],
    )
    assert found[0] == ids
    plain = [[one for one in stream if one not in special] for stream in streams]
    assert found[1] == ["".join(pieces_of(iter(stream), Pieces(tokenizer.decode_bytes))) for stream in plain]


def opened(new_page, path: Path, **options):
    """Return a page that has its model."""
    page = new_page(path.as_uri(), **options)
    page.wait_for_selector("#status:has-text('Ready.')")
    return page


def never_ends(predictor: Predictor, prompt: str) -> bool:
    """Return whether the most likely tokens have come into a circle, as those of a random model do."""
    ends, goes_on = (
        "".join(predictor.stream(prompt, max_new_tokens=200, temperature=0.0, stop_at_eos=stops))
        for stops in (True, False)
    )
    return ends == goes_on


def test_a_person_writes_with_it(files, tmp_path, new_page, seen):
    """Write, Stop, Again, Undo by keys and buttons; nothing is asked for but the file and its worker."""
    checkpoint = make_checkpoint(tmp_path, files)
    write_html(checkpoint, tmp_path / "My <b>model.html", languages=["en"])
    page = opened(new_page, tmp_path / "My <b>model.html", viewport={"width": 360, "height": 640})
    assert page.inner_text("h1") == "My <b>model"
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", precision="int8")
    page.fill("[name=seed]", "5")
    page.fill("[name=max_new_tokens]", "12")
    page.fill("#text", "Ada")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status:has-text('seed 5')")
    settings = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95}
    first, second = ("".join(predictor.stream("Ada", seed=seed, **settings)) for seed in (5, 6))
    assert page.input_value("#text") == "Ada" + first.replace("\r", "\n")
    page.click("#again")
    page.wait_for_selector("#status:has-text('seed 6')")
    assert page.input_value("#text") == "Ada" + second.replace("\r", "\n")
    page.click("#undo")
    assert page.input_value("#text") == "Ada"
    page.fill("#text", next(prompt for prompt in PROMPTS if never_ends(predictor, prompt)))
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_new_tokens]", "1000000")
    page.click("#write")
    page.wait_for_selector("#status:has-text('from here on it reads the last 32 tokens')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#status:has-text('stopped')")
    assert page.is_enabled("#write")
    assert {one.url.split(":")[0] for one in seen.requests} == {"file", "blob"}
    assert seen.messages == []


def test_a_damaged_file_says_so(files, tmp_path, new_page):
    """A file that was cut off, and one without its last block, say it instead of writing nonsense."""
    path = tmp_path / "a.html"
    write_html(make_checkpoint(tmp_path, files), path)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[: len(whole) // 2 + 20_000], encoding="utf-8")
    page = new_page(path.as_uri())
    page.wait_for_selector("#status:has-text('This file is not complete')")
    block = re.search(r'class="weights">([^<]*)<', whole)[1]
    path.write_text(whole.replace(block, block[:-400]), encoding="utf-8")
    page = new_page(path.as_uri())
    page.wait_for_selector("#status:has-text('This file is damaged')")
    assert page.is_disabled("#write")


@pytest.mark.slow
def test_the_quickstart_s_model_is_a_small_page_with_infer_s_texts(tmp_path, new_page):
    """At most 8 MB, and ten prompts of a hundred most likely tokens are infer's, in a real browser."""
    command = [sys.executable, "-m", "cli.quickstart", f"--dir={tmp_path / 'quickstart'}", "--time=60s", "--device=cpu"]
    subprocess.run(command, check=True, timeout=1500)
    run, path = tmp_path / "quickstart" / "run", tmp_path / "stories.html"
    export = [sys.executable, "-m", "cli.export", f"--checkpoint={run}", "--format=html", f"--output={path}"]
    subprocess.run(export, check=True, timeout=300)
    assert path.stat().st_size <= 8_000_000
    beginnings = ["Once upon a time", "The little dog", "Tom", "One day", "In the forest", "A girl named Anna", "It"]
    prompts = [*beginnings, "Sam had a ball.", "", "Every day he"]
    requests = [{"prompt": one, "max_new_tokens": 100, "seed": 0, "sampling": GREEDY} for one in prompts]
    predictor = Predictor.from_checkpoint(run, device="cpu", precision="int8")
    page = new_page(path.as_uri())
    page.set_default_timeout(600_000)
    assert ask(page, path, requests) == expected(predictor, requests)
