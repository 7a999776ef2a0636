"""The words of the children's stories: a table for each thing that a story chooses, such as its hero or a toy.

A table's first line names its slots, and each other line is a row, of which a story takes one: its texts fill the
slots of the same names in `databuilder/story_plots.py`. Where a table has `a_toy`, `{a_toy}` has an article and `{toy}`
has none. `{Name}` is `{name}` with a capital.
"""

from __future__ import annotations

Row = dict[str, str]
Table = tuple[Row, ...]

_VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "hon")  # an honest boy


def _table(slots: str, *lines: str) -> Table:
    """Return a row of texts by slot for each line."""
    names = slots.split(" | ")
    return tuple(_row(dict(zip(names, line.split(" | "), strict=True))) for line in lines)


def _row(texts: Row) -> Row:
    """Return a row with its forms without an article and with a capital."""
    row = {}
    for slot, text in texts.items():
        if slot.startswith("a_"):
            row[slot.removeprefix("a_")] = text
            text = f"{'an' if text.startswith(_VOWEL_SOUNDS) else 'a'} {text}"
        row[slot] = text
    return row | {slot.capitalize(): text[0].upper() + text[1:] for slot, text in row.items()}


# --- words ---------------------------------------------------------------------------------------------------------

_HERO = "kind | name | he | him | his"
_HELPER = "helper | new_helper | call | helper_he"

EVERYWHERE: dict[str, Table] = {
    "trait": _table("a_trait", "kind", "brave", "clever", "gentle", "cheerful", "honest"),
    "day": _table(
        "day", "one day", "one sunny morning", "one warm afternoon", "one spring morning", "early one morning"
    ),
    "hobby": _table(
        "hobby", "run and jump", "pick flowers", "watch the clouds", "tell stories", "count the stars", "climb the hill"
    ),
    "friend": _table("friend | friend_he", "Kim | she", "Dan | he", "Nora | she", "Paul | he", "Ella | she"),
    "toy": _table(
        "a_toy", "red ball", "blue kite", "yellow truck", "silver bell", "teddy bear", "orange drum", "wooden horse"
    ),
    "search": _table("search", "behind the big rock", "in the tall grass", "around the old stump", "near the gate"),
    "spot": _table("spot", "under a bush", "next to a log", "beside the path", "behind a tree"),
    "creature": _table(
        "a_creature | trouble | rescue",
        "little bird | had fallen out of its nest | put it back into the nest",
        "little turtle | was lying on its back | turned it over",
        "gray goose | had a thorn in its foot | pulled the thorn out",
        "green frog | was stuck under a branch | lifted the branch",
        "yellow butterfly | was caught in a web | opened the web",
        "tiny bee | had fallen into the water | lifted it out with a leaf",
    ),
    "food": _table("a_food", "red apple", "warm pie", "sweet cake", "loaf of bread", "bowl of berries", "orange"),
    "gift": _table(
        "a_gift | stuff",
        "flower crown | yellow flowers",
        "berry necklace | red berries",
        "straw hat | dry straw",
        "shell chain | white shells",
        "wooden spoon | soft wood",
    ),
    "fear": _table(
        "fear | night | truth",
        "the dark | the moon was behind the clouds | The dark is only the blanket of the sun",
        "the thunder | there was a loud storm | The thunder is only the drum of the clouds",
        "the wind | the wind was very loud | The wind is only singing to the trees",
        "the shadows | long shadows moved on the wall | The shadows are only the trees dancing",
    ),
    "sight": _table(
        "sight | view",
        "the sea | the waves danced in the sun",
        "the waterfall | the water shone like silver",
        "the snow on the mountain | the snow shone like sugar",
        "the field of flowers | the flowers were red and blue and gold",
    ),
    "barrier": _table(
        "a_barrier | plan",
        "wide river | We can cross it on the flat stones",
        "steep hill | We can climb it one step at a time",
        "thick fog | We can walk behind my little lamp",
        "muddy field | We can lay branches on the mud",
        "dark forest | We can follow the white stones",
    ),
}

CHILD: dict[str, Table] = {
    "hero": _table(
        _HERO,
        "boy | Tom | he | him | his",
        "boy | Ben | he | him | his",
        "boy | Max | he | him | his",
        "boy | Sam | he | him | his",
        "boy | Leo | he | him | his",
        "boy | Jack | he | him | his",
        "boy | Tim | he | him | his",
        "boy | Noah | he | him | his",
        "girl | Lily | she | her | her",
        "girl | Mia | she | her | her",
        "girl | Anna | she | her | her",
        "girl | Sue | she | her | her",
        "girl | Lucy | she | her | her",
        "girl | Emma | she | her | her",
        "girl | Rose | she | her | her",
        "girl | Zoe | she | her | her",
    ),
    "home": _table(
        "home", "in a small house", "in a blue house on a hill", "on a quiet farm", "in a little town", "by the sea"
    ),
    "place": _table("place", "the park", "the beach", "the garden", "the playground", "the field"),
    "helper": _table(
        _HELPER,
        "Mom | Mom | Mom | she",
        "Dad | Dad | Dad | he",
        "Grandma | Grandma | Grandma | she",
        "Grandpa | Grandpa | Grandpa | he",
    ),
    "skill": _table(
        "skill | fail | tip | did",
        "swim | the water was too deep | Kick with your feet and look ahead | swam across the pond",
        "whistle | no sound came out | Make your lips round and blow | whistled a happy tune",
        "bake a cake | the cake came out flat | Stir it slowly and count to ten | baked a big cake",
        "ride a bike | the bike fell over | Look ahead and do not stop | rode the bike down the path",
        "paint a picture | the colors ran together | Let the first color dry | painted a bright picture",
        "fly a kite | the kite fell down | Wait for the wind and then run | made the kite fly high",
        "build a boat | the boat fell apart | Tie it with a strong rope | built a strong boat",
    ),
}

ANIMAL: dict[str, Table] = {
    "hero": _table(
        _HERO,
        "rabbit | Pip | he | him | his",
        "rabbit | Coco | she | her | her",
        "bear | Bobo | he | him | his",
        "bear | Honey | she | her | her",
        "mouse | Finn | he | him | his",
        "mouse | Dot | she | her | her",
        "fox | Rusty | he | him | his",
        "fox | Ruby | she | her | her",
        "squirrel | Nutty | he | him | his",
        "squirrel | Hazel | she | her | her",
        "hedgehog | Spike | he | him | his",
        "hedgehog | Daisy | she | her | her",
    ),
    "home": _table(
        "home", "in the green forest", "under a tall tree", "near a quiet pond", "in a warm den", "on a grassy hill"
    ),
    "place": _table("place", "the meadow", "the pond", "the stream", "the clearing", "the old bridge"),
    "helper": _table(
        _HELPER,
        "the old owl | an old owl | dear owl | he",
        "the wise goat | a wise goat | dear goat | she",
        "the big donkey | a big donkey | dear donkey | he",
        "the white swan | a white swan | dear swan | she",
    ),
    "skill": CHILD["skill"][:3] + CHILD["skill"][4:],  # a mouse does not ride a bike
}

WORLDS: tuple[dict[str, Table], ...] = (EVERYWHERE | CHILD, EVERYWHERE | ANIMAL)
