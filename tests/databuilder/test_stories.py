"""Stories have a child's words, are the same for a seed, never repeat, and are in a file like any corpus."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from pathlib import Path

import pytest

from databuilder import stories
from databuilder.stories import PROMPTS, check_story, count_stories, read_stories, tell_stories, write_corpus
from databuilder.story_plots import PLOTS, parse_plot, slots_of
from databuilder.story_words import WORLDS

EOT = "<|endoftext|>"


def told(number: int, *, seed: int = 0) -> list[str]:
    """Return the first stories of a seed."""
    return list(itertools.islice(tell_stories(seed=seed), number))


def test_the_same_seed_tells_the_same_stories() -> None:
    """A seed is a text, to the byte, on every machine and Python; another seed is another text."""
    text = "".join(told(500))
    assert "".join(told(500)) == text
    assert "".join(told(500, seed=1)) != text
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8283278693f959cc"


def test_the_page_shows_the_first_story() -> None:
    """The story in docs/usage.md is the first that seed 0 tells."""
    page = (Path(__file__).parents[2] / "docs/usage.md").read_text(encoding="utf-8")
    assert f"```text\n{told(1)[0]}\n```" in page


def test_there_are_more_than_a_million_stories() -> None:
    """The grammar counts many more, and none of 20,000 appears twice."""
    assert count_stories() > 10**17
    assert len(set(told(20_000))) == 20_000


def test_the_count_counts_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plot of two forms, an optional beat and four rows, as many stories are told as are counted."""
    worlds = ({"toy": ({"toy": "ball"}, {"toy": "kite"})}, {"toy": ({"toy": "hat"}, {"toy": "bell"})})
    monkeypatch.setattr(stories, "WORLDS", worlds)
    monkeypatch.setattr(stories, "PLOTS", {"lost": ("A {toy}.\nOne {toy}.\n\n?\nIt fell.", "The end.")})
    assert count_stories() == len(set(told(500))) == 16


def test_stories_have_the_length_and_the_words_for_a_small_model() -> None:
    """Stories have 60 to 220 words, about 130 on average, from fewer than 700; most words are short."""
    texts = told(2_000)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 60
    assert max(lengths) <= 220
    assert 110 <= sum(lengths) / len(lengths) <= 150
    words = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    assert len(words) < 700
    assert sum(map(len, words)) / len(words) < 6


def test_articles_fit_the_words_after_them() -> None:
    """It is an orange and an honest boy, but a brave one."""
    text = " ".join(told(2_000)).lower()
    assert set(re.findall(r"\ban (\w+)", text)) >= {"orange", "honest", "old"}
    assert not re.search(r"\ba (?:[aeio]|honest)", text)
    assert not re.search(r"\ban (?!honest)[^aeio]", text)


@pytest.mark.parametrize("name", PLOTS)
def test_each_slot_of_a_plot_is_filled_in_each_world(name: str) -> None:
    """Every slot has exactly one table, and no text has a brace, a separator or a letter outside ASCII."""
    beats = itertools.chain(*parse_plot(PLOTS[name]))
    for slot in {slot for beat in beats for form in beat.forms for slot in slots_of(form)}:
        for world in WORLDS:
            tables = [table for table in world.values() if slot in table[0]]
            assert len(tables) == 1, slot
            assert all(re.fullmatch(r"[A-Za-z ]+", row[slot]) for row in tables[0]), slot


def test_no_two_forms_of_a_beat_are_alike() -> None:
    """Each form occurs once, so that a count of forms is a count of texts."""
    for plot in PLOTS.values():
        for beat in itertools.chain(*parse_plot(plot)):
            assert len(set(beat.forms)) == len(beat.forms) > 0


def test_stories_begin_as_the_prompts_do() -> None:
    """Each prompt is the unfinished beginning of some stories."""
    texts = told(3_000)
    for prompt in PROMPTS:
        assert any(text.startswith(prompt + " ") for text in texts), prompt


def test_a_corpus_file_ends_each_story_with_a_separator_line(tmp_path: Path) -> None:
    """The file is stories, each followed by a line with the separator, within its bound; the report counts them."""
    report = write_corpus(tmp_path / "deep/stories.txt", max_bytes=50_000, seed=3)
    text = (tmp_path / "deep/stories.txt").read_text(encoding="utf-8")
    assert text.split(f"\n{EOT}\n")[:-1] == told(report.documents, seed=3)
    assert text.endswith(f"\n{EOT}\n")
    assert (report.bytes, 48_000 < report.bytes <= 50_000) == (len(text), True)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["stories.txt"]


def test_a_bound_below_one_story_is_an_error(tmp_path: Path) -> None:
    """Without any story there is an error, not an empty corpus, and nothing is left behind."""
    with pytest.raises(ValueError, match="expected room for at least one story"):
        write_corpus(tmp_path / "deep/stories.txt", max_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_the_module_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m databuilder.stories FILE` writes stories, and `--check FILE` prints their shares and faults."""
    path = str(tmp_path / "stories.txt")
    stories.main([path, "--max-bytes", "9000", "--seed", "5"])
    written = capsys.readouterr()
    assert "stories" in written.err
    assert written.out == ""
    stories.main(["--check", path, "--known", path])
    number = len(read_stories(path))
    assert capsys.readouterr().out == (
        f"{number} stories: 100% keep the hero, 100% are grammatical, 100% do both, 100% are without fault, "
        "0% are new\n"
    )


def test_texts_of_the_infer_command_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON lines have a text, or a prompt and an output that belong together; `-` is stdin; faults are counted."""
    story = told(1)[0]
    lines = [
        {"text": story},
        {"event": "sample", "text.prompt": story[:20], "text.output": f"{story[20:]}\n{EOT}"},
        {"text": "Tom. " * 20},
        {"text.prompt": "", "text.output": ""},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, lines)) + "\n\n"))
    stories.main(["--check", "-"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("4 stories: 75% keep the hero, 50% are grammatical")
    assert out[1:] == [
        "story 3: no such sentence: Tom.",
        "story 3: ends in the middle",
        "story 4: ends in the middle",
    ]
    assert check_story(story).faults == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": 1}', 'line 2: expected "text", or "text.prompt" and "text.output", found content'),
        ('{"text": 1}', "found text"),
        ("[1]", r"found \[1\]"),
        ('{"text": "cut', "line 2: expected a JSON object, found Unterminated"),
    ],
)
def test_a_line_without_a_text_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    """The error names the file, the line, and what was found in it."""
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"odd.jsonl: .*{message}"):
        read_stories(tmp_path / "odd.jsonl")


@pytest.mark.parametrize("content", ["", f"{EOT}\n{EOT}\n"])
def test_a_file_without_stories_is_an_error(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A check without a file, or of a missing one, is refused in one line."""
    (tmp_path / "none.txt").write_text(content)
    (tmp_path / "odd.txt").write_bytes(b"Tom \xff")
    for path, words in (
        (tmp_path / "none.txt", "none.txt: expected stories, found none"),
        (tmp_path / "no", "No such file"),
        (tmp_path / "odd.txt", "odd.txt: expected stories in UTF-8, found the byte 0xff after 4 others"),
    ):
        with pytest.raises(SystemExit, match="2"):
            stories.main(["--check", str(path)])
        assert words in capsys.readouterr().err
