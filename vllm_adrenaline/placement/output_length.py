"""How long answers get, learned from those that ended."""

from __future__ import annotations

import bisect
import itertools
from collections import deque


class OutputLengths:
    """Lengths of the last answers that ended. `max_tokens` alone says little about most requests.

    The last `KEPT` answers count. Before `ENOUGH` of them ended, an answer is expected to grow by `PRIOR` tokens.
    """

    KEPT, ENOUGH, PRIOR = 256, 16, 256

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=self.KEPT)
        self._sorted: list[int] = []
        self._means_from: list[float] = []

    def ended(self, tokens: int) -> None:
        """Note the length of an answer that ended by itself or at its limit.

        Args:
            tokens: How many tokens the answer has.
        """
        self._recent.append(tokens)
        self._sorted = sorted(self._recent)
        sums = itertools.accumulate(reversed(self._sorted))
        self._means_from = [total / (i + 1) for i, total in enumerate(sums)][::-1]

    def expected_growth(self, generated: int, limit: int) -> int:
        """Return how many more tokens to expect of an answer.

        Args:
            generated: Tokens that it has.
            limit: Tokens that it has at most.
        """
        most = max(0, limit - generated)
        longer = bisect.bisect_right(self._sorted, generated)
        if len(self._sorted) < self.ENOUGH or longer == len(self._sorted):
            return min(most, self.PRIOR)
        return min(most, round(self._means_from[longer]) - generated)
