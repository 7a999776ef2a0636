"""Comparing what was written with what its library reads: ids on hard texts, logits on a real text.

Each function returns one line for the user, even if the library is not installed, and raises ValueError if something
differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config.extras import how_to_install
from transformerlm.interop.chat_template import PROBES
from transformerlm.tokenizer.chat import ChatRenderer
from transformerlm.tokenizer.pretokenize import PATTERNS
from transformerlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformerlm.models.transformer import TransformerLM

NOT_ASKED = "not verified, as verify = false"
TOLERANCE = 1e-4
_MAX_TOKENS = 512
_MAX_SPECIALS = 50
# Jane Austen, Pride and Prejudice (1813), the beginning.
REAL_TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in \
want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is \
so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or \
other of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."
"""
HARD_TEXTS = (
    "",
    REAL_TEXT,
    "I'll we've IT'S they'RE he'd 'tis can't\u2019ve '\u017f rock'n'roll ''s",
    "line\r\nline\r\n\r\n  indented\r\n\tx\ry\n\n\n z  \n",
    "  two  spaces   three\ttab \u00a0nbsp\u3000wide\u2003em\u200bzero\u2028ls\u0085nel\x1c\x1f\x0b\x0c ",
    "1 12 123 1234 12345678 3.14 ²³½ ٣٤٥ ⅷ 一二三",
    "我能吞下玻璃而不傷身體。私はガラスを食べられます。나는 유리를 먹을 수 있어요",
    "Съешь ещё этих мягких булок, Ελληνικά, עברית, العربية, हिन्दी, ภาษาไทย",
    "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✈️ e\u0301 é \ufeffbom \ufffd \U0010ffff",
    "def f(x):\n    return {'a': [x**2, -1.5e-3], \"b\": None}  # ok!?\n\n\nf(...)//=1\\n",
    "\x00\x01\x7f  <|x|> <|endoftext <s>",
)
_ALPHABET = " \t\n\r'.,!-_0179sSltTvereLdmaÉé中文かجा️🍎\u00a0\u3000\u0301\u200d<|>"


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts on which very similar tokenizers differ, some of them with this one's special tokens."""
    rng = random.Random(0)
    mixed = ["".join(rng.choices(_ALPHABET, k=rng.randrange(1, 40))) for _ in range(300)]
    specials = tokenizer.special_tokens[:_MAX_SPECIALS]
    around = [f"a{special}b {special}{special}\n {special[:-1]}{special}'s" for special in specials]
    return [*HARD_TEXTS, *mixed, *around, "".join(specials)]


def compare_ids(
    tokenizer: Tokenizer, encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str], *, library: str
) -> int:
    """Encode and decode hard texts with both, and return how many there were.

    Raises:
        ValueError: a text whose ids or whose decoded text differ.
    """
    texts = hard_texts(tokenizer)
    for text in texts:
        ours, theirs = tokenizer.encode(text), list(encode(text))
        if ours != theirs:
            raise ValueError(f"verify: {library} encodes {text[:60]!r} to {theirs[:20]}, ours to {ours[:20]}")
        if decode(ours) != tokenizer.decode(ours):
            raise ValueError(f"verify: {library} decodes {ours[:20]} to another text than ours")
    return len(texts)


def verify_tokenizer_json(tokenizer: Tokenizer, text: str) -> str:
    """Compare ids with those of the `tokenizers` library, given the text of a `tokenizer.json`."""
    try:
        import tokenizers
    except ImportError:
        return _skipped("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(text)
    if is_normalized := theirs.normalizer is not None:  # by NFC, which ours leaves to whoever has the text
        theirs.normalizer = None
    count = compare_ids(
        tokenizer,
        lambda text: theirs.encode(text, add_special_tokens=False).ids,
        lambda ids: str(theirs.decode(ids, skip_special_tokens=False)),
        library="tokenizers",
    )
    without = ", without its normalizer" if is_normalized else ""
    return f"verified with tokenizers{without}: the ids of {count} hard texts are equal"


def verify_ranks(tokenizer: Tokenizer, ranks: dict[bytes, int]) -> str:
    """Compare ids with those of the `tiktoken` library, given the ranks."""
    try:
        import tiktoken
    except ImportError:
        return _skipped("tiktoken")
    theirs = tiktoken.Encoding(
        "ours",
        pat_str=PATTERNS[tokenizer.pattern],
        mergeable_ranks=ranks,
        special_tokens=tokenizer.special_token_ids,
    )
    count = compare_ids(
        tokenizer, lambda text: theirs.encode(text, allowed_special="all"), theirs.decode, library="tiktoken"
    )
    return f"verified with tiktoken: the ids of {count} hard texts are equal"


def verify_hf(
    model: TransformerLM,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    leading: Sequence[int | None] = (),
    chat: ChatRenderer | None = None,
) -> str:
    """Open a directory as users of `transformers` do, and compare ids and logits with those of ours, in fp32.

    The directory's tokenizer puts the ids `leading` before each text, and has a chat template if `chat` is given.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        return _skipped("transformers")
    _be_quiet()
    theirs = _open(AutoTokenizer, directory)
    if (found := list(theirs("")["input_ids"])) != list(leading):
        raise ValueError(f"verify: transformers puts {found} before each text, expected {list(leading)}")
    count = compare_ids(
        tokenizer,
        lambda text: theirs(text)["input_ids"][len(leading) :],
        lambda ids: str(theirs.decode(ids, clean_up_tokenization_spaces=False)),
        library="transformers",
    )
    chats = "" if chat is None else f"those of {compare_chats(chat, theirs)} conversations, too, "
    logits = compare_logits(model, _open(AutoModelForCausalLM, directory), tokenizer)
    return f"verified with transformers: the ids of {count} hard texts are equal, {chats}{logits}"


def compare_chats(ours: ChatRenderer, theirs: Any) -> int:
    """Render conversations by a chat template of `transformers` and by ours, and return how many there were.

    Raises:
        ValueError: a conversation whose ids differ.
    """
    for messages in PROBES:
        said = [{"role": role, "content": content} for role, content in messages]
        found = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        if list(found) != ours.prompt(messages).tolist():
            raise ValueError(f"verify: transformers renders {said} as {list(found)[:20]}, other ids than ours")
    return len(PROBES)


def verify_model(model: TransformerLM, tokenizer: Tokenizer | None, directory: Path) -> str:
    """Compare logits with those that `transformers` gives for the weights of a stranger's directory."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return _skipped("transformers")
    _be_quiet()
    return f"verified with transformers: {compare_logits(model, _open(AutoModelForCausalLM, directory), tokenizer)}"


def compare_logits(model: TransformerLM, other: Any, tokenizer: Tokenizer | None) -> str:
    """Compare logits in fp32 on a real text, or on random ids without a tokenizer, and say how close they are.

    Raises:
        ValueError: a logit differs by more than 1e-4 plus 1e-4 of itself.
    """
    length = min(model.context_length, _MAX_TOKENS)
    if tokenizer is not None:
        ids = torch.tensor([tokenizer.encode(REAL_TEXT)[:length]])
    else:
        ids = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids), other.float().eval()(ids).logits
    difference = float((ours - theirs).abs().max())
    if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(f"verify: logits differ by up to {difference:.2g}, expected at most {TOLERANCE:g}")
    return f"logits differ by {difference:.1g} at most on {ids.shape[1]} tokens"


def _open(kind: Any, directory: Path) -> Any:
    """Open a local directory with `transformers`, without the network and without code that a file names."""
    try:
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any kind: it is not our code
        raise ValueError(f"verify: transformers does not open {directory}: {error}") from error


def _skipped(library: str) -> str:
    return f"not verified, as {library} is not installed: {how_to_install('interop')}"


def _be_quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
