"""Questions with one right answer, from templates: arithmetic, spelling, and the children's stories.

A kind of question has keys, which say what is asked, such as two numbers, and templates, which say it in words. The
split into training and test goes by the key, so that a test asks nothing that training has answered in other words.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from databuilder.stories import tell_scenes
from databuilder.story_plots import PLOTS, parse_plot
from databuilder.story_words import WORLDS, Row

Draw = Callable[[], float]
"""Returns numbers in [0, 1)."""
T = TypeVar("T")

LARGEST = 50
NUM_MADE_UP = 4_000
NUM_STORIES = 6_000
TEST_SHARE = 0.1

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Turn:
    """A question, its shortest right answer, and that answer as a sentence."""

    question: str
    answer: str
    sentence: str


@dataclass(frozen=True)
class Kind:
    """A kind of question: its keys, and from a key to the turns of a conversation.

    `name_of` writes a key as text, by which the split goes: keys of one text are never on both sides of it. Of these
    texts `test_share` are for the test.
    """

    keys: Sequence[Any]
    turns: Callable[[Any, Draw], list[Turn]]
    name_of: Callable[[Any], str] = str
    test_share: float = TEST_SHARE


def one_of(choices: Sequence[T], draw: Draw) -> T:
    """Return one of the choices."""
    return choices[int(draw() * len(choices))]


# --- arithmetic ----------------------------------------------------------------------------------------------------

_PLUS = ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}?")
_MINUS = ("What is {a} - {b}?", "How much is {a} minus {b}?", "Take {b} away from {a}.", "{a} - {b}?")
_MORE = ("And {c} more?", "Now add {c}.", "Plus {c}?")

PAIRS = list(itertools.combinations_with_replacement(range(LARGEST + 1), 2))
"""Two numbers, the smaller one first: 3 + 4 and 4 + 3 ask the same."""


def _sum(pair: tuple[int, int], draw: Draw) -> list[Turn]:
    a, b = pair if draw() < 0.5 else pair[::-1]
    return [_equation(one_of(_PLUS, draw), a, b)]


def _equation(template: str, a: int, b: int) -> Turn:
    return Turn(template.format(a=a, b=b, c=b), str(a + b), f"{a} + {b} = {a + b}.")


def _difference(pair: tuple[int, int], draw: Draw) -> list[Turn]:
    b, a = pair
    return [Turn(one_of(_MINUS, draw).format(a=a, b=b), str(a - b), f"{a} - {b} = {a - b}.")]


def follow_ups(pairs: Iterable[tuple[int, int]]) -> Kind:
    """Return the kind of which both sums, of two numbers and then of their sum and a third one, are among the pairs."""
    known = set(pairs)
    keys = [
        (a, b, c)
        for a, b in sorted(known)
        for c in range(LARGEST + 1)
        if a + b <= LARGEST and (min(a + b, c), max(a + b, c)) in known
    ]
    return Kind(keys, _follow_up)


def _follow_up(key: tuple[int, int, int], draw: Draw) -> list[Turn]:
    a, b, c = key
    return [*_sum((a, b), draw), _equation(one_of(_MORE, draw), a + b, c)]


# --- words ---------------------------------------------------------------------------------------------------------

_SPELL = ("Spell the word {word}.", "How do you spell {word}?", "Spell {word}.")
_LETTERS = ("How many letters are in {word}?", "How many letters does {word} have?", "Count the letters of {word}.")


def story_words() -> list[str]:
    """Return the words of the stories that have three letters or more, each once, in order."""
    forms = (form for plot in PLOTS.values() for part in parse_plot(plot) for beat in part for form in beat.forms)
    told = " ".join(re.sub(r"\{\w+\}", " ", form) for form in forms)
    texts = " ".join(text for world in WORLDS for table in world.values() for row in table for text in row.values())
    return sorted(set(re.findall(r"\b[a-z]{3,}\b", f"{told} {texts}")))


def made_up_words(number: int, *, seed: int) -> list[str]:
    """Return words of two or three syllables that no story has, such as `talo` and `mizuf`."""
    draw = random.Random(seed).random
    known, made = set(story_words()), dict[str, None]()
    while len(made) < number:
        syllables = 2 if draw() < 0.7 else 3
        word = "".join(one_of(_CONSONANTS, draw) + one_of(_VOWELS, draw) for _ in range(syllables))
        word += one_of(_CONSONANTS, draw) if draw() < 0.5 else ""
        if word not in known:
            made[word] = None
    return list(made)


def _spelling(word: str, draw: Draw) -> list[Turn]:
    letters = " ".join(word)
    return [Turn(one_of(_SPELL, draw).format(word=word), letters, f"The word {word} is spelled {letters}.")]


def _count(word: str, draw: Draw) -> list[Turn]:
    return [Turn(one_of(_LETTERS, draw).format(word=word), f"{len(word)}", f"The word {word} has {len(word)} letters.")]


# --- stories -------------------------------------------------------------------------------------------------------

_ASKED: Mapping[str, Turn] = {
    "name": Turn("What is the name of the {kind}?", "{name}", "The name of the {kind} is {name}."),
    "trait": Turn("What is {name} like?", "{trait}", "{name} is {trait}."),
    "home": Turn("Where does {name} live?", "{home}", "{name} lives {home}."),
    "hobby": Turn("What does {name} like to do?", "{hobby}", "{name} likes to {hobby}."),
    "toy": Turn("Which toy does {name} have?", "{a_toy}", "{name} has {a_toy}."),
    "skill": Turn("What does {name} want to learn?", "to {skill}", "{name} wants to {skill}."),
    "fear": Turn("What is {name} afraid of?", "{fear}", "{name} is afraid of {fear}."),
    "sight": Turn("What does {name} want to see?", "{sight}", "{name} wants to see {sight}."),
}
"""By the slot that must be told: what one can ask about the beginning of a story."""
_WHO = ("Who is {name} in the stories?", "What is {name}?", "Tell me what {name} is.")
_FACTS_TEST_SHARE = 0.25  # of fewer than thirty names

Beginning = tuple[str, Row]


def beginnings(number: int, *, seed: int) -> list[Beginning]:
    """Return the first paragraphs of stories, each once, with the words that fill their slots."""
    told = ((story.split("\n\n")[0], scene) for story, scene in tell_scenes(seed=seed))
    return list(dict(itertools.islice(told, number)).items())


def _reading(beginning: Beginning, draw: Draw) -> list[Turn]:
    """Return a question about the text that it begins with, and now and then a second one."""
    text, scene = beginning
    told = [turn for slot, turn in _ASKED.items() if slot in scene and scene[slot] in text]
    first = int(draw() * len(told))
    chosen = [told[first]]
    if len(told) > 1 and draw() < 0.5:
        chosen.append(told[(first + 1 + int(draw() * (len(told) - 1))) % len(told)])
    parts = [[part.format_map(scene) for part in (turn.question, turn.answer, turn.sentence)] for turn in chosen]
    parts[0][0] = f"{text}\n\n{parts[0][0]}"
    return [Turn(*part) for part in parts]


def _fact(hero: tuple[str, str], draw: Draw) -> list[Turn]:
    name, kind = hero
    return [Turn(one_of(_WHO, draw).format(name=name), f"a {kind}", f"{name} is a {kind}.")]


def heroes() -> list[tuple[str, str]]:
    """Return name and kind of each hero of the stories: Pip is a rabbit in all of them."""
    return sorted({(row["name"], row["kind"]) for world in WORLDS for row in world["hero"]})


# --- all of them ---------------------------------------------------------------------------------------------------


def all_kinds(*, seed: int) -> dict[str, Kind]:
    """Return each kind of question by its name, but for follow-ups, which are made from the pairs of one side.

    The stories to read are those of the next seed: a model that was trained on those of `seed` does not know them.
    """
    made_up = made_up_words(NUM_MADE_UP, seed=seed)
    return {
        "addition": Kind(PAIRS, _sum),
        "subtraction": Kind(PAIRS, _difference),
        "spelling": Kind(made_up, _spelling),
        "story-words": Kind(story_words(), _spelling),
        "letters": Kind(made_up, _count),
        "reading": Kind(beginnings(NUM_STORIES, seed=seed + 1), _reading, name_of=lambda beginning: beginning[0]),
        "facts": Kind(heroes(), _fact, test_share=_FACTS_TEST_SHARE),
    }
