"""The plots of the children's stories: sentences with slots, which the words of `databuilder/story_words.py` fill.

A plot is a few paragraphs. In a paragraph a blank line ends a beat; the lines of a beat are its forms, of which a
story takes one; a beat that begins with `?` may be left out.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """The forms of one step of a plot; a story takes one of them, or none if the beat is optional."""

    forms: tuple[str, ...]
    is_optional: bool


def parse_plot(plot: Sequence[str]) -> list[list[Beat]]:
    """Return the beats of each paragraph."""
    return [[_parse_beat(text) for text in paragraph.strip().split("\n\n")] for paragraph in plot]


def _parse_beat(text: str) -> Beat:
    return Beat(tuple(text.removeprefix("?").strip().split("\n")), text.startswith("?"))


def slots_of(form: str) -> list[str]:
    """Return the names of the slots of a form, in order."""
    return [slot for _, slot, _, _ in string.Formatter().parse(form) if slot]


# --- what several plots share --------------------------------------------------------------------------------------

OPENING = """
Once upon a time, there was {a_trait} little {kind} named {name}.
Once upon a time, there was {a_trait} little {kind} named {name} who lived {home}.
Once upon a time, {a_trait} little {kind} named {name} lived {home}.
Once upon a time, there was a {kind} named {name}. {He} was very {trait}.
Once upon a time, there was a {kind} named {name}. Everyone said that {he} was very {trait}.
Once upon a time, there was a {kind} named {name} who lived {home}. {He} was very {trait}.

?
The {trait} little {kind} loved to {hobby}.
Every day, {he} liked to {hobby}.
{name} liked to {hobby} all day long.
"""

COMING = """
Just then, {new_helper} came by.
Soon {new_helper} came along.
{New_helper} saw the {trait} little {kind} and came closer.
{New_helper} heard {him} and came to see.
"""

THANKS = """
"Thank you, {call}!" said {name}.
"Thank you for your help, {call}!" said {name}.
"Thank you, {call}," said {name}, and {he} gave {helper} a big hug.
{name} gave {helper} a big hug. "Thank you, {call}," {he} said.

?
"You are welcome, {name}," said {helper}.
{Helper} smiled. "You are {a_trait} {kind}," {helper_he} said.
"You are {a_trait} {kind}, {name}," said {helper}.
"""

ENDING = """
The {trait} little {kind} smiled all the way home.
{name} went home with a happy heart.
That night, the {trait} little {kind} fell asleep with a smile.
And {name} was the happiest {kind} in the whole world.
And the {trait} little {kind} lived happily ever after.
It was the best day of all for the {trait} little {kind}.
"""

# --- plots ---------------------------------------------------------------------------------------------------------

LOST = (
    OPENING
    + """
{His} best toy was {a_toy}.
{He} had {a_toy}, and {he} took it everywhere.
Most of all, {name} loved {his} {toy}.
Of all {his} toys, the {trait} little {kind} liked the {toy} best.
""",
    """
{Day}, {name} took the {toy} to {place}.
{Day}, {he} went to {place} with {his} {toy}.
{Day}, the {trait} little {kind} played with the {toy} near {place}.

{He} put it down to look at a flower. When {he} turned around, the {toy} was gone.
{He} played until the sun was low. Then {he} saw that the {toy} was gone.
{He} lay down for a short nap. When {he} woke up, the {toy} was gone.

?
{He} looked {search}, but it was not there.
{name} looked {search}, but there was nothing.

"Oh no, where is my {toy}?" cried {name}.
{name} was so sad that {he} began to cry.
The {trait} little {kind} sat down and cried.
A big tear ran down {his} face.
""",
    COMING
    + """
"What is wrong, {name}?" asked {helper}.
"Why are you so sad?" asked {helper}.

"I lost my {toy}," said {name}.
"My {toy} is gone," {he} said.
"I cannot find my {toy}," said {name}.

"Do not worry," said {helper}. "We will look for it together."
"Let us look for it together," said {helper}.
{Helper} smiled and said, "I will help you find it."

They looked and looked, and there was the {toy}, right {spot}!
They looked everywhere. At last, they found the {toy} {spot}.
Soon {name} saw something {spot}. It was the {toy}!

?
"There it is!" shouted {name}.
"We found it!" shouted {name}.
The {trait} little {kind} jumped up and down with joy.
"""
    + THANKS,
    """
?
From that day on, {name} took good care of the {toy}.
{name} learned that it is good to ask for help.
After that, {he} always kept the {toy} close.
"""
    + ENDING,
)

LEARN = (
    OPENING
    + """
More than anything, {he} wanted to {skill}.
{name} had one big wish. {He} wanted to {skill}.
The {trait} little {kind} wanted to learn how to {skill}.
""",
    """
{Day}, {name} tried to {skill} for the first time. But {fail}.
{Day}, {he} tried to {skill} all alone, but {fail}.
{Day}, the {trait} little {kind} tried to {skill}, but {fail}.

?
{He} tried again and again.
{He} tried one more time, but it did not work.

"This is too hard for me," said {name}.
"I will never learn to {skill}," said {name}.
"I cannot do it!" cried {name}.
The {trait} little {kind} felt sad and wanted to stop.
""",
    COMING
    + """
"Do not give up," said {helper}. "{tip}."
"Let me show you how to {skill}," said {helper}. "{tip}."
{Helper} sat down beside {him}. "{tip}," {helper_he} said.

So the {trait} little {kind} tried once more.
{name} nodded and tried again.
{name} took a deep breath and tried again.

?
It was slow at first, but {he} did not stop.
It was hard work, but the {trait} little {kind} did not give up.

This time, {name} {did}!
And then the {trait} little {kind} {did}!
At last, {he} {did}!

?
"I did it!" shouted {name}.
"Look at me!" shouted {name}. "I can {skill}!"
{Helper} laughed and clapped.
"""
    + THANKS,
    """
?
From that day on, {name} loved to {skill}.
{name} learned that it is good to keep trying.
After that, {he} never gave up too soon.
"""
    + ENDING,
)

RESCUE = (
    OPENING,
    """
{Day}, {name} went for a walk to {place}. There {he} saw {a_creature}.
{Day}, {he} walked to {place} and met {a_creature}.
{Day}, the {trait} little {kind} found {a_creature} near {place}.

The {creature} {trouble}.
It {trouble}.

"Please help me, little {kind}," said the {creature}.
"Help!" cried the {creature}. "Please help me!"

"Do not be afraid," said {name}. "I will help you."
The {trait} little {kind} did not run away. {He} wanted to help.
"I will help you," said {name}.

{He} came closer and gently {rescue}.
Very slowly, {name} {rescue}.
The {trait} little {kind} was very careful, and {he} {rescue}.

"Thank you, {name}," said the {creature}. "I will not forget this."
"You saved me, {name}," said the {creature}. "Thank you."
""",
    """
On the way home, a thick fog came. {name} could not see the path.
On the way home, it grew dark. {name} could not find the path.
Then it was late, and {name} did not know the way home.

"I am lost," said {name}.
The {trait} little {kind} called for help.
"Can anyone hear me?" called {name}.

The {creature} heard {him}. "Now I can help you," it said.
But the {creature} came back. "Follow me," it said.
"I will show you the way," said the {creature}.

The {creature} went ahead, and soon {name} was home.
They went home together, and the {trait} little {kind} was not afraid anymore.
Soon {he} could see the lights of home.

"Thank you, little friend!" said {name}.
"You are a good friend," {name} said to the {creature}.
""",
    """
?
From that day on, {name} and the {creature} were best friends.
{name} learned that those who help others are helped too.
After that, {he} met the {creature} every day.
"""
    + """
That night, the {trait} little {kind} fell asleep with a smile.
And {name} was the happiest {kind} in the whole world.
And the {trait} little {kind} lived happily ever after.
It was the best day of all for the {trait} little {kind}.
""",
)

SHARE = (
    OPENING,
    """
{Day}, {helper} gave {name} {a_food}.
{Day}, {name} got {a_food} from {helper}.

It smelled so good.
It looked so good.
The {trait} little {kind} was very hungry.

"I will eat it all," said {name}.
{He} wanted to eat the {food} all alone.
{He} sat down near {place} to eat the {food}.
""",
    """
Then {his} friend {friend} came along.
Then {he} saw {his} friend {friend}.
Soon {he} met a friend named {friend}.

"I am so hungry," said {friend}. "I had no lunch today."
{friend} looked sad. "I have nothing to eat," {friend_he} said.
"What do you have there?" asked {friend}. "I am so hungry."

The {trait} little {kind} thought for a while.
At first, {name} did not want to share.
The {trait} little {kind} saw that {friend} was sad.

"We can share the {food}," said {name}.
"Half of it is for you, {friend}," said {name}.
Then the {trait} little {kind} gave half of the {food} to {friend}.

They sat under a tree and ate the {food} together.
They ate the {food} together, and it was very good.
So the two friends ate the {food} and laughed.

"Thank you, {name}," said {friend}. "You are {a_trait} {kind}."
"Thank you for the {food}, {name}," said {friend}.
"You are a good friend, {name}," said {friend}.

?
The next day, {friend} gave {name} {a_toy}. "This is for you," {friend_he} said.
The next day, {friend} came back with {a_toy} for {name}.
""",
    """
?
{name} learned that it is good to share.
From that day on, {name} and {friend} shared everything.
After that, {name} and {friend} were best friends.
"""
    + ENDING,
)

GIFT = (
    OPENING,
    """
{Day}, the {trait} little {kind} remembered the birthday of {helper}.
{Day}, it was the birthday of {helper}.

{name} wanted to give {helper} a gift, but {he} had no money.
{name} had nothing to give, but {he} wanted to make {helper} happy.
"I have no gift for {helper}," said {name}.

?
The {trait} little {kind} thought and thought.
{He} felt sad and did not know what to do.
""",
    """
{His} friend {friend} knew what to do. "You can make {a_gift}," said {friend}.
"You can make {a_gift}," said {his} friend {friend}. "I will help you."
Then {he} asked {his} friend {friend}. "Let us make {a_gift}," said {friend}.

So they looked for {stuff}.
They went to {place} and found {stuff}.
{friend} had some {stuff}, and they went to work.

?
It was hard work, but the {trait} little {kind} did not stop.
They worked all day and sang a song.

Soon the {gift} was ready.
At last, the {gift} was ready, and it looked very nice.

"Happy birthday, {call}!" said {name}. "I made {a_gift} for you."
"This {gift} is for you, {call}," said {name}.
The {trait} little {kind} ran to {helper}. "Happy birthday!" {he} said.

"This is the best gift of all," said {helper}.
{Helper} was so happy. "I love the {gift}," {helper_he} said.
{Helper} gave {name} a big hug. "You are {a_trait} {kind}," {helper_he} said.

"Thank you for your help, {friend}," said {name}.
Then {name} thanked {friend} for the help.
""",
    """
?
{name} learned that a gift made with love is the best gift.
From that day on, {helper} kept the {gift} close.
After that, {name} and {friend} made many more gifts.
"""
    + ENDING,
)

FEAR = (
    OPENING
    + """
But {name} was afraid of {fear}.
There was only one thing that {name} did not like, and it was {fear}.
""",
    """
One night, {name} could not sleep. {Night}.
One night, {night}, and {name} could not sleep.
One night, {name} woke up. {Night}.

The {trait} little {kind} hid under the blanket.
The {trait} little {kind} closed {his} eyes and did not move.
{He} began to cry.

?
"Please go away," said {name}.
{He} did not want to be alone.
""",
    """
{New_helper} heard {him} and came to see.
{New_helper} came and sat down beside {him}.
Just then, {new_helper} came by.

"What is wrong, {name}?" asked {helper}.
"Why are you not asleep?" asked {helper}.

"I am afraid of {fear}," said {name}.
"I do not like {fear}," said {name}. "I am afraid."

"Do not worry," said {helper}. "{truth}."
"{truth}," said {helper}. "You are safe here."
{Helper} smiled. "{truth}," {helper_he} said.

{name} listened for a while. Then {he} smiled.
{name} looked again and began to laugh.
The {trait} little {kind} took a deep breath and felt better.

?
{Helper} sang a soft song for {him}.
{Helper} stayed until {he} was not afraid anymore.
"""
    + THANKS,
    """
?
From that day on, {name} was not afraid of {fear} anymore.
{name} learned that it is good to talk about a fear.
After that, {he} even liked {fear} a little.

Then the {trait} little {kind} fell asleep with a smile.
And the {trait} little {kind} slept until the morning.
And {name} had a very good dream.
And {name} was the happiest {kind} in the whole world.
And the {trait} little {kind} lived happily ever after.
""",
)

QUEST = (
    OPENING
    + """
More than anything, {he} wanted to see {sight}.
{name} had one big dream. {He} wanted to see {sight}.
The {trait} little {kind} had heard about {sight} and wanted to see it.
""",
    """
{Day}, {name} set out to find {sight}.
{Day}, {he} packed a small bag and set out.
{Day}, the {trait} little {kind} said goodbye and went on a long walk.

Soon {he} came to {a_barrier}.
After a while, {name} came to {a_barrier}.
But then there was {a_barrier} in the way.

"How can I get past this {barrier}?" asked {name}.
"I will never see {sight}," said {name}.
{name} did not know what to do.
The {trait} little {kind} felt very small and sad.
""",
    COMING
    + """
"Where do you want to go, {name}?" asked {helper}.
"What is wrong, {name}?" asked {helper}.

"I want to see {sight}," said {name}.
"I want to see {sight}, but I cannot get past the {barrier}," {he} said.

"I will go with you," said {helper}. "{plan}."
"{plan}," said {helper}.
{Helper} smiled. "{plan}," {helper_he} said.

So they went on together, and soon the {barrier} was far behind them.
It was not easy, but they did it together.
They went slowly, and the {trait} little {kind} was not afraid.

At last, the {trait} little {kind} saw {sight}, and {view}!
And there was {sight}! {View}.

?
"It is so beautiful!" said {name}.
The {trait} little {kind} was so happy that {he} danced.
"My dream came true!" shouted {name}.
"""
    + THANKS,
    """
?
{name} learned that a dream can come true with a little help.
From that day on, {name} told everyone about {sight}.
After that, {he} often dreamed of {sight}.
"""
    + ENDING,
)

PLOTS: dict[str, tuple[str, ...]] = {
    "lost": LOST,
    "learn": LEARN,
    "rescue": RESCUE,
    "share": SHARE,
    "gift": GIFT,
    "fear": FEAR,
    "quest": QUEST,
}
