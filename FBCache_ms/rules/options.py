"""A field of CacheConfig: its kind, range, default and text, from which its checks and its words follow."""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Optional, Tuple


@dataclass(frozen=True)
class Option:
    """What a user may set, under a name of its own.

    Args:
        default: its value where nothing is said.
        kind: Real, Integral, str or tuple.
        allowed: an interval (low, high), either end None; the words; or the least and the most entries of a tuple.
        group: what it belongs to, on the command line.
        text: what it does.
        used_with: a field and its values without which this one would have no effect; None: it always has.
        digits: whether a tuple's entries are 0 and 1, in text with nothing between them.
        shapes_graph: whether another value is another graph; else it is a number that goes into the graph.
        fitted_to: mindone's transformer that the default was fitted to, where it says little of any other.
    """

    default: Any
    kind: type
    allowed: Tuple
    group: str
    text: str
    used_with: Optional[Tuple[str, Tuple[str, ...]]] = None
    digits: bool = False
    shapes_graph: bool = False
    fitted_to: Optional[str] = None

    def used(self, used_with):
        """The same option, used with another field's values alone."""
        return replace(self, used_with=used_with)

    @property
    def range(self):
        """What is allowed, in words."""
        if self.kind is str:
            return "one of " + ", ".join(self.allowed)
        if self.kind is tuple:
            fewest, most = self.allowed
            number = f"{fewest} or more" if most is None else f"{fewest} to {most}"
            return f"{number} digits 0 and 1" if self.digits else f"{number} numbers, in text with / between them"
        low, high = self.allowed
        if self.kind is Integral:
            return f"a whole number from {low} on"
        return f"a number from {low} on" if high is None else f"a number in [{low}, {high}]"

    def parse(self, name, text):
        """The value from its text in a tag or on the command line. Raises ValueError for what is none."""
        try:
            if self.kind is tuple:
                return tuple(map(int, text)) if self.digits else tuple(float(number) for number in text.split("/"))
            return {Real: float, Integral: int, str: str}[self.kind](text)
        except ValueError:
            raise ValueError(f"{name} must be {self.range}, not {text!r}") from None

    def checked(self, name, value):
        """The value as it is kept. Raises TypeError or ValueError, naming it, for one that is not allowed."""
        message = f"{name} must be {self.range}, not {value!r}"
        if value is None and self.default is None:
            return None
        if self.kind is str:
            if not isinstance(value, str):
                raise TypeError(message)
            if value not in self.allowed:
                raise ValueError(message + did_you_mean(value, self.allowed))
            return value
        if self.kind is tuple:
            return self._checked_tuple(value, message)
        if isinstance(value, bool) or not isinstance(value, self.kind):
            raise TypeError(message)
        low, high = self.allowed
        if not is_finite(value) or value < low or high is not None and value > high:
            raise ValueError(message)
        return int(value) if self.kind is Integral else float(value)

    def _checked_tuple(self, value, message):
        try:
            values = tuple(value)
        except TypeError:
            raise TypeError(message) from None
        if any(isinstance(number, bool) or not isinstance(number, Real) for number in values):
            raise TypeError(message)
        fewest, most = self.allowed
        if len(values) < fewest or most is not None and len(values) > most or not all(map(is_finite, values)):
            raise ValueError(message)
        if self.digits and not set(values) <= {0, 1}:
            raise ValueError(message)
        return tuple(map(int if self.digits else float, values))


def is_finite(number):
    """Whether a number is a finite one, which float can hold."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def value_text(value):
    """A field's value in a tag: the inverse of Option.parse."""
    if isinstance(value, tuple):
        digits = set(value) <= {0, 1} and not any(isinstance(number, float) for number in value)
        return ("" if digits else "/").join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def did_you_mean(word, allowed):
    """The end of an error's message: a question that names the nearest allowed word, or nothing if none is near."""
    words = {str(name).lower(): name for name in allowed}
    near = get_close_matches(str(word).lower(), words, 1)
    return f"; did you mean {words[near[0]]}?" if near else ""
