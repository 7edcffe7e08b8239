"""Errors that name the field, the value, and what would work."""

import math


def is_whole(width: float) -> bool:
    """Tell whether `width` is a positive whole number, but for the rounding of a ratio such as 2.6666666667."""
    return math.isfinite(width) and round(width) >= 1 and abs(width - round(width)) < 1e-6 * width


LEAST_TEMPERATURE = 1e-6
"""Below it an answer is greedy, as at 0: logits over less are no finite numbers."""


class NewerFormatError(ValueError):
    """A file that a newer hf_sleep wrote."""


def reject(field: str, value: object, what_works: str) -> ValueError:
    """Make the error of a setting that cannot work, to be raised.

    Args:
        field: with its owner: `"SleepConfig.window_size"`.
        value: what it was given.
        what_works: a main clause.
    """
    return ValueError(f"{field}={value!r} cannot work: {what_works}")


def require_int(field: str, value: object, least: int) -> None:
    """Raise `ValueError` unless `value` is an integer (no bool) of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise reject(field, value, f"it must be an integer of at least {least}")


def require_range(field: str, value: object) -> tuple[float, float]:
    """Return `value`, two finite numbers above zero, the smaller one first, as a tuple, or raise `ValueError`."""
    items = tuple(value) if isinstance(value, tuple | list) else ()
    numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)
    if len(items) != 2 or not numbers or not 0 < items[0] <= items[1] < math.inf:
        raise reject(field, value, "it must be two positive numbers, the smaller one first, such as (0.25, 16.0)")
    return float(items[0]), float(items[1])


def require_int_tuple(field: str, value: object) -> tuple[int, ...]:
    """Return `value` as a tuple of integers, or raise `ValueError`."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise reject(field, value, "it must be a tuple of integers")
    items = tuple(value)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise reject(field, items, "it must be a tuple of integers")
    return items
