"""The check of stories accepts everything that the grammar tells, and refuses what is only similar."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from databuilder.stories import tell_stories
from databuilder.story_check import check_story, split_sentences, summarize

STORY = """Once upon a time, there was a brave little boy named Tom. Every day, he liked to pick flowers. Most of \
all, Tom loved his red ball.

One day, Tom took the red ball to the park. He lay down for a short nap. When he woke up, the red ball was gone. \
"Oh no, where is my red ball?" cried Tom.

Just then, Mom came by. "What is wrong, Tom?" asked Mom. "I lost my red ball," said Tom. "Do not worry," said Mom. "We \
will look for it together." Soon Tom saw something under a bush. It was the red ball! Tom gave Mom a big hug. "Thank \
you, Mom," he said. Mom smiled. "You are a brave boy," she said.

The brave little boy smiled all the way home."""


def stories(number: int, *, seed: int = 0) -> list[str]:
    """Return the first stories of a seed."""
    return list(itertools.islice(tell_stories(seed=seed), number))


@pytest.mark.parametrize("seed", [0, 1, 20261126])
def test_each_story_of_the_grammar_passes(seed: int) -> None:
    """No story that the grammar tells has a fault, whatever the seed."""
    assert [fault for story in stories(400, seed=seed) for fault in check_story(story).faults] == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("cried Tom", "cried Lily", "hero Tom becomes Lily"),
        ("When he woke", "When she woke", "hero Tom becomes she"),
        ("The brave little boy", "The brave little girl", "hero Tom becomes girl"),
        ("It was the red ball", "It was the blue kite", "toy red ball becomes blue kite"),
        ("Thank you, Mom", "Thank you, Dad", "helper Mom becomes Dad"),
        ('brave boy," she', 'brave boy," he', "helper she becomes he"),
        ("The brave little", "The kind little", "trait brave becomes kind"),
        ("lost my red ball", "lost my red", 'no such sentence: "I lost my red," said Tom.'),
        ("there was a brave", "there was an brave", "no such sentence: Once upon a time, there was an brave"),
        ("Mom came by.", "Mom came by. Mom came by.", "no such sentence: Mom came by."),
        (" all the way home.", " all", "ends in the middle"),
        ("\n\nThe brave little boy smiled all the way home.", "", "ends in the middle"),
        ("He lay down", "Just then, Mom came by. He lay down", "out of place: He lay down for a short nap."),
        ("Every day, he liked to pick flowers.", "Her hat was Lily.", "hero Tom becomes Lily"),
        ('"I lost my', "I lost my", 'no such sentence: I lost my red ball,"'),
    ],
)
def test_a_changed_story_is_refused_with_the_reason(old: str, new: str, fault: str) -> None:
    """Each kind of change is named in words."""
    assert check_story(STORY).faults == ()
    assert STORY.count(old) == 1
    assert any(found.startswith(fault) for found in check_story(STORY.replace(old, new)).faults)


def test_each_part_of_the_check_answers_for_itself() -> None:
    """A changed hero, a sentence that does not exist and a changed toy are three answers."""
    hero = check_story(STORY.replace("When he woke", "When she woke"))
    grammar = check_story(STORY.replace("lay down for", "lay for"))
    plot = check_story(STORY.replace("It was the red ball", "It was the blue kite"))
    assert (hero.keeps_hero, hero.grammatical, hero.keeps_plot) == (False, True, True)
    assert (grammar.keeps_hero, grammar.grammatical, grammar.keeps_plot) == (True, False, True)
    assert (plot.keeps_hero, plot.grammatical, plot.keeps_plot) == (True, True, False)


def test_the_end_of_another_plot_is_an_end() -> None:
    """A story that ends like another plot is out of place there, not cut."""
    check = check_story(
        STORY.replace("The brave little boy smiled all the way home.", "And Tom had a very good dream.")
    )
    assert check.faults == ("out of place: And Tom had a very good dream.",)
    assert check.grammatical
    assert not check.keeps_plot


def mutations(story: str, random_state: random.Random) -> dict[str, str]:
    """Return one change of each kind, at a random place."""
    words = story.split(" ")
    at = random_state.randrange(len(words))
    name = re.search(r"named (\w+)", story)[1]
    names = list(re.finditer(rf"\b{name}\b", story))[1:]
    pronouns = list(re.finditer(r"\b(he|she|He|She)\b", story))
    swapped = {"he": "she", "she": "he", "He": "She", "She": "He"}
    changed = {
        "drop": " ".join(words[:at] + words[at + 1 :]),
        "double": " ".join(words[: at + 1] + words[at:]),
        "cut": story[: random_state.randrange(1, len(story.rstrip()) - 1)],
    }
    if names:
        place = random_state.choice(names)
        changed["name"] = story[: place.start()] + ("Lily" if name != "Lily" else "Tom") + story[place.end() :]
    if pronouns:
        place = random_state.choice(pronouns)
        changed["pronoun"] = story[: place.start()] + swapped[place[0]] + story[place.end() :]
    return changed


def test_mutations_of_many_stories_are_refused() -> None:
    """A dropped or doubled word, a cut end, another name and another pronoun do not pass, anywhere in a story."""
    random_state = random.Random(7)
    passed = [
        (kind, text)
        for story in stories(150, seed=3)
        for kind, text in mutations(story, random_state).items()
        if not check_story(text).faults
    ]
    assert passed == []


def test_no_text_breaks_the_check() -> None:
    """Noise has faults and raises nothing, and the time for long noise grows only with its length."""
    for text in ("", " \n", '"', "...", "a" * 50_000, '"' * 999, "Tom. " * 999, "\x00\ud800?", '"a.' * 5_000):
        assert check_story(text).faults
    assert check_story("").faults == ("ends in the middle",)


def test_quotes_stay_in_their_sentence() -> None:
    """A quote does not end a sentence if its speaker follows."""
    sentences, rest = split_sentences('"Stop! Why?" asked Tom. "I see." He went\n\nhome. And')
    assert sentences == ['"Stop! Why?" asked Tom.', '"I see."', "He went home."]
    assert rest.strip() == "And"


def test_the_summary_has_the_shares() -> None:
    """Shares are of all stories; new are those that are not among the known ones, whatever their white space."""
    texts = [STORY, STORY.replace("cried Tom", "cried Lily"), STORY.replace("lay down for", "lay for"), STORY]
    summary = summarize(texts, known=[STORY.replace("\n\n", " ")])
    assert (summary.keeps_hero, summary.grammatical, summary.both, summary.faultless) == (0.75, 0.75, 0.5, 0.5)
    assert summary.new == 0.5
    assert str(summary) == (
        "4 stories: 75% keep the hero, 75% are grammatical, 50% do both, 50% are without fault, 50% are new"
    )
    assert summarize([STORY]).new is None
    with pytest.raises(ValueError, match="at least one story"):
        summarize([])
