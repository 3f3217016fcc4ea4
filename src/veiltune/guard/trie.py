"""Sets of strings as arrays: a trie that is walked from the root, and an Aho-Corasick automaton on top of it."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune.errors import InputError

Int64 = NDArray[np.int64]

_BITS = 21  # of a code point
_MASK = (1 << _BITS) - 1
_FAR = 2**30


class Trie:
    """A trie in arrays of one entry a node, numbered level by level; 0 is the root.

    Built with numpy, level by level, in time and memory of the strings' total length.

    >>> trie = Trie(["an", "anna", "bo"])
    >>> trie.nodes, trie.child(trie.child(0, ord("a")), ord("n")), trie.child(0, ord("n"))
    (7, 3, 0)

    Args:
        strings: Sorted by code points, all different, none empty.

    Attributes:
        nodes: Number of nodes.
        lo: First row (index in `strings`) that goes through each node.
        hi: One past the last.
        ends: Whether row `lo` ends at the node.
        height: Characters from a node to the end of the longest row through it.
        gap: Characters from a node to the nearest end strictly below it; large if there is none.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        lengths = np.array([len(text) for text in strings], dtype=np.int64)
        if not lengths.all() or any(a >= b for a, b in itertools.pairwise(strings)):
            raise InputError("a trie takes strings that are sorted, all different and not empty")
        codes = np.frombuffer("".join(strings).encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
        self._build(codes, lengths)

    def _build(self, codes: Int64, lengths: Int64) -> None:
        starts = np.cumsum(lengths) - lengths
        place = np.zeros(len(lengths), dtype=np.int64)
        keys, lows, highs = [], [np.zeros(1, dtype=np.int64)], [np.array([len(lengths)])]
        self.levels = [(0, 1)]
        for depth in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > depth)
            key = place[rows] << _BITS | codes[starts[rows] + depth]
            new = np.append(True, key[1:] != key[:-1])
            first = self.levels[-1][1]
            place[rows] = first + np.cumsum(new) - 1
            begins = np.flatnonzero(new)
            keys.append(key[begins])
            lows.append(rows[begins])
            highs.append(rows[np.append(begins[1:] - 1, len(rows) - 1)] + 1)
            self.levels.append((first, first + len(begins)))
        self.keys = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
        self.nodes = len(self.keys) + 1
        low, high = np.concatenate(lows), np.concatenate(highs)
        self.depth = np.repeat(np.arange(len(self.levels)), [stop - start for start, stop in self.levels])
        ends = np.zeros(self.nodes, dtype=np.bool_)
        ends[place] = True
        ends[0] = False
        self.end_nodes = place  # of each row
        children = np.searchsorted(self.keys, np.arange(self.nodes + 1, dtype=np.int64) << _BITS)
        height, gap = np.zeros(self.nodes, dtype=np.int64), np.full(self.nodes, _FAR, dtype=np.int64)
        for start, stop in reversed(self.levels[1:]):
            parents = self.keys[start - 1 : stop - 1] >> _BITS
            np.maximum.at(height, parents, height[start:stop] + 1)
            np.minimum.at(gap, parents, np.where(ends[start:stop], 1, gap[start:stop] + 1))
        self.lo, self.hi, self.ends = _quick(low), _quick(high), _quick(ends)
        self.height, self.gap = _quick(height), _quick(gap)
        self._keys, self._children = _quick(self.keys), _quick(children)

    def child(self, node: int, code: int) -> int:
        """The child by a code point, 0 if there is none."""
        lo, hi = self._children[node], self._children[node + 1]
        key = node << _BITS | code
        at = bisect_left(self._keys, key, lo, hi)
        return at + 1 if at < hi and bool(self._keys[at] == key) else 0

    def children(self, node: int) -> range:
        """The numbers of a node's children."""
        return range(self._children[node] + 1, self._children[node + 1] + 1)

    def code(self, node: int) -> int:
        """The code point that leads to a node other than the root."""
        return int(self._keys[node - 1]) & _MASK

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.keys.nbytes + self.nodes * (5 * 8 + 1)


class Automaton(Trie):
    """Follows a text and knows after each character which strings have just ended (Aho and Corasick 1975).

    A state is the node of the longest end of the text that begins a string.

    >>> automaton = Automaton(["anna", "nan"], [1, 5])
    >>> state = automaton.walk(0, "xan")
    >>> automaton.worth[state], automaton.worth[automaton.walk(state, "an")]
    (0, 5)

    Args:
        strings: As in `Trie`.
        worths: One positive number a string.

    Attributes:
        fail: The next shorter end of the text that begins a string, of each state.
        worth: The largest worth of the strings that end at a state; 0 if none does.
    """

    def __init__(self, strings: Sequence[str], worths: Sequence[int]) -> None:
        super().__init__(strings)
        worth = np.zeros(self.nodes, dtype=np.int64)
        worth[self.end_nodes] = np.asarray(worths, dtype=np.int64)
        fail = np.zeros(self.nodes, dtype=np.int64)
        for start, stop in self.levels[2:]:
            keys = self.keys[start - 1 : stop - 1]
            codes, at = keys & _MASK, fail[keys >> _BITS]
            left = np.arange(stop - start)
            while len(left):
                key = at[left] << _BITS | codes[left]
                found = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
                hit = self.keys[found] == key
                fail[start + left[hit]] = found[hit] + 1
                left = left[~hit & (at[left] != 0)]
                at[left] = fail[at[left]]
            np.maximum(worth[start:stop], worth[fail[start:stop]], out=worth[start:stop])
        self.fail, self.worth = _quick(fail), _quick(worth)

    def step(self, state: int, code: int) -> int:
        """The state after one more character."""
        while True:
            after = self.child(state, code)
            if after or not state:
                return after
            state = self.fail[state]

    def walk(self, state: int, text: str) -> int:
        """The state after a folded text."""
        for character in text:
            state = self.step(state, ord(character))
        return state

    def chain(self, state: int) -> Iterator[int]:
        """The state, its shorter ends, and last the root."""
        while state:
            yield state
            state = self.fail[state]
        yield 0


def _quick(values: NDArray[Any]) -> memoryview[Any]:
    """One entry at a time, a memoryview is read several times faster than an array."""
    return memoryview(values)  # type: ignore[arg-type]  # numpy's stubs do not say that an array is a buffer


def ended(patterns: Trie, node: int, texts: Trie) -> list[tuple[int, int]]:
    """Which texts, put after a node of the patterns, complete a pattern through that node and go on after its end.

    Walks both tries at once, so it costs as much as they have in common.

    >>> ended(Trie(["anna", "bo"]), 2, Trie(["na", "nab", "o", "ox"]))
    [(3, 4)]

    Args:
        patterns: A trie or automaton.
        node: Of it; 0: the pattern begins where the text does.
        texts: Candidates.

    Returns:
        (first, last + 1) of rows of `texts`, each row once.
    """
    found: list[tuple[int, int]] = []
    stack = [(node, 0)]
    while stack:
        one, other = stack.pop()
        if other and patterns.ends[one]:
            lo = texts.lo[other] + texts.ends[other]
            if lo < texts.hi[other]:
                found.append((lo, texts.hi[other]))
            continue
        if patterns.gap[one] >= texts.height[other]:
            continue
        mine, theirs = patterns.children(one), texts.children(other)
        if len(mine) <= len(theirs):
            pairs = ((child, texts.child(other, patterns.code(child))) for child in mine)
        else:
            pairs = ((patterns.child(one, texts.code(child)), child) for child in theirs)
        stack.extend(pair for pair in pairs if pair[0] and pair[1])
    return found


def contained(automaton: Automaton, texts: Trie) -> list[tuple[int, int]]:
    """Which texts have a string of the automaton anywhere within them, and go on after its end.

    >>> contained(Automaton(["an"], [1]), Trie(["ban", "bank", "x"]))
    [(1, 2)]

    Args:
        automaton: The strings.
        texts: Candidates.

    Returns:
        As `ended`.
    """
    found: list[tuple[int, int]] = []
    stack = [(0, 0)]
    while stack:
        state, node = stack.pop()
        if automaton.worth[state]:
            lo = texts.lo[node] + texts.ends[node]
            if lo < texts.hi[node]:
                found.append((lo, texts.hi[node]))
            continue
        stack.extend((automaton.step(state, texts.code(child)), child) for child in texts.children(node))
    return found
