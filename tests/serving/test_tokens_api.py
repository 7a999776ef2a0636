"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

from __future__ import annotations

from tests.serving.fake_engine import END
from tests.serving.web import Web, run


def test_a_text_comes_back(tmp_path):
    """Ids, pieces and bytes belong together; half a character is shown by its byte."""

    async def ask(web: Web) -> None:
        text = "once \u00e9 a\U0001f600" + END
        answer = (await web.client.post("/tokenize", json={"prompt": text})).json()
        assert answer["tokens"] == web.engine.tokenizer.encode(text)
        assert answer["count"] == len(answer["tokens"]) == len(answer["pieces"]) == len(answer["bytes"])
        assert bytes.fromhex("".join(answer["bytes"])).decode() == text
        assert answer["pieces"][:4] == ["once", " ", "bytes:\\xc3", "bytes:\\xa9"]
        assert (answer["max_model_len"], answer["token_strs"]) == (64, None)
        back = await web.client.post("/detokenize", json={"tokens": answer["tokens"], "model": "tiny"})
        assert back.json() == {"prompt": text}

    run(tmp_path, ask)


def test_a_long_text_is_answered_in_parts_that_make_one_answer(tmp_path):
    """More tokens than one part has: the same answer as that of its pieces, in JSON that is whole."""

    async def ask(web: Web) -> None:
        text = "once \u00e9 a\U0001f600" * 3000 + END
        answer = (await web.client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert answer["tokens"] == web.engine.tokenizer.encode(text)
        assert answer["pieces"] == answer["token_strs"]
        assert bytes.fromhex("".join(answer["bytes"])).decode() == text
        none = (await web.client.post("/tokenize", json={"prompt": "", "add_special_tokens": False})).json()
        assert none == {"count": 0, "max_model_len": 64, "tokens": [], "token_strs": None, "pieces": [], "bytes": []}

    run(tmp_path, ask)


def test_special_tokens_may_be_plain_text(tmp_path):
    """They are tokens, as in vLLM, unless a request says otherwise."""

    async def ask(web: Web) -> None:
        whole = await web.client.post("/tokenize", json={"prompt": END, "add_special_tokens": False})
        assert whole.json()["tokens"] == [web.engine.end_id]
        spelled = await web.client.post(
            "/tokenize", json={"prompt": END, "allow_special": False, "return_token_strs": True}
        )
        assert spelled.json()["tokens"] == [*END.encode()]
        assert spelled.json()["token_strs"] == [*END]

    run(tmp_path, ask)


def test_wrong_ids_and_models_are_refused(tmp_path):
    """An id that the tokenizer lacks is a 400, another model a 404."""

    async def ask(web: Web) -> None:
        for ids in ([-1], [10**6], [2**40], [0, 261]):
            answer = await web.client.post("/detokenize", json={"tokens": ids})
            assert answer.status_code == 400
            assert "token ids from 0 to 260" in answer.json()["error"]["message"]
        assert (await web.client.post("/tokenize", json={"prompt": "a", "model": "x"})).status_code == 404
        assert (await web.client.post("/tokenize", json={"promt": "a"})).status_code == 400
        assert (await web.client.post("/detokenize", json={})).json()["error"]["param"] == "tokens"

    run(tmp_path, ask)


def test_the_tokenizers_facts(tmp_path):
    """lm-eval reads the end of a text from here."""

    async def ask(web: Web) -> None:
        facts = (await web.client.get("/tokenizer_info")).json()
        assert (facts["eos_token"], facts["bos_token"], facts["vocab_size"]) == (END, END, 261)

    run(tmp_path, ask)
