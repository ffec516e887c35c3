"""An index of texts by their beginnings: a radix tree.

- in: items, each with its text, in tokens, and the shortest beginning of it that is of use
- out: the items that share a useful beginning with another text, the longest beginning first
- nothing here knows what the items are
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class PrefixTree(Generic[Item]):
    """Items by their texts."""

    def __init__(self) -> None:
        self._root: _Node[Item] = _Node([], 0)

    def add(self, text: Sequence[int], least: int, item: Item) -> None:
        """Add an item of which at least the first `least` tokens must be used."""
        node, at = self._root, 0
        node.least = min(node.least, least)
        while at < len(text):
            if not (child := node.children.get(text[at])):
                child = node.children[text[at]] = _Node(text[at:], len(text))
            elif (common := common_start(child.label, text[at : child.end])) < len(child.label):
                child = node.children[text[at]] = child.split(common)
            node, at = child, child.end
            node.least = min(node.least, least)
        node.items[item] = least

    def remove(self, text: Sequence[int], item: Item) -> None:
        """Remove an item that was added with this text."""
        path = [*self._along(text)]
        del path[-1][1].items[item]
        for (at, above), (_, node) in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
            if not node.items and not node.children:
                del above.children[text[at]]
            node.count()
        self._root.count()

    def alike(self, text: Sequence[int]) -> Iterator[tuple[int, Item]]:
        """Items by how many tokens they share with the beginning of `text`, the most first; without
        those for which that is too few. The tree must not change meanwhile."""
        below = None
        for common, node in [*self._along(text)][::-1]:
            yield from ((common, item) for item in node.items_below(common, below))
            below = node

    def within(self, text: Sequence[int], least: int) -> list[Item]:
        """The items whose whole text, of at least `least` tokens, `text` begins with."""
        path = [node for at, node in self._along(text) if least <= at == node.end]
        return [item for node in path for item in node.items]

    def _along(self, text: Sequence[int]) -> Iterator[tuple[int, _Node[Item]]]:
        """The nodes from the root on that share a beginning with `text`, and its length."""
        node, at = self._root, 0
        yield at, node
        while at == node.end < len(text) and (child := node.children.get(text[at])):
            node, at = child, at + common_start(child.label, text[at : child.end])
            yield at, node


class _Node(Generic[Item]):
    """Items whose text of `end` tokens ends here, with what each needs, and the texts that go on.
    `label` is the text's last part, `least` the least that any item from here on needs."""

    def __init__(self, label: Sequence[int], end: int) -> None:
        self.label, self.end = label, end
        self.children: dict[int, _Node[Item]] = {}
        self.items: dict[Item, float] = {}
        self.least = float("inf")

    def split(self, at: int) -> _Node[Item]:
        """A node for the first `at` tokens of the label, with this one below it."""
        upper: _Node[Item] = _Node(self.label[:at], self.end - len(self.label) + at)
        self.label, upper.least = self.label[at:], self.least
        upper.children[self.label[0]] = self
        return upper

    def count(self) -> None:
        """Work out `least` again."""
        needs = [*self.items.values(), *(child.least for child in self.children.values())]
        self.least = min(needs, default=float("inf"))

    def items_below(self, most: int, but: _Node[Item] | None) -> Iterator[Item]:
        """Items from here on that need at most `most` tokens, except those in the child `but`."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            yield from (item for item, least in node.items.items() if least <= most)
            nodes += [c for c in node.children.values() if c is not but and c.least <= most]


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two texts, in tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
