"""Eviction: which KV a sleep drops, how far attention reaches, and how position numbers stay bounded.

To add a style, subclass `Eviction`, set `recent` and `span`, and register it with `@register_eviction("name")`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..memory import Counters
from ..registry import register_eviction


class EvictionPlan(NamedTuple):
    """What one eviction does to the KV of a batch. Tables have one row where all rows of the batch are alike.

    Args:
        columns: `[B or 1, W]`, the held column that stays at each place; of a row that keeps fewer than W, any.
        is_sink: `[B or 1, W]`, whether it is a sink, whose position never changes.
        shift: `[B or 1]`, on the CPU, by how many positions the other keys move, at most 0.
        turns: whether any key has to be turned to another position.
    """

    columns: torch.Tensor
    is_sink: torch.Tensor
    shift: torch.Tensor
    turns: bool


class Eviction:
    """The contract of an eviction style; as it is, it keeps nothing but sinks.

    Args:
        window_size: L, tokens between two sleeps.
        num_sink_tokens: first tokens of a sequence, whose KV always stays.

    Source: Lee et al. 2026 (arXiv 2605.26099), §5; sinks: Xiao et al. 2024 (arXiv 2309.17453).
    """

    recent: int = 0
    """Most recent tokens whose KV outlives a sleep, sinks not counted."""

    span: int | None = None
    """Tokens that a query sees, itself included, besides the sinks; `None`: all whose KV is held."""

    def __init__(self, window_size: int, num_sink_tokens: int = 0):
        self.window_size, self.num_sink_tokens = window_size, num_sink_tokens

    @property
    def most_retained(self) -> int:
        """Tokens whose KV outlives a sleep, at most."""
        return self.num_sink_tokens + self.recent

    @property
    def window_position(self) -> int:
        """Position number at which a window begins once tokens have been dropped."""
        return self.num_sink_tokens + (self.recent + 1 if self.recent else 0)

    @property
    def max_position(self) -> int:
        """One more than the largest position number that any token is ever given, however long the stream."""
        return self.window_position + self.window_size

    def sinks(self, seen: int) -> int:
        """How many of a row's first `seen` tokens are sinks."""
        return min(self.num_sink_tokens, seen)

    def after(self, row: Counters) -> Counters:
        """A row's counters when it has slept."""
        sinks = self.sinks(row.seen)
        retained = sinks + min(self.recent, row.kv_length - sinks)
        return row.after_sleep(retained, min(row.position, self.window_position))

    def drops_window(self, row: Counters) -> bool:
        """Whether a sleep leaves no KV of a row's current window, as its counters after the read say.

        Then no layer after the last fast weights needs to run for it. A style with an `after` or a `plan` of its own
        says no, where it does not override this too.
        """
        if type(self).after is not Eviction.after or type(self).plan is not Eviction.plan:
            return False
        return not self.recent and self.sinks(row.seen) <= row.retained

    def may_leave(self, row: Counters) -> bool:
        """Whether a row can have such counters, as a file of a memory says. Override it where `after` is."""
        slept_on = row.seen - row.fill
        position = row.fill + min(self.window_position, slept_on)
        return (row.retained, row.position) == (min(self.most_retained, slept_on), position)

    def plan(self, rows: Sequence[Counters], device: torch.device) -> EvictionPlan | None:
        """What stays of rows that sleep now, and where it moves.

        Args:
            rows: their counters before the eviction.
            device: of the plan's tables, but for `shift`.

        Returns:
            `None` where nothing stays.
        """
        after = [self.after(row) for row in rows]
        if not (width := max(row.retained for row in after)):
            return None
        table = [
            (self.sinks(old.seen), old.kv_length - new.retained, new.position - old.position)
            for old, new in zip(rows, after, strict=True)
        ]
        plan = torch.tensor(
            table if len({*zip(table, [row.retained for row in after], strict=True)}) > 1 else table[:1]
        )
        column = torch.arange(width)
        is_sink = column < plan[:, :1]
        last = max(row.kv_length for row in rows) - 1
        columns = torch.where(is_sink, column, column + plan[:, 1:2]).clamp(max=last)
        stays = any(new.retained > sinks for new, (sinks, *_) in zip(after, table, strict=True))
        turns = stays and any(shift for *_, shift in table)
        return EvictionPlan(columns.to(device), is_sink.to(device), plan[:, 2], turns)


@register_eviction("hard")
class Hard(Eviction):
    """All of a window's KV goes."""


@register_eviction("sliding")
class Sliding(Eviction):
    """The last L - 1 tokens' KV stays, and attention spans the last L tokens."""

    def __init__(self, window_size: int, num_sink_tokens: int = 0):
        super().__init__(window_size, num_sink_tokens)
        self.recent, self.span = window_size - 1, window_size
