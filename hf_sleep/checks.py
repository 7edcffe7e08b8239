"""Errors that name the field, the value, and what would work."""

import math


def is_whole(width: float) -> bool:
    """Tell whether `width` is a positive whole number, but for the rounding of a ratio such as 2.6666666667."""
    return math.isfinite(width) and round(width) >= 1 and abs(width - round(width)) < 1e-6 * width


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


def require_int_tuple(field: str, value: object) -> tuple[int, ...]:
    """Return `value` as a tuple of integers, or raise `ValueError`."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise reject(field, value, "it must be a tuple of integers")
    items = tuple(value)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise reject(field, items, "it must be a tuple of integers")
    return items
