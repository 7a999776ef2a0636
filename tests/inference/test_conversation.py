"""A conversation: what the model is given, where its answers end, and what is kept of them."""

from __future__ import annotations

import pytest

from tests.inference.helpers import EOS, Script, make_tokenizer
from tests.training.chat_run import ANSWER, PLAIN, train_chat_run
from transformerlm.inference.conversation import Conversation
from transformerlm.inference.predictor import Predictor
from transformerlm.tokenizer.chat import ChatFormat

SPECIALS = [EOS, "<|im_start|>", "<|im_end|>"]
END_ID = 258


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory):
    """Return a run that was trained on conversations, which no test changes."""
    return train_chat_run(tmp_path_factory.mktemp("chat"))


def scripted(text: str, *, chat: ChatFormat | None = None, end: int = END_ID) -> Conversation:
    """Return a conversation with a model that says a text and ends it."""
    script = Script([*text.encode(), end, *[ord("x")] * 50], vocab_size=259)
    predictor = Predictor(script, make_tokenizer(SPECIALS))
    return Conversation(predictor, chat or ChatFormat())


def test_an_answer_ends_at_its_token_and_is_kept():
    """The token after an answer is no part of it; question and answer are the next prompt's beginning."""
    conversation = scripted("Hello, Zoë.")
    assert "".join(conversation.stream("Hi", temperature=0.0)) == "Hello, Zoë."
    assert conversation.turns == [("user", "Hi"), ("assistant", "Hello, Zoë.")]
    conversation.system = "Be kind."
    assert conversation.messages == [("system", "Be kind."), *conversation.turns]
    conversation.reset()
    assert conversation.messages == [("system", "Be kind.")]


def test_an_answer_ends_at_the_string_of_a_plain_format_and_at_the_end_of_a_document():
    """A format without special tokens ends it by its string; the separator of documents ends every answer."""
    assert "".join(scripted("one\ntwo", chat=PLAIN).stream("Hi", temperature=0.0)) == "one"
    assert "".join(scripted("one", end=256).stream("Hi", temperature=0.0)) == "one"
    assert "".join(scripted("one two").stream("Hi", temperature=0.0, stop=[" t"])) == "one"


def test_an_end_that_is_a_string_cannot_be_put_off_but_ignored():
    """As on the server: a token can be ruled out until an answer is long enough, a string cannot."""
    with pytest.raises(ValueError, match=r"min_tokens: expected 0, since .* end with a string, .* found 4"):
        scripted("one\ntwo", chat=PLAIN).stream("Hi", temperature=0.0, min_tokens=4)
    with pytest.raises(TypeError, match="stop: expected a list of strings, found the string 'END'"):
        scripted("one").stream("Hi", stop="END")
    text = "".join(scripted("one\ntwo", chat=PLAIN).stream("Hi", temperature=0.0, stop_at_eos=False, max_new_tokens=7))
    assert text == "one\ntwo"


def test_an_answer_that_is_not_read_to_its_end_is_kept_as_far_as_it_was():
    """What was read is what the model is told that it said; where nothing was, the question is forgotten."""
    conversation = scripted("abc")
    stream = conversation.stream("Hi", temperature=0.0)
    assert next(stream) == "a"
    stream.close()
    assert conversation.turns == [("user", "Hi"), ("assistant", "a")]
    conversation.reset()
    conversation.stream("Hi").close()
    assert conversation.turns == []
    silent = scripted("")
    assert list(silent.stream("Hi", temperature=0.0)) == []
    assert silent.turns == [("user", "Hi"), ("assistant", "")]


def test_what_a_message_spells_is_plain_text(chat_run):
    """A typed `<|im_end|>` is letters to the model; half a character is U+FFFD."""
    conversation = Conversation.with_checkpoint(Predictor.from_checkpoint(chat_run, device="cpu"))
    seen = []
    conversation.predictor.stream = lambda prompt, **settings: iter(seen.append(prompt) or [])
    list(conversation.stream("a<|im_end|>\ud83d"))
    [prompt], tokenizer = seen, conversation.predictor.tokenizer
    specials = [one for one in prompt if one in tokenizer.special_token_ids.values()]
    assert [tokenizer.decode([one]) for one in specials] == [EOS, "<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert "a<|im_end|>\ufffd<|im_end|>" in tokenizer.decode(prompt)


def test_a_trained_model_answers_as_it_has_learnt(chat_run):
    """By its own format, again and again, also when the conversation no longer fits its context."""
    predictor = Predictor.from_checkpoint(chat_run, device="cpu", reproducible=True)
    conversation = Conversation.with_checkpoint(predictor, system="Be brief.")
    left_out = []
    for _ in range(6):
        assert "".join(conversation.stream("Is Bob here?", temperature=0.0, max_new_tokens=20)) == ANSWER
        left_out.append(conversation.num_left_out)
    assert left_out[0] == 0
    assert left_out[-1] > 0
    assert left_out == sorted(left_out)
    assert all(one % 2 == 0 for one in left_out)


def test_a_checkpoint_of_text_has_no_format(tmp_path):
    """The error says what there is to do."""
    from tests.serving.helpers import tiny_checkpoint
    from tests.training.tiny_run import write_tiny_files

    tiny_checkpoint(tmp_path / "run", write_tiny_files(tmp_path))
    predictor = Predictor.from_checkpoint(tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"expected a model with a chat format, .* docs/documents\.md"):
        Conversation.with_checkpoint(predictor)
    with pytest.raises(ValueError, match=r"expected special tokens of the tokenizer"):
        Conversation(predictor, ChatFormat())
    assert list(Conversation(predictor, PLAIN).stream("Hi", max_new_tokens=2, stop_at_eos=False))
