"""The algorithm: read a window in one pass, consolidate it with N, evict its KV.

The ordinary read of a window is pass 1, so a window that was read token by token needs only N - 1 passes more. All that
crosses a call is a `Memory`, a value: each step takes one and returns the next. The layers are slots in running order:
those before the loop run once per window, those in the loop N times, those after it once, on the last pass's output.

Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .bases.decoder import Decoder
from .engine.between import Between
from .engine.eviction import Eviction
from .engine.passes import PassPolicy
from .engine.slots import RunningOrder
from .engine.watch import Watchers
from .engine.window import Append, Read, Span, Window
from .memory import Carried, Counters, Memory


@dataclass(frozen=True)
class Sleeper:
    """Runs a base's layers and its fast-weight blocks over windows.

    Args:
        decoder: says how the base's layers are run.
        order: every layer in running order, and which of them loop.
        eviction: which KV outlives a sleep.
        between: what happens between two passes.
        watchers: who is told of passes and sleeps.
        is_checkpointing: compute each (window, pass) again in the backward instead of keeping its activations.
    """

    decoder: Decoder
    order: RunningOrder
    eviction: Eviction
    between: Between
    watchers: Watchers
    is_checkpointing: bool = False

    def empty(self, batch_size: int, dtype: torch.dtype) -> Memory:
        """The memory of sequences that have read nothing: S = 0. `dtype` is the activations'."""
        carried = self.order.empty(batch_size, dtype)
        return Memory((Counters(),) * batch_size, carried, self.order.window_start(carried))

    def read(
        self,
        memory: Memory,
        x: torch.Tensor,
        counts: list[int],
        policy: PassPolicy,
        wanted: list[list[bool]] | None = None,
        backprop_windows: int | None = None,
    ) -> tuple[Memory, list[Read]]:
        """Read tokens, sleeping whenever a window is full and another token comes.

        Args:
            memory: of as many rows as `x`.
            x: embeddings `[B, T, C]`, rows left-aligned.
            counts: real tokens per row.
            policy: N of every sleep on the way.
            wanted: per row and token, whether its output is needed; `None` for all.
            backprop_windows: cut a row's graph after every so many of its sleeps; `None`: never.

        Returns:
            The memory after it, and a `Read` per window.
        """
        size, reads = self.eviction.window_size, []
        done, slept = [0] * len(counts), [0] * len(counts)
        while any(done[b] < n for b, n in enumerate(counts)):
            full = [b for b, row in enumerate(memory.counters) if done[b] < counts[b] and row.fill == size]
            memory = self.sleep(memory, full, policy)
            for b in full:
                slept[b] += 1
            if backprop_windows is not None:
                memory = memory.detach_rows([b for b in full if slept[b] % backprop_windows == 0])
            span = Span.next(memory, done, counts, size, wanted)
            # A window that sleeps within this call runs its tail then: only its logits would need it now.
            tail_can_wait = span.sleeps_next and policy.at_least > 1 and not span.is_wanted
            memory, hidden = self.wake(memory, span, span.of(x), run_tail=not tail_can_wait)
            for b, n in zip(span.rows, span.counts, strict=True):
                done[b] += n
            reads.append(Read(span, hidden if span.is_wanted else None))
        return memory, reads

    def wake(self, memory: Memory, span: Span, x: torch.Tensor, run_tail: bool = True) -> tuple[Memory, torch.Tensor]:
        """One ordinary pass over new tokens of the current windows: pass 1.

        Args:
            memory: of the batch.
            span: which rows read how many tokens.
            x: the tokens, `[rows, T, C]`.
            run_tail: whether the slots after the loop are needed now.

        Returns:
            The memory after it, and `[rows, T, C]`, what `Decoder.logits` takes.
        """
        part = memory.select(span.rows)
        window = Window.of_new(self.decoder, self.eviction, x, part.counters, span.counts)
        append = Append([row.fill for row in part.counters], span.counts, x.device)
        slots, carried, loop_input = range(self.order.loop.stop), part.carried, None
        if self.between.needs_loop_input:
            x, carried = self._run(self.order.head, x, carried, window)
            slots, loop_input = self.order.loop, append(part.loop_input, x)
        x, carried = self._run(slots, x, carried, window)
        hidden = append(None if part.hidden is None else part.hidden.to(x.device), x)
        if run_tail:
            x, carried = self._run(self.order.tail, x, carried, window)
        counters = tuple(row.after_reading(n) for row, n in zip(part.counters, span.counts, strict=True))
        part = Memory(counters, carried, part.window_start, hidden, loop_input, part.columns)
        return memory.merge(span.rows, part), x

    def sleep(self, memory: Memory, rows: Sequence[int], policy: PassPolicy) -> Memory:
        """Consolidate the current windows of `rows`, then evict their KV.

        Rows that have read nothing since their last sleep are left alone. Under a policy that looks at the data, rows
        sleep one after the other, so that none depends on another.
        """
        asleep = [b for b in rows if memory.counters[b].fill]
        for group in [[b] for b in asleep] if policy.depends_on_data else [asleep] if asleep else []:
            part = memory.select(group)
            device = self._window_hidden(part).device
            began = self.watchers.clock(device)
            part, passes = self.consolidate(part, policy)
            memory = memory.merge(group, self.evict(part))
            self.watchers.tell_sleep(group, memory.counters, self.watchers.clock(device) - began, passes)
        return memory

    def consolidate(self, memory: Memory, policy: PassPolicy) -> tuple[Memory, int]:
        """Write the fast weights: passes 2 to N over the current window of every row.

        Every pass starts from the fast weights that the pass before left and from the convolution tail of the window's
        start, and sees the retained KV and its own. The slots after the loop read the window once more, on the last
        pass's output and from their state at the window's start, so that they too have read it once.

        Returns:
            The memory after it, and N.
        """
        order, carried, number, before = self.order, memory.carried, 1, None
        self.watchers.tell_pass(number, order.looped(carried))
        if policy.at_most == 1:
            return memory, 1
        x, start, policy = self._window_hidden(memory), order.at_start(memory), policy.begin()
        window = Window.again(self.decoder, self.eviction, x, memory.counters)
        while policy.another(number, before, written := self._written(carried, policy)):
            x = self.between(x, memory.loop_input)
            x, carried = self._run(order.loop, x, order.rewound(order.loop, carried, start), window)
            number, before = number + 1, written
            self.watchers.tell_pass(number, order.looped(carried))
        if number > 1:
            _, carried = self._run(order.tail, x, order.rewound(order.tail, carried, start), window)
        return replace(memory, carried=tuple(carried)), number

    def evict(self, memory: Memory) -> Memory:
        """Drop the KV that the eviction style drops, of windows that were slept on; new windows begin."""
        carried = self.order.evicted(
            memory.carried, self.eviction.plan(memory.counters, self._window_hidden(memory).device)
        )
        counters = tuple(map(self.eviction.after, memory.counters))
        return Memory(counters, carried, self.order.window_start(carried), columns=memory.columns)

    def _run(
        self, slots: range, x: torch.Tensor, carried: Sequence[Carried], window: Window
    ) -> tuple[torch.Tensor, tuple[Carried, ...]]:
        return self.order.run(slots, x, carried, window, self.is_checkpointing)

    @staticmethod
    def _window_hidden(memory: Memory) -> torch.Tensor:
        """What pass 1 made of the current windows, `[B, T, C]`."""
        assert memory.hidden is not None  # a row with tokens in its window has read them
        return memory.hidden[:, : max(row.fill for row in memory.counters)]

    def _written(self, carried: Sequence[Carried], policy: PassPolicy) -> list[torch.Tensor] | None:
        """What a policy that looks at the data is shown: the fast weights of the one row, `[H, K, V]` each."""
        return [state[0] for state in self.order.looped(carried)] if policy.depends_on_data else None
