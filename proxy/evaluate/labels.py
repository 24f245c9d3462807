"""What the labels of a whole file say of any two of its prompts, where a pair's label speaks of its own two only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proxy.evaluate.rows import Pair, Question

_Node = bytes | str
"""A prompt by its digest, or an answer class by its name."""


class Labels:
    """Prompts are alike that have one answer class, or that pairs which are the same connect."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        """Learn the labels; the `a` of each pair is an entry."""
        self._above: dict[_Node, _Node] = {}
        self._labelled: dict[tuple[bytes, bytes], bool] = {}
        for pair in pairs:
            self._learn(pair)
        self._entries: dict[_Node, dict[bytes, Question]] = {}
        for pair in pairs:
            self._entries.setdefault(self._root(pair.a.digest), {})[pair.a.digest] = pair.a

    def is_right(self, entry: Question, asked: Question) -> bool:
        """Whether the entry's answer is right for what is asked. What a pair says itself outweighs its classes."""
        if entry.digest == asked.digest:
            return True
        labelled = self._labelled.get((entry.digest, asked.digest))
        return self._root(entry.digest) == self._root(asked.digest) if labelled is None else labelled

    def right_entry(self, asked: Question) -> Question | None:
        """An entry whose answer is right, if there is one."""
        alike: Iterable[Question] = self._entries.get(self._root(asked.digest), {}).values()
        return next((entry for entry in alike if self.is_right(entry, asked)), None)

    def _learn(self, pair: Pair) -> None:
        a, b = pair.a.digest, pair.b.digest
        self._labelled[a, b] = self._labelled.get((a, b), False) or pair.same
        for digest, name in ((a, pair.class_a), (b, pair.class_b)):
            if name is not None:
                self._join(digest, name)
        if pair.same:
            self._join(a, b)

    def _join(self, a: _Node, b: _Node) -> None:
        self._above[self._root(a)] = self._root(b)

    def _root(self, node: _Node) -> _Node:
        while (above := self._above.setdefault(node, node)) != node:
            # Paths are halved on the way, so that they stay short.
            self._above[node] = self._above[above]
            node = self._above[node]
        return node
