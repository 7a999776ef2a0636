"""Questions from templates: each answer is right, by a check of its own."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from databuilder import questions
from databuilder.questions import LARGEST, PAIRS, all_kinds, follow_ups, heroes, made_up_words, story_words
from databuilder.stories import tell_stories

KINDS = all_kinds(seed=0)


def turns_of(kind: questions.Kind, number: int = 300) -> list[tuple[object, list[questions.Turn]]]:
    """Return keys and the turns that are made of them."""
    draw = random.Random(1).random
    chosen = [questions.one_of(kind.keys, draw) for _ in range(number)]
    return [(key, kind.turns(key, draw)) for key in chosen]


@pytest.mark.parametrize(("name", "sign"), [("addition", 1), ("subtraction", -1)])
def test_arithmetic_is_right(name, sign):
    """The numbers of the question give the answer, and the sentence is that equation."""
    for _, (turn,) in turns_of(KINDS[name]):
        numbers = [int(one) for one in re.findall(r"\d+", turn.question)]
        a, b = reversed(numbers) if turn.question.startswith("Take") else numbers
        assert int(turn.answer) == a + sign * b >= 0
        assert turn.sentence == f"{a} {'+' if sign > 0 else '-'} {b} = {turn.answer}."


def test_a_sum_is_the_same_either_way():
    """3 + 4 and 4 + 3 have one key, so they are on one side of the split; both are asked."""
    assert len(PAIRS) == (LARGEST + 1) * (LARGEST + 2) // 2
    asked = {turn.question for key, (turn,) in turns_of(KINDS["addition"], 20_000) if key == (3, 4)}
    assert any("3" in text.split("4")[0] for text in asked)
    assert any("4" in text.split("3")[0] for text in asked)


def test_a_follow_up_goes_on_with_the_sum():
    """Both sums are among the pairs that it was given, so none is of the test."""
    known = set(PAIRS[::3])
    for (a, b, c), (first, second) in turns_of(follow_ups(known)):
        assert (a, b) in known
        assert (min(a + b, c), max(a + b, c)) in known
        assert (int(first.answer), int(second.answer)) == (a + b, a + b + c)
        assert re.findall(r"\d+", second.question) == [str(c)]


def test_words_are_spelled_and_counted():
    """The letters of the word that is asked for, one by one, and their number."""
    for name in ("spelling", "story-words", "letters"):
        for word, (turn,) in turns_of(KINDS[name], 100):
            assert re.search(rf"\b{word}\b", turn.question)
            assert turn.answer == (str(len(word)) if name == "letters" else " ".join(word))
            assert turn.answer in turn.sentence


def test_made_up_words_are_in_no_story():
    """They can be spelled only letter by letter, and are the same for a seed."""
    words = made_up_words(500, seed=2)
    assert len(set(words)) == 500
    assert not set(words) & set(story_words())
    assert words == made_up_words(500, seed=2) != made_up_words(500, seed=3)
    assert {len(word) for word in words} == {4, 5, 6, 7}


def test_story_words_are_those_of_stories():
    """Nearly all of them come in a thousand stories."""
    stories = tell_stories(seed=0)
    told = set(re.findall(r"[a-z]+", " ".join(next(stories) for _ in range(1_000)).lower()))
    words = story_words()
    assert len(words) > 300
    assert sum(word in told for word in words) > 0.98 * len(words)


def test_answers_to_a_reading_are_in_the_text():
    """The text begins the first question, is a story's first paragraph, and holds the words of each answer."""
    stories = itertools.islice(tell_stories(seed=1), questions.NUM_STORIES)
    known = {story.split("\n\n")[0] for story in stories}
    asked = set()
    for (text, scene), turns in turns_of(KINDS["reading"], 1_000):
        assert text in known
        assert turns[0].question.startswith(f"{text}\n\n")
        asked |= {turn.question.split("\n")[-1].replace(scene["name"], "NAME").split(" the ")[0] for turn in turns}
        for turn in turns:
            words = set(re.findall(r"\w+", turn.answer)) - {"to", "a", "an"}
            assert words <= set(re.findall(r"\w+", text))
            assert "{" not in turn.question + turn.answer + turn.sentence
        assert len({turn.question for turn in turns}) == len(turns)
    assert len(asked) == len(questions._ASKED)


def test_facts_are_those_of_all_stories():
    """A hero of this name is of this kind in each story."""
    kinds = dict(heroes())
    assert len(kinds) == len(heroes()) > 20
    stories = tell_stories(seed=5)
    named = [re.search(r"little (\w+) named (\w+)", next(stories)) for _ in range(300)]
    assert all(kinds[found[2]] == found[1] for found in named if found)
    for (name, kind), (turn,) in turns_of(KINDS["facts"], 50):
        assert name in turn.question
        assert (turn.answer, turn.sentence) == (f"a {kind}", f"{name} is a {kind}.")
