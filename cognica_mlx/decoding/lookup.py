"""Drafts looked up in the text itself: what followed the last time these tokens occurred.

- in: a text that grows
- out: the tokens that followed the latest earlier occurrence of the text's last tokens
- an index of n-grams, longest first: each token costs a few dictionary entries, however long the
  text
- nothing is drafted beyond a special token: after the end of a turn, someone else speaks
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

# Lengths of n-grams that must match, longest first, and the most tokens to offer.
NGRAMS = (8, 5, 3)
MOST = 16


class Lookup:
    """Looks up what may follow `text`, which may only be appended to.

    `length` is the length of the current match, 0 if there is none. `never` are the special tokens.
    """

    def __init__(self, text: Sequence[int], never: Collection[int] = ()):
        self._text, self._never = text, never
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in NGRAMS]
        self._known = 0
        self._at = 0
        self.length = 0
        self.update()

    def update(self) -> list[tuple[int, bool]]:
        """Index the tokens appended since the last call. For each that had a match: the length of
        the match, and whether the token was the one that would have been offered."""
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
        """Up to `most` tokens that may come next; empty without a match."""
        if not self.length:
            return []
        text, at = self._text, self._at
        offered: list[int] = []
        for i in range(min(most, MOST)):
            # Past the end of the text, continue with the tokens already offered.
            place = at + i
            token = text[place] if place < self._known else offered[place - self._known]
            if token in self._never:
                break
            offered.append(token)
        return offered
