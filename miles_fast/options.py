"""Options of programs that are numbers within limits: what argparse reads them by."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any


def number(kind: type, allowed: Callable[[Any], bool], meant: str) -> Callable[[str], Any]:
    """A reader of numbers of this kind that are allowed; `meant` says which those are.

    It raises argparse.ArgumentTypeError for others.
    """

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r}: write {meant}")
        return value

    return read


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""
    return number(int, lambda value: value >= least, f"a whole number, {least} or greater")


above_zero = number(float, lambda value: 0 < value < math.inf, "a number above 0")


def refuse_unused(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str], why: str
) -> None:
    """End the program where one of these options, which do nothing here, was given; `why` says why not."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does nothing {why}; leave it out")
