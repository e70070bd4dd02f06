"""Compiled loops over masks and columns of W_m on a CPU, for which NumPy and torch make many passes each: numba, which
keeps what it compiled beside this file. A question asks them behind a forward pass that has emptied the caches, where
every pass costs more than its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from llvmlite import ir
from numba import carray, int32, njit, types, uint64
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model
from torch import Tensor

_LINE = 8  # words in a cache line
_LANES = 64  # floats of a sum that stay in the registers, some of most processors'
_TOGETHER = 2048  # floats of W_m's rows that are read together
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)
FEW_PRODUCTS = 1 << 26  # that one thread makes in some two milliseconds
ROW, SHARED, PAGE, COLUMNS = 0, 1, 2, 3  # where what was decided stands, the columns from there on


def _compiled(function: Callable) -> Callable:
    """A loop that is called from Python, or put whole into another one: what is kept of one holds nothing of another,
    which may have been compiled anew since, and then neither would find its own (numba's environments)."""
    try:
        return njit(cache=True, nogil=True, inline="always")(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written: compiled anew in every process
        return njit(nogil=True, inline="always")(function)


@njit(inline="always")
def _ones(word):
    """Ones in a uint64. LLVM knows these sums of neighbouring bits, and makes them one instruction."""
    word -= (word >> uint64(1)) & uint64(0x5555555555555555)
    word = (word & uint64(0x3333333333333333)) + ((word >> uint64(2)) & uint64(0x3333333333333333))
    word = (word + (word >> uint64(4))) & uint64(0x0F0F0F0F0F0F0F0F)
    return (word * uint64(0x0101010101010101)) >> uint64(56)


def _place(context, builder, signature, arguments, pointed):
    """The address of a table's entry, as that of something: table, row and column are the first arguments of a call."""
    kind, (table, row, column) = signature.args[0], arguments[:3]
    array = context.make_array(kind)(context, builder, table)
    entry = cgutils.get_item_pointer(context, builder, kind, array, [row, column])
    return builder.bitcast(entry, pointed.as_pointer())


@intrinsic
def _word(typing, masks, row, column):
    """64 entries of a table (n × D) bool, from a column on, as the bits of a uint64, the first its lowest."""
    if masks.layout != "C":
        raise TypingError(f"{masks}, expected rows in one piece")

    def code(context, builder, signature, arguments):
        kind = ir.VectorType(ir.IntType(8), 64)
        entries = builder.load(_place(context, builder, signature, arguments, kind), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", entries, kind([0] * 64)), ir.IntType(64))

    return types.uint64(masks, row, column), code


@intrinsic
def _fetch(typing, table, row, column):
    """Have the cache line of a table's entry brought from memory, without waiting for it."""

    def code(context, builder, signature, arguments):
        byte, number = ir.IntType(8), ir.IntType(32)
        place = _place(context, builder, signature, arguments, byte)
        function = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        builder.call(prefetch, [place, number(0), number(2), number(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(table, row, column), code


class _Lanes(types.Type):
    """Floats side by side, in several registers."""


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _VECTOR)


@intrinsic
def _lanes(typing, table, row, column):
    """Floats of a table's row, from a column on."""

    def code(context, builder, signature, arguments):
        return builder.load(_place(context, builder, signature, arguments, _VECTOR), align=4)

    return _Lanes("lanes")(table, row, column), code


@intrinsic
def _put(typing, table, row, column, floats):
    """Put floats into a table's row, from a column on."""

    def code(context, builder, signature, arguments):
        builder.store(arguments[3], _place(context, builder, signature, arguments, _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(table, row, column, floats), code


@intrinsic
def _plus(typing, sums, weight, floats):
    """sums + weight × floats, rounded once where the processor can."""

    def code(context, builder, signature, arguments):
        some, number, others = arguments
        none, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        weights = builder.shuffle_vector(builder.insert_element(none, number, first), none, everywhere)
        products = builder.fmul(weights, others, flags=("contract",))
        return builder.fadd(some, products, flags=("contract",))

    return sums(sums, types.float32, floats), code


@intrinsic
def _at(typing, address, kind):
    """A pointer to entries of that kind, from an address as a whole number."""
    pointer = types.CPointer(kind.dtype)

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, kind), code


@njit(inline="always")
def _fetch_row(table, row, first, last):
    """Have a part of a table's row at hand by the time it is read."""
    for column in range(first, last, 64 // table.itemsize):
        _fetch(table, row, column)


@njit(inline="always")
def _end(prompt):
    """The last place of a prompt (T,) bool."""
    place = len(prompt) - 1
    while place > 0 and not prompt[place]:
        place -= 1
    return place


@njit
def _mark(feature, k, place, mask):
    """What `largest` finds, for one row."""
    # As whole numbers the bits of positive floats are in the floats' order. The k-th largest of them, bit by bit, by
    # counting: many entries at a time, as long as the loop goes by index and everything in it has 32 bits.
    bits, positive = feature.view(np.int32), int32(0x7FFFFFFF)
    least = int32(0)
    for bit in range(30, -1, -1):
        edge, count = int32(least | 1 << bit), int32(0)
        for j in range(len(bits)):
            count = int32(count + int32(bits[j] & positive >= edge))
        if count >= k:
            least = edge
        if count == k:
            break
    missing = k
    for j in range(len(bits)):  # without a branch, which nobody could foretell
        larger = bits[j] & positive > least
        mask[uint64(place[j])] = larger
        missing -= larger
    for j in range(len(bits)):
        if missing == 0:
            break
        if bits[j] & positive == least:
            mask[uint64(place[j])] = True
            missing -= 1


@_compiled
def last(a, prompt):
    """(B × D): what stands in each row of a (B × T × D) at the last place of its prompt (B × T) bool."""
    found = np.empty((len(a), a.shape[2]), dtype=a.dtype)
    for row in range(len(a)):
        found[row] = a[row, _end(prompt[row])]
    return found


@_compiled
def largest(features, k, place):
    """(B × D) bool: place[j] of the k entries of each row that are largest in magnitude; of equals the first.

    features (B × D) float32, k from 1 to D, place (D,) int
    """
    masks = np.zeros(features.shape, dtype=np.bool_)
    for row in range(len(features)):
        _mark(features[row], k, place, masks[row])
    return masks


@_compiled
def pack(masks):
    """(n × ⌈D/64⌉) uint64 of masks (n × D) bool, the first bit of a word its lowest."""
    rows, width = masks.shape
    words = np.zeros((rows, (width + 63) // 64), dtype=np.uint64)
    for row in range(rows):
        for w in range(width // 64):
            words[row, w] = _word(masks, row, 64 * w)
        for j in range(width - width % 64, width):
            words[row, j // 64] |= uint64(masks[row, j]) << uint64(j % 64)
    return words


@_compiled
def columns(words, rows, ones):
    """(B × ones) int64: the places of the ones in those rows of words (n × W) uint64.
    ValueError where a row has more or fewer of them."""
    found = np.empty((len(rows), ones), dtype=np.int64)
    for i in range(len(rows)):
        n = 0
        for w in range(words.shape[1]):
            word = words[rows[i], w]
            while word:
                if n == ones:
                    raise ValueError("a mask has too many ones")
                lowest = word & (~word + uint64(1))
                found[i, n] = 64 * w + _ones(lowest - uint64(1))
                word ^= lowest
                n += 1
        if n < ones:
            raise ValueError("a mask has too few ones")
    return found


@njit(inline="always")
def _distance(one, other):
    """Ones in which two packed masks differ."""
    distance = uint64(0)
    for w in range(len(one)):
        distance += _ones(one[w] ^ other[w])
    return distance


@njit(inline="always")
def _common(one, other):
    """Ones that two packed masks share."""
    common = uint64(0)
    for w in range(len(one)):
        common += _ones(one[w] & other[w])
    return common


@_compiled
def nearest(words, masks):
    """For each of the masks (B × D) bool the row of words (n × ⌈D/64⌉) uint64 at the least Hamming distance, of equals
    the last one; that distance; and the ones they share: (B,) int64 each; row -1 where there are none.

    One cache line of each row comes first. Where it alone is farther away than all of the row whose line is nearest,
    the others need not be read: for a prompt that was edited they are not for nearly any row.
    """
    queries, width = pack(masks), words.shape[1]
    head = min(_LINE, width)
    heads, left = np.empty((len(words), len(queries)), dtype=np.uint16), np.empty(len(words), dtype=np.int64)
    rows, distances = np.full(len(queries), -1), np.full(len(queries), 64 * width + 1)
    for row in range(len(words)):
        if row + 64 < len(words):
            _fetch(words, row + 64, 0)
        for q in range(len(queries)):
            heads[row, q] = _distance(words[row, :head], queries[q, :head])
            if heads[row, q] < distances[q]:
                rows[q], distances[q] = row, heads[row, q]
    for q in range(len(queries) if len(words) else 0):
        distances[q] = _distance(words[rows[q]], queries[q])
    count = 0
    for row in range(len(words)):
        for q in range(len(queries)):
            if heads[row, q] <= distances[q]:
                left[count] = row
                count += 1
                break
    for i in range(count):
        row = left[i]
        if i + 4 < count:
            _fetch_row(words, left[i + 4], head, width)
        for q in range(len(queries)):
            if heads[row, q] <= distances[q]:
                distance = heads[row, q] + _distance(words[row, head:], queries[q, head:])
                if distance <= distances[q]:
                    rows[q], distances[q] = row, distance
    overlaps = np.zeros(len(queries), dtype=np.int64)
    for q in range(len(queries) if len(words) else 0):
        overlaps[q] = _common(words[rows[q]], queries[q])
    return rows, distances, overlaps


@_compiled
def shared(words, masks):
    """(B × n) int64: the ones that each of the masks (B × D) bool shares with each row of words (n × ⌈D/64⌉) uint64."""
    queries = pack(masks)
    found = np.empty((len(queries), len(words)), dtype=np.int64)
    for row in range(len(words)):
        for q in range(len(queries)):
            found[q, row] = _common(words[row], queries[q])
    return found


@_compiled
def _add_weighted(sums, a, columns, table, first, last):
    """Add to the sums (T × d), in place, the rows of a table (D × d) float32 that the columns (k,) int64 name, weighted
    by these entries of a (T × D) float32: the part from the table's column `first` up to `last`."""
    tokens, k, whole = len(a), len(columns), last - (last - first) % _LANES
    # Some rows at a time: few enough for the first cache, where long ones all fall into the same few places. It is told
    # where those behind them begin, and the processor brings the rest by itself, as they are read from end to end.
    rows = max(8, _TOGETHER // table.shape[1])
    for start in range(0, k, rows):
        some, following = columns[start : start + rows], columns[start + rows : start + 2 * rows]
        for j in range(first, whole, _LANES):
            if tokens < 4:
                for c in following:
                    _fetch(table, c, j)
            for t in range(0, tokens - 3, 4):  # several tokens, for one sum would wait for itself
                one, two, three, four = (
                    _lanes(sums, t, j),
                    _lanes(sums, t + 1, j),
                    _lanes(sums, t + 2, j),
                    _lanes(sums, t + 3, j),
                )
                for i in range(len(some)):
                    if t < 2 * 4 and i < len(following):  # half of what comes behind, with time between
                        _fetch(table, following[i], j + _LANES // 2 * (t // 4))
                    c = some[i]
                    row = _lanes(table, c, j)
                    one, two = _plus(one, a[t, c], row), _plus(two, a[t + 1, c], row)
                    three, four = _plus(three, a[t + 2, c], row), _plus(four, a[t + 3, c], row)
                _put(sums, t, j, one)
                _put(sums, t + 1, j, two)
                _put(sums, t + 2, j, three)
                _put(sums, t + 3, j, four)
            for t in range(tokens - tokens % 4, tokens):
                one = _lanes(sums, t, j)
                for c in some:
                    one = _plus(one, a[t, c], _lanes(table, c, j))
                _put(sums, t, j, one)
        for j in range(whole, last):
            for c in some:
                for t in range(tokens):
                    sums[t, j] += a[t, c] * table[c, j]


@_compiled
def _add(sums, a, decisions, table, sequences, tokens, width, height, k, page, first, last):
    """`add`, of tensors by their addresses; the part from W_m's row `first` up to `last`."""
    sums = carray(_at(sums, np.float32), (sequences, tokens, height))
    a = carray(_at(a, np.float32), (sequences, tokens, width))
    decisions = carray(_at(decisions, np.int64), (sequences, COLUMNS + k))
    table = carray(_at(table, np.float32), (width, height))
    for i in range(sequences):
        if decisions[i, PAGE] == page:
            _add_weighted(sums[i], a[i], decisions[i, COLUMNS:], table, first, last)


def add(sums: Tensor, a: Tensor, decisions: Tensor, page: int, weight: Tensor) -> None:
    """Add to the sums, in place, W_m (M ⊙ a) of the sequences that read this page; where it is much, on as many threads
    as torch may use. The tensors are taken by their addresses: making NumPy's arrays of them costs as much as a mask.

    sums       (B × T × d) float32 in one piece
    a          (B × T × D) float32 in one piece
    decisions  (B × (3 + k)) int64 in one piece, see `ask`
    weight     W_m (d × D) float32 of the page, each column in one piece
    """
    (sequences, tokens, width), (decided, ends), height = a.shape, decisions.shape, sums.shape[2]
    if decided != sequences:
        raise ValueError(f"what {decided} sequences read was decided, expected {sequences}")
    addresses = sums.data_ptr(), a.data_ptr(), decisions.data_ptr(), weight.data_ptr()
    asked = *addresses, sequences, tokens, width, height, ends - COLUMNS, page
    if sequences * tokens * ends * height < FEW_PRODUCTS or (threads := torch.get_num_threads()) == 1:
        _add(*asked, 0, height)
        return
    edges = [height * i // threads // _LANES * _LANES for i in range(threads)] + [height]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(_add, *asked), edges[:-1], edges[1:]))


@_compiled
def _ask(a, prompt, sums, decisions, table, sequences, tokens, height, k, place, words, tau):
    """`ask`, of tensors by their addresses."""
    width, reading = len(place), False
    a = carray(_at(a, np.float32), (sequences, tokens, width))
    prompt = carray(_at(prompt, np.bool_), (sequences, tokens))
    sums = carray(_at(sums, np.float32), (sequences, tokens, height))
    decisions = carray(_at(decisions, np.int64), (sequences, COLUMNS + k))
    table = carray(_at(table, np.float32), (width, height))
    rows, _, overlaps = nearest(words, largest(last(a, prompt), k, place))
    chosen = columns(words, rows, k)
    for i in range(sequences):
        reads = overlaps[i] / k >= tau
        decisions[i, ROW], decisions[i, SHARED], decisions[i, PAGE] = rows[i], overlaps[i], 0 if reads else -1
        decisions[i, COLUMNS:] = chosen[i]
        if reads:
            _add_weighted(sums[i], a[i], chosen[i], table, 0, height)
            reading = True
    return reading


def ask(
    a: Tensor, prompt: Tensor, k: int, place: np.ndarray, words: np.ndarray, tau: float, sums: Tensor, weight: Tensor
) -> tuple[Tensor, bool]:
    """All that a question asks of a memory of one page, in one call, as between two of them the caches are cold.

    Of the masks that are the `largest` of the `last`, the `nearest` among words (at least one), and for those that
    share τ of their ones what `add` does to the sums.

    returns the decisions (B × (3 + k)) int64: of each sequence the row of that nearest, the ones they share, the page
            that is read (0, or -1 for none) and the columns of that row; and whether any sequence reads
    """
    sequences, tokens, _ = a.shape
    if prompt.shape != (sequences, tokens):
        raise ValueError(f"prompts have shape {tuple(prompt.shape)}, expected {(sequences, tokens)}")
    decisions = torch.empty(sequences, COLUMNS + k, dtype=torch.int64)
    addresses = a.data_ptr(), prompt.data_ptr(), sums.data_ptr(), decisions.data_ptr(), weight.data_ptr()
    return decisions, _ask(*addresses, sequences, tokens, sums.shape[2], k, place, words, tau)


@_compiled
def _product(found, keys, columns, table, n, count, width, height):
    """`product`, of tensors by their addresses."""
    found = carray(_at(found, np.float32), (n, height))
    keys = carray(_at(keys, np.float32), (n, count))
    columns = carray(_at(columns, np.int64), (count,))
    table = carray(_at(table, np.float32), (width, height))
    whole = height - height % _LANES
    for start in range(0, count, 16):  # some rows at a time, of which every key finds most in the first cache
        for j in range(0, whole, _LANES):
            for t in range(n):
                one = _lanes(found, t, j)
                for i in range(start, min(start + 16, count)):
                    one = _plus(one, keys[t, i], _lanes(table, columns[i], j))
                _put(found, t, j, one)
    for j in range(whole, height):
        for i in range(count):
            for t in range(n):
                found[t, j] += keys[t, i] * table[columns[i], j]


def product(keys: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """(n × d) float32: what keys (n × c) float32, in these columns (c,) int64 of W_m (d × D) float32, make there. Each
    in one piece, of W_m its columns."""
    (n, count), (height, width) = keys.shape, weight.shape
    found = torch.zeros(n, height)
    addresses = found.data_ptr(), keys.data_ptr(), columns.data_ptr(), weight.data_ptr()
    _product(*addresses, n, count, width, height)
    return found


@_compiled
def _update(table, columns, keys, G, n, count, width, height):
    """`update`, of tensors by their addresses."""
    table = carray(_at(table, np.float32), (width, height))
    columns = carray(_at(columns, np.int64), (count,))
    keys = carray(_at(keys, np.float32), (n, count))
    G = carray(_at(G, np.float32), (n, height))
    whole = height - height % _LANES
    for i in range(count):
        for j in range(0, whole, _LANES):
            row = _lanes(table, columns[i], j)
            for t in range(n):
                row = _plus(row, keys[t, i], _lanes(G, t, j))
            _put(table, columns[i], j, row)
    for j in range(whole, height):
        for i in range(count):
            for t in range(n):
                table[columns[i], j] += keys[t, i] * G[t, j]


def update(weight: Tensor, columns: Tensor, keys: Tensor, G: Tensor) -> None:
    """Add Gᵀ A to these columns (c,) int64 of W_m (d × D) float32, in place: keys A (n × c), G (n × d) float32. Each in
    one piece, of W_m its columns."""
    (n, count), (height, width) = keys.shape, weight.shape
    addresses = weight.data_ptr(), columns.data_ptr(), keys.data_ptr(), G.data_ptr()
    _update(*addresses, n, count, width, height)
