"""Which source serves which optimizer step: a pure function of the step and the sources' weights."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Deals whole optimizer steps to sources in proportion to their weights.

    After any number n of steps a source of share w has served floor(n w) or ceil(n w) of them: the quota
    method (Balinski and Young 1975). A step goes to the source whose next one is due first, among those that
    have served fewer than their share of the steps up to this one. Equal weights give 0, 1, 2, 0, 1, 2, ...
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights above 0. They are taken as the decimal numbers that were written: 0.1 is a tenth."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = math.gcd(*whole)
        # After as many steps as the weights add up to, all have exactly their share: the dealing repeats.
        self._weights = [weight // common for weight in whole]
        self._period = sum(self._weights)
        self._served = [0] * len(self._weights)
        self._sources, self._turns = array("L"), array("Q")

    def serve(self, step: int) -> tuple[int, int]:
        """(source, turn) of an optimizer step from 0: turn counts the source's own earlier steps.

        Steps are dealt up to the one that is asked for, once: about a microsecond each and source.
        """
        periods, step = divmod(step, self._period)
        while len(self._sources) <= step:
            self._deal()
        source = self._sources[step]
        return source, periods * self._weights[source] + self._turns[step]

    def _deal(self) -> None:
        number = len(self._sources) + 1
        due: tuple[int, int, int] | None = None
        for source, (weight, served) in enumerate(zip(self._weights, self._served, strict=True)):
            if served * self._period >= number * weight:
                continue
            # (served + 1) / weight is when its next step is due; the first of equals wins.
            if due is None or (served + 1) * due[1] < due[0] * weight:
                due = served + 1, weight, source
        assert due is not None
        self._sources.append(due[2])
        self._turns.append(self._served[due[2]])
        self._served[due[2]] += 1
