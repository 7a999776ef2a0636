"""Learning merges, compiled: `_PairTable` of `bpe_trainer.py` over arrays, with the same merges in the same order.

All words lie in one row of slots, a slot a byte; a token's id stands in its first and its last slot. `places` holds the
places of each pair's left token, those of one pair together; a pair's places are written once, when the merge that
makes one of its tokens is done, in the order of the text. Three numbers a slot are always enough for them: the first
pairs have a place a byte, and each merge, which takes one token away, makes two new places at most. `weights` says of
each slot how often its word occurs, in 32 bits; where that is too little, it says which word it is (see `weight_at`).

**The queue.** Counts of known pairs only fall, and no new pair is more frequent than the one whose merge made it. So
the pairs wait in a list for each count (`heads`, `following`), and only those of the count that is being used up stand
in a heap, ordered by their bytes. A pair whose count has fallen since is put into its new list when it comes up. Counts
from `LISTED_COUNTS` on, which few pairs have, share the heap from the beginning.

The rules of `_kernels.py` hold here too; `facts` holds the numbers that change.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transformerlm.tokenizer.fast.jit import helper, kernel

Array = np.ndarray[Any, Any]

LISTED_COUNTS = 1 << 16
BETWEEN_WORDS, INSIDE_TOKEN, NONE = -1, -2, -1
DONE, NO_PAIR_LEFT, NEED_PAIRS, NEED_BYTES = 0, 1, 2, 3

# Places in `facts`.
NUM_TOKENS, NUM_PAIRS, NUM_PLACES, HEAP_SIZE, LEVEL, NUM_BYTES = 0, 1, 2, 3, 4, 5
# Columns of `pairs`, one row for each pair; KEY is both its ids as one number.
KEY, COUNT, FIRST_PLACE, PAIR_PLACES, PAIR_COLUMNS = 0, 1, 2, 3, 4
# Columns of `tokens`: its bytes are `spelled[START : START + LENGTH]`, its first seven of them PREFIX as a number.
START, LENGTH, HASH, PREFIX, TOKEN_COLUMNS = 0, 1, 2, 3, 4
# Columns of `sides`: sums for each token that stands left or right of the present merge's places.
LEFT_COUNT, LEFT_PLACES, RIGHT_COUNT, RIGHT_PLACES, SIDE_COLUMNS = 0, 1, 2, 3, 4

_KEY_MASK = (1 << 32) - 1
_LARGEST_WEIGHT = (1 << 31) - 1
_MIX = np.uint64(0x9E3779B97F4A7C15)
HASH_FACTOR, HASH_MASK = 0x100000001B3, (1 << 40) - 1


@helper
def key_of(left: int, right: int) -> int:
    """Return a pair of ids as one number."""
    return np.int64(left) << 32 | right


@helper
def find_key(index: Array, pairs: Array, shift: Any, key: int) -> int:
    """Return where in the index a pair's number stands, or the free place where it belongs."""
    place = np.int64(np.uint64(key) * _MIX >> shift)
    while index[place] != NONE and pairs[index[place], KEY] != key:
        place += 1
        if place == index.size:
            place = 0
    return place


@kernel
def index_pairs(pairs: Array, number: int, index: Array, shift: Any) -> None:
    """Fill an index of the pairs that is empty (`NONE`)."""
    for pair in range(number):
        index[find_key(index, pairs, shift, pairs[pair, KEY])] = pair


@kernel
def add_pair(pairs: Array, index: Array, shift: Any, facts: Array, key: int, count: int) -> int:
    """Enter a new pair, its places still none, and return its number."""
    pair = facts[NUM_PAIRS]
    facts[NUM_PAIRS] = pair + 1
    pairs[pair, KEY], pairs[pair, COUNT] = key, count
    pairs[pair, FIRST_PLACE], pairs[pair, PAIR_PLACES] = facts[NUM_PLACES], 0
    index[find_key(index, pairs, shift, key)] = pair
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
def weight_at(weights: Array, word_counts: Array, place: int) -> int:
    """Return how often the word at a place occurs: its weight, or, below 0, the count of the word that it names."""
    weight = np.int64(weights[place])
    return weight if weight >= 0 else word_counts[~weight]


@kernel
def find_byte_pairs(
    slots: Array, weights: Array, word_counts: Array, places: Array, pairs: Array, index: Array, shift: Any,
    facts: Array, pair_of: Array,
) -> None:  # fmt: skip
    """Enter all pairs of bytes with their counts and places; `pair_of` has a `NONE` for each of them."""
    for place in range(1, slots.size - 1):
        if slots[place] >= 0 and slots[place + 1] >= 0:
            number = slots[place] << 8 | slots[place + 1]
            if pair_of[number] == NONE:
                pair_of[number] = add_pair(pairs, index, shift, facts, key_of(slots[place], slots[place + 1]), 0)
            pairs[pair_of[number], COUNT] += weight_at(weights, word_counts, place)
            pairs[pair_of[number], PAIR_PLACES] += 1
    for pair in range(facts[NUM_PAIRS]):
        pairs[pair, FIRST_PLACE] = facts[NUM_PLACES]
        facts[NUM_PLACES] += pairs[pair, PAIR_PLACES]
        pairs[pair, PAIR_PLACES] = 0
    for place in range(1, slots.size - 1):
        if slots[place] >= 0 and slots[place + 1] >= 0:
            add_place(pairs, pair_of[slots[place] << 8 | slots[place + 1]], places, place)


@helper
def add_place(pairs: Array, pair: int, places: Array, place: int) -> None:
    """Write one more place of a pair."""
    places[pairs[pair, FIRST_PLACE] + pairs[pair, PAIR_PLACES]] = place
    pairs[pair, PAIR_PLACES] += 1


# ---- The order of pairs -----------------------------------------------------------------------------------------


@kernel
def compare_tokens(left: int, right: int, tokens: Array, spelled: Array) -> int:
    """Return below 0, 0 or above 0 as the first token's bytes are less than, equal to or greater than the other's."""
    if left == right:
        return 0
    if tokens[left, PREFIX] != tokens[right, PREFIX]:
        return -1 if tokens[left, PREFIX] < tokens[right, PREFIX] else 1
    for offset in range(min(tokens[left, LENGTH], tokens[right, LENGTH])):
        difference = np.int64(spelled[tokens[left, START] + offset]) - np.int64(spelled[tokens[right, START] + offset])
        if difference != 0:
            return difference
    return tokens[left, LENGTH] - tokens[right, LENGTH]


@kernel
def comes_before(counts: Array, heap: Array, one: int, other: int, pairs: Array, tokens: Array, spelled: Array) -> bool:
    """Tell whether the pair at one place of the heap goes before that at another: higher count, then greater bytes."""
    if counts[one] != counts[other]:
        return counts[one] > counts[other]
    key, other_key = pairs[heap[one], KEY], pairs[heap[other], KEY]
    order = compare_tokens(key >> 32, other_key >> 32, tokens, spelled)
    if order == 0:
        order = compare_tokens(key & _KEY_MASK, other_key & _KEY_MASK, tokens, spelled)
    return order > 0


@helper
def swap(counts: Array, heap: Array, one: int, other: int) -> None:
    """Exchange two entries of the heap."""
    counts[one], counts[other] = counts[other], counts[one]
    heap[one], heap[other] = heap[other], heap[one]


@kernel
def wait(
    pair: int, counts: Array, heap: Array, heads: Array, following: Array, pairs: Array, tokens: Array,
    spelled: Array, facts: Array,
) -> None:  # fmt: skip
    """Put a pair where it waits for its turn: into the heap, or into the list of its count."""
    count = pairs[pair, COUNT]
    if count < facts[LEVEL]:
        following[pair] = heads[count]
        heads[count] = pair
        return
    place = facts[HEAP_SIZE]
    facts[HEAP_SIZE] = place + 1
    counts[place], heap[place] = count, pair
    while place > 0 and comes_before(counts, heap, place, (place - 1) // 2, pairs, tokens, spelled):
        swap(counts, heap, place, (place - 1) // 2)
        place = (place - 1) // 2


@kernel
def wait_from(
    first: int, counts: Array, heap: Array, heads: Array, following: Array, pairs: Array, tokens: Array,
    spelled: Array, facts: Array,
) -> None:  # fmt: skip
    """Let all pairs from one on wait."""
    for pair in range(first, facts[NUM_PAIRS]):
        wait(pair, counts, heap, heads, following, pairs, tokens, spelled, facts)


@kernel
def take_top(counts: Array, heap: Array, pairs: Array, tokens: Array, spelled: Array, facts: Array) -> None:
    """Take the first pair out of the heap."""
    size = facts[HEAP_SIZE] - 1
    facts[HEAP_SIZE] = size
    counts[0], heap[0] = counts[size], heap[size]
    place, child = 0, 1
    while child < size:
        if child + 1 < size and comes_before(counts, heap, child + 1, child, pairs, tokens, spelled):
            child += 1
        if not comes_before(counts, heap, child, place, pairs, tokens, spelled):
            break
        swap(counts, heap, place, child)
        place, child = child, 2 * child + 1


@kernel
def next_pair(
    counts: Array, heap: Array, heads: Array, following: Array, pairs: Array, tokens: Array, spelled: Array,
    known: Array, facts: Array,
) -> int:  # fmt: skip
    """Return the pair to merge next, `NONE` if no pair is left."""
    while True:
        while facts[HEAP_SIZE] == 0:
            if facts[LEVEL] <= 1:
                return NONE
            facts[LEVEL] -= 1
            pair = heads[facts[LEVEL]]
            heads[facts[LEVEL]] = NONE
            while pair != NONE:
                then = following[pair]
                if pairs[pair, COUNT] > 0:
                    wait(pair, counts, heap, heads, following, pairs, tokens, spelled, facts)
                pair = then
        pair, count = heap[0], counts[0]
        take_top(counts, heap, pairs, tokens, spelled, facts)
        if pairs[pair, COUNT] == count:
            if not is_known(pairs[pair, KEY] >> 32, pairs[pair, KEY] & _KEY_MASK, tokens, spelled, known):
                return pair
        elif pairs[pair, COUNT] > 0:
            wait(pair, counts, heap, heads, following, pairs, tokens, spelled, facts)


# ---- Tokens -----------------------------------------------------------------------------------------------------


@kernel
def joined_hash(left: int, right: int, tokens: Array, spelled: Array) -> int:
    """Return the hash of two tokens' joined bytes, which goes on from that of the left one."""
    result = tokens[left, HASH]
    for offset in range(tokens[right, LENGTH]):
        result = ((result ^ np.int64(spelled[tokens[right, START] + offset])) * HASH_FACTOR) & HASH_MASK
    return result


@kernel
def is_known(left: int, right: int, tokens: Array, spelled: Array, known: Array) -> bool:
    """Tell whether two tokens' joined bytes are a token already."""
    length = tokens[left, LENGTH] + tokens[right, LENGTH]
    digest = joined_hash(left, right, tokens, spelled)
    place = digest % known.size
    while known[place] != NONE:
        token = known[place]
        if tokens[token, HASH] == digest and tokens[token, LENGTH] == length:
            same = True
            for offset in range(length):
                part, inner = left, offset
                if offset >= tokens[left, LENGTH]:
                    part, inner = right, offset - tokens[left, LENGTH]
                if spelled[tokens[token, START] + offset] != spelled[tokens[part, START] + inner]:
                    same = False
                    break
            if same:
                return True
        place = (place + 1) % known.size
    return False


@kernel
def add_token(left: int, right: int, tokens: Array, spelled: Array, known: Array, facts: Array) -> int:
    """Enter the token that two others make and return its id."""
    token, start = facts[NUM_TOKENS], facts[NUM_BYTES]
    length = 0
    for part in (left, right):
        for offset in range(tokens[part, LENGTH]):
            spelled[start + length] = spelled[tokens[part, START] + offset]
            length += 1
    prefix = 0
    for offset in range(7):  # seven bytes fit a signed number
        prefix = prefix << 8 | (np.int64(spelled[start + offset]) if offset < length else 0)
    tokens[token, START], tokens[token, LENGTH], tokens[token, PREFIX] = start, length, prefix
    tokens[token, HASH] = joined_hash(left, right, tokens, spelled)
    place = tokens[token, HASH] % known.size
    while known[place] != NONE:
        place = (place + 1) % known.size
    known[place] = token
    facts[NUM_TOKENS], facts[NUM_BYTES] = token + 1, start + length
    return token


# ---- Merging ----------------------------------------------------------------------------------------------------


@kernel
def merge_places(
    pair: int, new: int, slots: Array, weights: Array, word_counts: Array, places: Array, pairs: Array,
    tokens: Array, sides: Array, touched: Array,
) -> int:  # fmt: skip
    """Replace the pair by its new token wherever it stands, and sum up what stood beside it.

    Writes the tokens that stood beside it into `touched` (their number is returned), and the merged places over the
    pair's old ones, with -1 behind the last.
    """
    left, right = pairs[pair, KEY] >> 32, pairs[pair, KEY] & _KEY_MASK
    left_length, new_length = tokens[left, LENGTH], tokens[new, LENGTH]
    first = pairs[pair, FIRST_PLACE]
    number, merged = 0, 0
    for entry in range(first, first + pairs[pair, PAIR_PLACES]):
        start = places[entry]
        middle, end = start + left_length, start + new_length
        if slots[start] != left or slots[middle] != right:
            continue  # out of date: in "aaa" the first merge takes the second pair's left token
        weight = weight_at(weights, word_counts, start)
        before, after = slots[start - 1], slots[end]
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
        slots[middle - 1], slots[middle] = INSIDE_TOKEN, INSIDE_TOKEN
        slots[start], slots[end - 1] = new, new
        places[first + merged] = start
        merged += 1
    pairs[pair, PAIR_PLACES] = merged
    return number


@kernel
def update_pairs(
    left: int, right: int, new: int, number: int, pairs: Array, index: Array, shift: Any, sides: Array, touched: Array,
    facts: Array,
) -> None:  # fmt: skip
    """Take what the merge has used up from the old pairs' counts, and enter the new pairs.

    In "abab" the second merge finds the first one's token on its left: a pair of the new token and `left` was never
    left standing, though the first merge saw it.
    """
    passing = sides[new, LEFT_COUNT]
    for entry in range(number):
        token = touched[entry]
        if sides[token, LEFT_PLACES] > 0:
            if token != new:
                pairs[index[find_key(index, pairs, shift, key_of(token, left))], COUNT] -= sides[token, LEFT_COUNT]
            count, room = sides[token, LEFT_COUNT], sides[token, LEFT_PLACES]
            sides[token, LEFT_COUNT] = NONE
            if count > 0:
                sides[token, LEFT_COUNT] = add_pair(pairs, index, shift, facts, key_of(token, new), count)
                facts[NUM_PLACES] += room
        if sides[token, RIGHT_PLACES] > 0:
            count, room = sides[token, RIGHT_COUNT], sides[token, RIGHT_PLACES]
            pairs[index[find_key(index, pairs, shift, key_of(right, token))], COUNT] -= count
            if token == left:
                count -= passing
            sides[token, RIGHT_COUNT] = NONE
            if count > 0:
                sides[token, RIGHT_COUNT] = add_pair(pairs, index, shift, facts, key_of(new, token), count)
                facts[NUM_PLACES] += room


@kernel
def write_places(pair: int, new: int, slots: Array, places: Array, pairs: Array, tokens: Array, sides: Array) -> None:
    """Write the places of the new pairs, whose numbers `update_pairs` has put into `sides`."""
    first = pairs[pair, FIRST_PLACE]
    for entry in range(first, first + pairs[pair, PAIR_PLACES]):
        start = places[entry]
        before, after = slots[start - 1], slots[start + tokens[new, LENGTH]]
        if before >= 0 and sides[before, LEFT_COUNT] >= 0 and sides[before, LEFT_PLACES] > 0:
            add_place(pairs, sides[before, LEFT_COUNT], places, start - tokens[before, LENGTH])
        if after >= 0 and after != new and sides[after, RIGHT_COUNT] >= 0 and sides[after, RIGHT_PLACES] > 0:
            add_place(pairs, sides[after, RIGHT_COUNT], places, start)


@helper
def room_to_merge(pair: int, left: int, right: int, pairs: Array, tokens: Array, spelled: Array, facts: Array) -> int:
    """Return what a merge may lack: nothing (`DONE`), room for new pairs, two a place or a token at most, or bytes."""
    if facts[NUM_PAIRS] + 2 * min(pairs[pair, PAIR_PLACES], facts[NUM_TOKENS] + 1) > pairs.shape[0]:
        return NEED_PAIRS
    if facts[NUM_BYTES] + tokens[left, LENGTH] + tokens[right, LENGTH] > spelled.size:
        return NEED_BYTES
    return DONE


@kernel
def learn(
    num_tokens: int, slots: Array, weights: Array, word_counts: Array, places: Array, pairs: Array, index: Array,
    shift: Any, counts: Array, heap: Array, heads: Array, following: Array, tokens: Array, spelled: Array,
    known: Array, sides: Array, touched: Array, merges: Array, facts: Array,
) -> int:  # fmt: skip
    """Merge until there are `num_tokens` tokens; stop before a merge for which there might be no room.

    Returns `DONE`, `NO_PAIR_LEFT`, or what is needed to go on.
    """
    while facts[NUM_TOKENS] < num_tokens:
        pair = next_pair(counts, heap, heads, following, pairs, tokens, spelled, known, facts)
        if pair == NONE:
            return NO_PAIR_LEFT
        left, right = pairs[pair, KEY] >> 32, pairs[pair, KEY] & _KEY_MASK
        need = room_to_merge(pair, left, right, pairs, tokens, spelled, facts)
        if need != DONE:
            wait(pair, counts, heap, heads, following, pairs, tokens, spelled, facts)
            return need
        new = add_token(left, right, tokens, spelled, known, facts)
        merges[new, 0], merges[new, 1] = left, right
        number = merge_places(pair, new, slots, weights, word_counts, places, pairs, tokens, sides, touched)
        first_new = facts[NUM_PAIRS]
        update_pairs(left, right, new, number, pairs, index, shift, sides, touched, facts)
        write_places(pair, new, slots, places, pairs, tokens, sides)
        pairs[pair, COUNT] = 0
        wait_from(first_new, counts, heap, heads, following, pairs, tokens, spelled, facts)
        for entry in range(number):
            for column in range(SIDE_COLUMNS):
                sides[touched[entry], column] = 0
    return DONE
