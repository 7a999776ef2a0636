"""Learning merges, compiled: `pair_table.py` over arrays, with the same merges in the same order.

All words are in one row of slots, a slot a byte; a token's id is in its first and its last slot. `places` holds the
places of each pair's left token, those of one pair together; a pair's places are written once, when the merge that
makes one of its tokens is done, in the order of the text. Three numbers a slot are always enough for them: the first
pairs have a place a byte, and each merge, which takes one token away, makes two new places at most. `weights` says of
each slot how often its word occurs, in 32 bits; where that is too little, it says which word it is (see `weight_at`).

**The queue.** Counts of known pairs only fall, and no new pair is more frequent than the one whose merge made it. So
the pairs wait in a list for each count (`heads`, `following`), and only those of the count that is being used up are in
a heap, ordered by their bytes. A pair whose count has fallen since is put into its new list when it comes up. Counts
from `LISTED_COUNTS` on, which few pairs have, share the heap from the beginning.

The rules of `encode_kernels.py` hold here too. Arrays that belong together come as one named tuple (`Text`, `Pairs`,
`Queue`, `Tokens`); the others are

    facts    int64 (6,)                     the numbers that change: NUM_TOKENS, NUM_PAIRS, ...
    sides    int64 (tokens, SIDE_COLUMNS)   what was beside the places of the present merge, by token
    touched  int32 (tokens,)                the tokens that have a row in `sides` now
    merges   int32 (tokens, 2)              what each token is made of: the ids of its left and right part

Part of: learner
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array
from transformerlm.tokenizer.fast.jit import helper, kernel

LISTED_COUNTS = 1 << 16
BETWEEN_WORDS, INSIDE_TOKEN, NONE = -1, -2, -1
DONE, NO_PAIR_LEFT, NEED_PAIRS, NEED_BYTES = 0, 1, 2, 3

# Places in `facts`.
NUM_TOKENS, NUM_PAIRS, NUM_PLACES, HEAP_SIZE, LEVEL, NUM_BYTES = 0, 1, 2, 3, 4, 5
# Columns of `pairs`, one row for each pair; KEY is both its ids as one number.
KEY, COUNT, FIRST_PLACE, PAIR_PLACES, PAIR_COLUMNS = 0, 1, 2, 3, 4
# Columns of `tokens`: its bytes are `spelled[START : START + LENGTH]`, its first seven of them PREFIX as a number.
START, LENGTH, PREFIX, TOKEN_COLUMNS = 0, 1, 2, 3
# Columns of `sides`: sums for each token that is left or right of the present merge's places.
LEFT_COUNT, LEFT_PLACES, RIGHT_COUNT, RIGHT_PLACES, SIDE_COLUMNS = 0, 1, 2, 3, 4

_KEY_MASK = (1 << 32) - 1
_LARGEST_WEIGHT = (1 << 31) - 1
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Text(NamedTuple):
    """The distinct words in one row of slots, a slot a byte, one more between two words."""

    slots: Array  # int32 (slots,): the id of the token that begins or ends here, `INSIDE_TOKEN` or `BETWEEN_WORDS`
    weights: Array  # int32 (slots,): how often the slot's word occurs; below 0 see `weight_at`
    word_counts: Array  # int64 (words,): the same for each word, where 32 bits are too few
    places: Array  # int32 (3 * slots,): where the left token of a pair begins; the places of one pair are together


class Pairs(NamedTuple):
    """All pairs that were ever met, and where each is found by its key."""

    rows: Array  # int64 (room, PAIR_COLUMNS): KEY, COUNT, FIRST_PLACE, PAIR_PLACES of each
    index: Array  # int32 (2 * room,): open addressing, a pair's number or `NONE`
    shift: Any  # uint64: by how much the hash of a key is shifted to give its place in the index


class Queue(NamedTuple):
    """The pairs that wait for their turn; see above."""

    counts: Array  # int64 (room,): the counts of the pairs in the heap, when they were put there
    heap: Array  # int32 (room,): their numbers, the first to be merged on top
    heads: Array  # int32 (LISTED_COUNTS,): for each count the first pair of its list, or `NONE`
    following: Array  # int32 (room,): the pair that comes after each in its list


class Tokens(NamedTuple):
    """All tokens: bytes, then merges."""

    rows: Array  # int64 (tokens, TOKEN_COLUMNS): START, LENGTH, PREFIX of each
    spelled: Array  # uint8: the bytes of all tokens, one after the other


@helper
def key_of(left: int, right: int) -> int:
    """Return a pair of ids as one number."""
    return np.int64(left) << 32 | right


@helper
def find_key(pairs: Pairs, key: int) -> int:
    """Return where in the index a pair's number is, or the free place where it belongs."""
    place = np.int64(np.uint64(key) * _MIX >> pairs.shift)
    while pairs.index[place] != NONE and pairs.rows[pairs.index[place], KEY] != key:
        place += 1
        if place == pairs.index.size:
            place = 0
    return place


@kernel
def index_pairs(pairs: Pairs, number: int) -> None:
    """Fill an index of the pairs that is empty (`NONE`)."""
    for pair in range(number):
        pairs.index[find_key(pairs, pairs.rows[pair, KEY])] = pair


@kernel
def add_pair(pairs: Pairs, facts: Array, key: int, count: int) -> int:
    """Enter a new pair, its places still none, and return its number."""
    pair = facts[NUM_PAIRS]
    facts[NUM_PAIRS] = pair + 1
    pairs.rows[pair, KEY], pairs.rows[pair, COUNT] = key, count
    pairs.rows[pair, FIRST_PLACE], pairs.rows[pair, PAIR_PLACES] = facts[NUM_PLACES], 0
    pairs.index[find_key(pairs, key)] = pair
    return pair


@kernel
def lay_out(data: Array, ends: Array, word_counts: Array, slots: Array, weights: Array) -> None:
    """Write the bytes of all words into slots, one between two words, and each word's weight beside its bytes."""
    place, start = 0, 0
    slots[0] = BETWEEN_WORDS
    for word in range(ends.size):
        weight = word_counts[word] if word_counts[word] <= _LARGEST_WEIGHT else ~word
        for offset in range(start, ends[word]):
            place += 1
            slots[place] = data[offset]
            weights[place] = weight
        place += 1
        slots[place] = BETWEEN_WORDS
        start = ends[word]


@helper
def weight_at(text: Text, place: int) -> int:
    """Return how often the word at a place occurs: its weight, or, below 0, the count of the word that it names."""
    weight = np.int64(text.weights[place])
    return weight if weight >= 0 else text.word_counts[~weight]


@kernel
def find_byte_pairs(text: Text, pairs: Pairs, facts: Array, pair_of: Array) -> None:
    """Enter all pairs of bytes with their counts and places; `pair_of` has a `NONE` for each of them."""
    for place in range(1, text.slots.size - 1):
        if text.slots[place] >= 0 and text.slots[place + 1] >= 0:
            number = text.slots[place] << 8 | text.slots[place + 1]
            if pair_of[number] == NONE:
                pair_of[number] = add_pair(pairs, facts, key_of(text.slots[place], text.slots[place + 1]), 0)
            pairs.rows[pair_of[number], COUNT] += weight_at(text, place)
            pairs.rows[pair_of[number], PAIR_PLACES] += 1
    for pair in range(facts[NUM_PAIRS]):
        pairs.rows[pair, FIRST_PLACE] = facts[NUM_PLACES]
        facts[NUM_PLACES] += pairs.rows[pair, PAIR_PLACES]
        pairs.rows[pair, PAIR_PLACES] = 0
    for place in range(1, text.slots.size - 1):
        if text.slots[place] >= 0 and text.slots[place + 1] >= 0:
            add_place(pairs, pair_of[text.slots[place] << 8 | text.slots[place + 1]], text, place)


@helper
def add_place(pairs: Pairs, pair: int, text: Text, place: int) -> None:
    """Write one more place of a pair."""
    text.places[pairs.rows[pair, FIRST_PLACE] + pairs.rows[pair, PAIR_PLACES]] = place
    pairs.rows[pair, PAIR_PLACES] += 1


# ---- The order of pairs -----------------------------------------------------------------------------------------


@kernel
def compare_tokens(left: int, right: int, tokens: Tokens) -> int:
    """Return below 0, 0 or above 0 as the first token's bytes are less than, equal to or greater than the other's."""
    if left == right:
        return 0
    if tokens.rows[left, PREFIX] != tokens.rows[right, PREFIX]:
        return -1 if tokens.rows[left, PREFIX] < tokens.rows[right, PREFIX] else 1
    for offset in range(min(tokens.rows[left, LENGTH], tokens.rows[right, LENGTH])):
        difference = np.int64(tokens.spelled[tokens.rows[left, START] + offset]) - np.int64(
            tokens.spelled[tokens.rows[right, START] + offset]
        )
        if difference != 0:
            return difference
    return tokens.rows[left, LENGTH] - tokens.rows[right, LENGTH]


@kernel
def comes_before(queue: Queue, one: int, other: int, pairs: Pairs, tokens: Tokens) -> bool:
    """Return whether one pair in the heap comes before another: by the higher count, then by the greater bytes."""
    if queue.counts[one] != queue.counts[other]:
        return queue.counts[one] > queue.counts[other]
    key, other_key = pairs.rows[queue.heap[one], KEY], pairs.rows[queue.heap[other], KEY]
    order = compare_tokens(key >> 32, other_key >> 32, tokens)
    if order == 0:
        order = compare_tokens(key & _KEY_MASK, other_key & _KEY_MASK, tokens)
    return order > 0


@helper
def swap(queue: Queue, one: int, other: int) -> None:
    """Exchange two entries of the heap."""
    queue.counts[one], queue.counts[other] = queue.counts[other], queue.counts[one]
    queue.heap[one], queue.heap[other] = queue.heap[other], queue.heap[one]


@kernel
def wait(pair: int, queue: Queue, pairs: Pairs, tokens: Tokens, facts: Array) -> None:
    """Put a pair where it waits for its turn: into the heap, or into the list of its count."""
    count = pairs.rows[pair, COUNT]
    if count < facts[LEVEL]:
        queue.following[pair] = queue.heads[count]
        queue.heads[count] = pair
        return
    place = facts[HEAP_SIZE]
    facts[HEAP_SIZE] = place + 1
    queue.counts[place], queue.heap[place] = count, pair
    while place > 0 and comes_before(queue, place, (place - 1) // 2, pairs, tokens):
        swap(queue, place, (place - 1) // 2)
        place = (place - 1) // 2


@kernel
def wait_from(first: int, queue: Queue, pairs: Pairs, tokens: Tokens, facts: Array) -> None:
    """Let all pairs from one on wait."""
    for pair in range(first, facts[NUM_PAIRS]):
        wait(pair, queue, pairs, tokens, facts)


@kernel
def take_top(queue: Queue, pairs: Pairs, tokens: Tokens, facts: Array) -> None:
    """Take the first pair out of the heap."""
    size = facts[HEAP_SIZE] - 1
    facts[HEAP_SIZE] = size
    queue.counts[0], queue.heap[0] = queue.counts[size], queue.heap[size]
    place, child = 0, 1
    while child < size:
        if child + 1 < size and comes_before(queue, child + 1, child, pairs, tokens):
            child += 1
        if not comes_before(queue, child, place, pairs, tokens):
            break
        swap(queue, place, child)
        place, child = child, 2 * child + 1


@kernel
def next_pair(queue: Queue, pairs: Pairs, tokens: Tokens, facts: Array) -> int:
    """Return the pair to merge next, `NONE` if no pair is left."""
    while True:
        while facts[HEAP_SIZE] == 0:
            if facts[LEVEL] <= 1:
                return NONE
            facts[LEVEL] -= 1
            pair = queue.heads[facts[LEVEL]]
            queue.heads[facts[LEVEL]] = NONE
            while pair != NONE:
                then = queue.following[pair]
                if pairs.rows[pair, COUNT] > 0:
                    wait(pair, queue, pairs, tokens, facts)
                pair = then
        pair, count = queue.heap[0], queue.counts[0]
        take_top(queue, pairs, tokens, facts)
        if pairs.rows[pair, COUNT] == count:
            return pair
        if pairs.rows[pair, COUNT] > 0:
            wait(pair, queue, pairs, tokens, facts)


# ---- Tokens -----------------------------------------------------------------------------------------------------


@kernel
def add_token(left: int, right: int, tokens: Tokens, facts: Array) -> int:
    """Enter the token that two others make and return its id."""
    token, start = facts[NUM_TOKENS], facts[NUM_BYTES]
    length = 0
    for part in (left, right):
        for offset in range(tokens.rows[part, LENGTH]):
            tokens.spelled[start + length] = tokens.spelled[tokens.rows[part, START] + offset]
            length += 1
    prefix = 0
    for offset in range(7):  # seven bytes fit a signed number
        prefix = prefix << 8 | (np.int64(tokens.spelled[start + offset]) if offset < length else 0)
    tokens.rows[token, START], tokens.rows[token, LENGTH], tokens.rows[token, PREFIX] = start, length, prefix
    facts[NUM_TOKENS], facts[NUM_BYTES] = token + 1, start + length
    return token


# ---- Merging ----------------------------------------------------------------------------------------------------


@kernel
def merge_places(pair: int, new: int, text: Text, pairs: Pairs, tokens: Tokens, sides: Array, touched: Array) -> int:
    """Replace the pair by its new token wherever it is, and sum up what was beside it.

    Writes the tokens that were beside it into `touched` (their number is returned), and the merged places over the
    pair's old ones.
    """
    left, right = pairs.rows[pair, KEY] >> 32, pairs.rows[pair, KEY] & _KEY_MASK
    left_length, new_length = tokens.rows[left, LENGTH], tokens.rows[new, LENGTH]
    first = pairs.rows[pair, FIRST_PLACE]
    number, merged = 0, 0
    for entry in range(first, first + pairs.rows[pair, PAIR_PLACES]):
        start = text.places[entry]
        middle, end = start + left_length, start + new_length
        if text.slots[start] != left or text.slots[middle] != right:
            continue  # out of date: in "aaa" the first merge takes the second pair's left token
        weight = weight_at(text, start)
        before, after = text.slots[start - 1], text.slots[end]
        if before >= 0:
            if sides[before, LEFT_PLACES] + sides[before, RIGHT_PLACES] == 0:
                touched[number] = before
                number += 1
            sides[before, LEFT_COUNT] += weight
            sides[before, LEFT_PLACES] += 1
        if after >= 0:
            if sides[after, LEFT_PLACES] + sides[after, RIGHT_PLACES] == 0:
                touched[number] = after
                number += 1
            sides[after, RIGHT_COUNT] += weight
            sides[after, RIGHT_PLACES] += 1
        text.slots[middle - 1], text.slots[middle] = INSIDE_TOKEN, INSIDE_TOKEN
        text.slots[start], text.slots[end - 1] = new, new
        text.places[first + merged] = start
        merged += 1
    pairs.rows[pair, PAIR_PLACES] = merged
    return number


@kernel
def update_pairs(
    left: int, right: int, new: int, number: int, pairs: Pairs, sides: Array, touched: Array, facts: Array
) -> None:
    """Take what the merge has used up from the old pairs' counts, and enter the new pairs.

    In "abab" the second merge finds the first one's token on its left: the pair of the new token and `left`, which the
    first merge saw, did not last. `passing` is how often that happened.
    """
    passing = sides[new, LEFT_COUNT]
    for entry in range(number):
        token = touched[entry]
        if sides[token, LEFT_PLACES] > 0:
            if token != new:
                pairs.rows[pairs.index[find_key(pairs, key_of(token, left))], COUNT] -= sides[token, LEFT_COUNT]
            count, room = sides[token, LEFT_COUNT], sides[token, LEFT_PLACES]
            sides[token, LEFT_COUNT] = NONE  # from here on the number of the new pair, if there is one
            if count > 0:
                sides[token, LEFT_COUNT] = add_pair(pairs, facts, key_of(token, new), count)
                facts[NUM_PLACES] += room
        if sides[token, RIGHT_PLACES] > 0:
            count, room = sides[token, RIGHT_COUNT], sides[token, RIGHT_PLACES]
            pairs.rows[pairs.index[find_key(pairs, key_of(right, token))], COUNT] -= count
            if token == left:  # "abab": this right neighbour was merged itself
                count -= passing
            sides[token, RIGHT_COUNT] = NONE
            if count > 0:
                sides[token, RIGHT_COUNT] = add_pair(pairs, facts, key_of(new, token), count)
                facts[NUM_PLACES] += room


@kernel
def write_places(pair: int, new: int, text: Text, pairs: Pairs, tokens: Tokens, sides: Array) -> None:
    """Write the places of the new pairs, whose numbers `update_pairs` has put into `sides`."""
    first = pairs.rows[pair, FIRST_PLACE]
    for entry in range(first, first + pairs.rows[pair, PAIR_PLACES]):
        start = text.places[entry]
        before, after = text.slots[start - 1], text.slots[start + tokens.rows[new, LENGTH]]
        if before >= 0 and sides[before, LEFT_COUNT] >= 0 and sides[before, LEFT_PLACES] > 0:
            add_place(pairs, sides[before, LEFT_COUNT], text, start - tokens.rows[before, LENGTH])
        if after >= 0 and after != new and sides[after, RIGHT_COUNT] >= 0 and sides[after, RIGHT_PLACES] > 0:
            add_place(pairs, sides[after, RIGHT_COUNT], text, start)


@helper
def room_to_merge(pair: int, left: int, right: int, pairs: Pairs, tokens: Tokens, facts: Array) -> int:
    """Return what a merge may lack: nothing (`DONE`), room for new pairs, two a place or a token at most, or bytes."""
    if facts[NUM_PAIRS] + 2 * min(pairs.rows[pair, PAIR_PLACES], facts[NUM_TOKENS] + 1) > pairs.rows.shape[0]:
        return NEED_PAIRS
    if facts[NUM_BYTES] + tokens.rows[left, LENGTH] + tokens.rows[right, LENGTH] > tokens.spelled.size:
        return NEED_BYTES
    return DONE


@kernel
def learn(
    num_tokens: int,
    text: Text,
    pairs: Pairs,
    queue: Queue,
    tokens: Tokens,
    sides: Array,
    touched: Array,
    merges: Array,
    facts: Array,
) -> int:
    """Merge until there are `num_tokens` tokens; stop before a merge for which there might be no room.

    Returns `DONE`, `NO_PAIR_LEFT`, or what is needed to go on.
    """
    while facts[NUM_TOKENS] < num_tokens:
        pair = next_pair(queue, pairs, tokens, facts)
        if pair == NONE:
            return NO_PAIR_LEFT
        left, right = pairs.rows[pair, KEY] >> 32, pairs.rows[pair, KEY] & _KEY_MASK
        need = room_to_merge(pair, left, right, pairs, tokens, facts)
        if need != DONE:
            wait(pair, queue, pairs, tokens, facts)
            return need
        new = add_token(left, right, tokens, facts)
        merges[new, 0], merges[new, 1] = left, right
        number = merge_places(pair, new, text, pairs, tokens, sides, touched)
        first_new = facts[NUM_PAIRS]
        update_pairs(left, right, new, number, pairs, sides, touched, facts)
        write_places(pair, new, text, pairs, tokens, sides)
        pairs.rows[pair, COUNT] = 0
        wait_from(first_new, queue, pairs, tokens, facts)
        for entry in range(number):
            for column in range(SIDE_COLUMNS):
                sides[touched[entry], column] = 0
    return DONE
