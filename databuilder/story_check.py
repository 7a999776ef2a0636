"""The grammar's own check: is a text one of its stories, and if not, what is wrong with it?

Each form of `databuilder/story_plots.py` becomes a regular expression whose slots match the texts of their tables. A
sentence that matches none is a fault. A sentence that does match says which rows of the tables the story may have
taken; when no row is left, someone or something has changed on the way: a name, a pronoun, a toy.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from databuilder.story_plots import PLOTS, parse_plot, slots_of
from databuilder.story_words import WORLDS, Row, Table

# A sentence ends at its mark, or at a closing quote after one, if white space and a capital or a quote follow.
_SENTENCE = re.compile(r'\s*(?:"[^"]*"|[^".!?])+?(?:[.!?]|(?<=[.!?]"))(?=\s+["A-Z]|\s*$)')
_BROKEN_SENTENCE = re.compile(r'\s*.+?[.!?]"?(?=\s|$)', re.DOTALL)

Place = tuple[int, int]  # the number of a beat, and of a sentence in it


@dataclass(frozen=True)
class StoryCheck:
    """Whether a text is a story of the grammar, and its faults in words."""

    keeps_hero: bool
    """The hero of the first sentence has the same name and pronouns to the end."""
    grammatical: bool
    """Each sentence is one of the grammar's, and the last one ends a story."""
    keeps_plot: bool
    """The helper, the wish and all the other choices stay, and the events come in the order of one plot."""
    faults: tuple[str, ...]


@dataclass(frozen=True)
class StorySummary:
    """The shares of some stories that pass each part of the check."""

    stories: int
    keeps_hero: float
    grammatical: float
    both: float
    """Keeps the hero and is grammatical."""
    faultless: float
    """Keeps the plot as well."""
    new: float | None
    """Is not among the known stories; None if those were not given."""

    def __str__(self) -> str:
        parts = [f"{self.keeps_hero:.0%} keep the hero", f"{self.grammatical:.0%} are grammatical"]
        parts += [f"{self.both:.0%} do both", f"{self.faultless:.0%} are without fault"]
        parts += [f"{self.new:.0%} are new"] if self.new is not None else []
        return f"{self.stories:,} {'story' if self.stories == 1 else 'stories'}: {', '.join(parts)}"


@dataclass(frozen=True)
class _Pattern:
    """A sentence of the grammar: how to find it, its slots, and its places in the plots."""

    regex: re.Pattern[str]
    slots: tuple[str, ...]
    places: dict[str, list[Place]]


@dataclass(frozen=True)
class _Reading:
    """What a sentence says in one of its readings."""

    faults: list[tuple[str, str]]
    """The table whose row has changed, and the change in words."""
    rows: dict[str, list[Row]]
    """The rows that the story may still have taken from the tables that the sentence uses."""
    places: dict[str, Place]
    """The places of the sentence in each plot that is still possible."""
    ends_a_story: bool
    """Whether it is one of the last sentences of some plot."""


def check_story(text: str) -> StoryCheck:
    """Return whether a text is a story of the grammar, and what is wrong if it is not."""
    sentences, rest = split_sentences(text)
    if not sentences:
        return StoryCheck(False, False, False, ("ends in the middle",))
    reader = _Reader()
    for sentence in sentences:
        reader.read(sentence)
    if rest or not reader.is_at_an_end:
        reader.ungrammatical.append("ends in the middle")
    faults = (*reader.hero_faults, *reader.ungrammatical, *reader.plot_faults)
    return StoryCheck(
        keeps_hero=len(reader.rows["hero"]) == 1 and not reader.hero_faults,
        grammatical=not reader.ungrammatical,
        keeps_plot=not reader.plot_faults,
        faults=tuple(dict.fromkeys(faults)),
    )


def summarize(texts: Iterable[str], *, known: Iterable[str] | None = None) -> StorySummary:
    """Return the shares of stories that pass the check, and of those that are not among the `known` ones.

    Raises:
        ValueError: there is no text.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("texts: expected at least one story, found none")
    checks = [check_story(text) for text in texts]
    seen = None if known is None else {" ".join(story.split()) for story in known}
    return StorySummary(
        stories=len(texts),
        keeps_hero=_share(check.keeps_hero for check in checks),
        grammatical=_share(check.grammatical for check in checks),
        both=_share(check.keeps_hero and check.grammatical for check in checks),
        faultless=_share(not check.faults for check in checks),
        new=None if seen is None else _share(" ".join(text.split()) not in seen for text in texts),
    )


def _share(answers: Iterable[bool]) -> float:
    answers = list(answers)
    return sum(answers) / len(answers)


def split_sentences(text: str) -> tuple[list[str], str]:
    """Return the sentences of a text, with quotes kept whole, and what comes after the last one."""
    sentences: list[str] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = _SENTENCE.match(text, position) or _BROKEN_SENTENCE.match(text, position)
        if match is None:
            return sentences, text[position:]
        sentences.append(" ".join(match.group().split()))
        position = match.end()
    return sentences, ""


class _Reader:
    """Reads a story sentence by sentence and keeps what can still be true of it."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {name: list(table) for name, table in _tables().items()}
        self.places: dict[str, Place] = dict.fromkeys(PLOTS, (-1, 0))
        self.is_at_an_end = False
        self.hero_faults: list[str] = []
        self.ungrammatical: list[str] = []
        self.plot_faults: list[str] = []

    def read(self, sentence: str) -> None:
        """Take one more sentence into account."""
        matches = ((pattern, pattern.regex.fullmatch(sentence)) for pattern in _patterns())
        readings = [self._reading(pattern, match.groups()) for pattern, match in matches if match]
        self.is_at_an_end = any(reading.ends_a_story for reading in readings)
        if not readings:
            self.ungrammatical.append(f"no such sentence: {sentence}")
            self._look_for_names(sentence)
            return
        best = min(readings, key=lambda reading: len(reading.faults))
        for table, fault in best.faults:
            (self.hero_faults if table == "hero" else self.plot_faults).append(fault)
        self.rows |= best.rows
        if best.places:
            self.places = best.places
        else:
            self.plot_faults.append(f"out of place: {sentence}")

    def _reading(self, pattern: _Pattern, texts: Sequence[str]) -> _Reading:
        ends = any(beat == _last_beat(plot) for plot, places in pattern.places.items() for beat, _ in places)
        reading = _Reading([], {}, {}, ends)
        for slot, text in zip(pattern.slots, texts, strict=True):
            table = _table_of(slot)
            known = reading.rows.get(table, self.rows[table])
            if left := [row for row in known if row[slot] == text]:
                reading.rows[table] = left
            else:
                was = known[0]["name" if table == "hero" else slot]
                reading.faults.append((table, f"{table} {was} becomes {text}"))
        for plot, place in self.places.items():
            if later := [other for other in pattern.places.get(plot, ()) if other > place]:
                reading.places[plot] = min(later)
        return reading

    def _look_for_names(self, sentence: str) -> None:
        """Recognise the hero in a sentence that the grammar does not have."""
        for name in re.findall(r"[A-Z][a-z]+", sentence):
            named = [row for row in _tables()["hero"] if row["name"] == name]
            left = [row for row in self.rows["hero"] if row["name"] == name]
            if left:
                self.rows["hero"] = left
            elif named:
                self.hero_faults.append(f"hero {self.rows['hero'][0]['name']} becomes {name}")


@functools.cache
def _tables() -> dict[str, Table]:
    """Return the rows of each table in all worlds."""
    tables: dict[str, list[Row]] = {}
    for world in WORLDS:
        for name, table in world.items():
            tables.setdefault(name, []).extend(row for row in table if row not in tables.get(name, ()))
    return {name: tuple(rows) for name, rows in tables.items()}


@functools.cache
def _table_of(slot: str) -> str:
    return next(name for name, table in _tables().items() if slot in table[0])


@functools.cache
def _last_beat(plot: str) -> int:
    return sum(len(paragraph) for paragraph in parse_plot(PLOTS[plot])) - 1


@functools.cache
def _patterns() -> tuple[_Pattern, ...]:
    """Return a pattern for each sentence of each form."""
    places: dict[str, dict[str, list[Place]]] = {}
    for name, plot in PLOTS.items():
        beats = (beat for paragraph in parse_plot(plot) for beat in paragraph)
        for number, beat in enumerate(beats):
            for form in beat.forms:
                for index, sentence in enumerate(_sentences_of(form)):
                    places.setdefault(sentence, {}).setdefault(name, []).append((number, index))
    return tuple(_Pattern(_regex(text), tuple(slots_of(text)), where) for text, where in places.items())


def _sentences_of(form: str) -> list[str]:
    """Return a form's sentences; a first letter put before each slot shows where one begins with a capital."""
    marked = re.sub(r"\{(\w+)\}", lambda slot: _texts(slot[1])[0][0] + slot[0], form)
    return [re.sub(r"\w\{", "{", sentence) for sentence in split_sentences(marked)[0]]


def _texts(slot: str) -> list[str]:
    return sorted({row[slot] for row in _tables()[_table_of(slot)]}, key=lambda text: (-len(text), text))


def _regex(sentence: str) -> re.Pattern[str]:
    """Return an expression with a group for each slot, which matches the texts of its table."""
    parts = re.split(r"\{(\w+)\}", sentence)
    parts[::2] = map(re.escape, parts[::2])
    for index in range(1, len(parts), 2):
        parts[index] = f"({'|'.join(map(re.escape, _texts(parts[index])))})"
    return re.compile("".join(parts))
