"""Drafts looked up in the text itself: what followed the last time that these tokens stood here.

- in: a text that grows
- out: the tokens that came after the latest earlier place that ended as the text does now
- an index of n-grams, longest first: a token costs a few dictionary entries, whatever came before
- nothing is drafted beyond a special token: what follows the end of a turn is another's to say
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

# The lengths of what must agree, longest first, and the most tokens to offer.
NGRAMS = (8, 5, 3)
MOST = 16


class Lookup:
    """What may follow `text`, which others only ever append to.

    `length` says how many tokens agree, 0 where nothing does. `never` are the special tokens.
    """

    def __init__(self, text: Sequence[int], never: Collection[int] = ()):
        self._text, self._never = text, never
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in NGRAMS]
        self._known = 0
        self._at = 0
        self.length = 0
        self.update()

    def update(self) -> list[tuple[int, bool]]:
        """Take in what has been appended: for each token of it that something was found for, how
        many tokens had agreed, and whether it was what would have been offered."""
        text, found = self._text, []
        while self._known < len(text):
            if self.length:
                found.append((self.length, text[self._at] == text[self._known]))
            self._known = end = self._known + 1
            self.length = 0
            for n, places in zip(NGRAMS, self._places, strict=True):
                if n > end:
                    continue
                key = tuple(text[end - n : end])
                if not self.length and key in places:
                    self.length, self._at = n, places[key]
                places[key] = end
        return found

    def offer(self, most: int = MOST) -> list[int]:
        """Up to `most` tokens that may come next; none where nothing was found."""
        if not self.length:
            return []
        text, at = self._text, self._at
        offered: list[int] = []
        for i in range(min(most, MOST)):
            # What reaches the end of the text goes on with what is offered itself.
            place = at + i
            token = text[place] if place < self._known else offered[place - self._known]
            if token in self._never:
                break
            offered.append(token)
        return offered
