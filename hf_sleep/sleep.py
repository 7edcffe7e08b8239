"""The algorithm: read a window in one pass, consolidate it with N, evict its KV.

The paper's Algorithm 1, and where it is:

    S <- 0                                        Sleeper.empty
    for each window:                              Sleeper.read, row by row: windows count a row's own tokens
        h <- Embed(c)                             outside this file: `read` takes embeddings
        h, S <- Blocks(h, S)                      Sleeper.wake: the ordinary read is pass 1, of every window
        repeat N - 1 times: h, S <- Blocks(h, S)  Sleeper.consolidate, when another token comes after a full window
        drop h and the KV cache                   Sleeper.evict; consolidate + evict = Sleeper.sleep
        loss <- MaskedCE(OutProj(h), c, m)        outside this file: `read` returns what the head takes

A window sleeps late: before the token that does not fit in it, which a later call may bring, with its N. So the last
window does not sleep, and no mask has to say which windows do. One with labels that is not the last sleeps too; its
loss is that of pass 1. In Algorithm 1, whose labels are all in the last window, this is the same. The layers are slots
in running order: those before the loop run once per window, those in the loop N times, those after it once, on the last
pass's output. All that crosses a call is a `Memory`, a value: each step takes one and returns the next.

Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from .bases.decoder import Decoder
from .engine.between import Between
from .engine.eviction import Eviction
from .engine.passes import PassPolicy
from .engine.slots import RunningOrder, among
from .engine.static import Buffers, read_token
from .engine.watch import PassEvent, Watchers
from .engine.window import Append, Read, Span, Window, in_pieces
from .memory import Carried, Counters, Memory


@dataclass(frozen=True)
class Sleeper:
    """Runs a base's layers and its fast-weight blocks over windows.

    Args:
        decoder: says how the base's layers are run.
        order: every layer in running order, and which of them loop.
        eviction: which KV outlives a sleep.
        between: what happens between two passes.
        decay_once: passes 2 to N over a window do not decay what earlier windows wrote.
        watchers: who is told of passes and sleeps.
        is_checkpointing: compute each (window, pass) again in the backward instead of keeping its activations.
        around_sleep: what every sleep runs in.
    """

    decoder: Decoder
    order: RunningOrder
    eviction: Eviction
    between: Between
    watchers: Watchers
    decay_once: bool = False
    is_checkpointing: bool = False
    around_sleep: Callable[[], AbstractContextManager] = nullcontext

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
        sleep_after: list[list[int]] | None = None,
    ) -> tuple[Memory, list[Read]]:
        """Read tokens, sleeping whenever a window is full and another token comes.

        Args:
            memory: of as many rows as `x`.
            x: embeddings `[B, T, C]`, rows left-aligned.
            counts: real tokens per row.
            policy: N of every sleep on the way.
            wanted: per row and token, whether its output is needed; `None` for all.
            backprop_windows: cut a row's graph after every so many of its sleeps; `None`: never.
            sleep_after: per row, after how many of its tokens it sleeps whatever its window holds, ascending; `None`:
                nowhere.

        Returns:
            The memory after it, and a `Read` per window.
        """
        size, told = self.eviction.window_size, sleep_after or [[]] * len(counts)
        reads: list[Read] = []
        done, slept = [0] * len(counts), [0] * len(counts)
        pieces = {0: x} if any(told) else in_pieces(x, [row.fill for row in memory.counters], size)
        while True:
            due = [
                b
                for b, row in enumerate(memory.counters)
                if (row.fill and done[b] in told[b]) or (row.fill == size and done[b] < counts[b])
            ]
            memory = self.sleep(memory, due, policy)
            for b in due:
                slept[b] += 1
            if backprop_windows is not None:
                memory = memory.detach_rows([b for b in due if slept[b] % backprop_windows == 0])
            if done == counts:
                return memory, reads
            span = Span.next(memory, done, counts, size, wanted, told)
            memory, hidden = self.wake(memory, span, span.of(pieces), self._wanted_now(memory, span, policy))
            for b, n in zip(span.rows, span.counts, strict=True):
                done[b] += n
            reads.append(Read(span, hidden if span.is_wanted else None))

    def wake(
        self, memory: Memory, span: Span, x: torch.Tensor, wanted: range | None = None
    ) -> tuple[Memory, torch.Tensor]:
        """One ordinary pass over new tokens of the current windows: pass 1.

        Args:
            memory: of the batch.
            span: which rows read how many tokens.
            x: the tokens, `[rows, T, C]`.
            wanted: the slots that are needed now, from the first on; `None`: all.

        Returns:
            The memory after it, and `[rows, T, C]`: of all slots, what `Decoder.logits` takes.
        """
        order = self.order
        wanted = order.all if wanted is None else wanted
        part = memory.select(span.rows)
        window = Window.of_new(self.decoder, self.eviction, x, part.counters, span.counts)
        append = Append([row.fill for row in part.counters], span.counts, x.device)
        loop_input = None
        if self.between.needs_loop_input:
            x, carried = self._run(among(order.before, wanted), x, part.carried, window)
            loop_input = append(None if part.loop_input is None else part.loop_input.to(x.device), x)
            x, carried = self._run(among(order.loop, wanted), x, carried, window)
        else:
            x, carried = self._run(among(order.up_to_loop, wanted), x, part.carried, window)
        loop_output = append(None if part.loop_output is None else part.loop_output.to(x.device), x)
        x, carried = self._run(among(order.after, wanted), x, carried, window)
        counters = tuple(row.after_reading(n) for row, n in zip(part.counters, span.counts, strict=True))
        part = Memory(counters, carried, part.window_start, loop_output, loop_input, part.columns)
        return memory.merge(span.rows, part), x

    def read_token(self, buffers: Buffers) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`wake` on one token of every row, in place: `engine.static.read_token`."""
        return read_token(self.decoder, self.order, self.eviction, buffers)

    def sleep(self, memory: Memory, rows: Sequence[int], policy: PassPolicy) -> Memory:
        """Consolidate the current windows of `rows`, then evict their KV.

        Rows that have read nothing since their last sleep are left alone. Under a policy that looks at the data, rows
        sleep one after the other, so that none depends on another.
        """
        rows = [b for b in rows if memory.counters[b].fill]
        groups = [[b] for b in rows] if policy.depends_on_data else [rows]
        for group in filter(None, groups):
            part = memory.select(group)
            began = self.watchers.clock(part.device)
            with self.around_sleep():
                part, passes = self.consolidate(part, policy)
            memory = memory.merge(group, self.evict(part))
            self.watchers.tell_sleep(group, memory, self.watchers.clock(part.device) - began, passes)
        return memory

    def consolidate(self, memory: Memory, policy: PassPolicy) -> tuple[Memory, int]:
        """Write the fast weights: passes 2 to N over the current window of every row.

        In the loop every pass continues the fast weights of the pass before, and all else starts over: the convolution
        from where it was when the window began, the KV from what the last eviction retained. With `decay_once` they
        only write, as an epoch more of the same rule over the same tokens would. The slots after the loop
        start over whole, fast weights too, and read the window once, on the last pass's output.

        Returns:
            The memory after it, and N.
        """
        order, carried, number = self.order, memory.carried, 1
        x, loop_input = memory.current_window()
        counts = [row.fill for row in memory.counters]
        self.watchers.tell_pass(PassEvent(number, order.looped(carried), x, loop_input, counts))
        if policy.at_most == 1:
            return memory, number
        window = Window.again(self.decoder, self.eviction, x, memory.counters)
        again = replace(window, decays=not self.decay_once)
        start = order.at_start(memory)
        asked = policy.begin()
        remembered = self.remembered(memory.counters)
        previous, written = None, self._shown(carried, asked)
        while policy.continues(asked, number, previous, written):
            number += 1
            # What the last pass makes of the window is for the slots after the loop, and for who watches.
            is_last = number == policy.at_most and not self.watchers.of_passes
            loop = among(order.loop, remembered) if is_last else order.loop
            x = self.between(x, loop_input)
            x, carried = self._run(loop, x, order.rewound(loop, carried, start), again)
            self.watchers.tell_pass(PassEvent(number, order.looped(carried), x, loop_input, counts))
            previous, written = written, self._shown(carried, asked)
        if number > 1:
            after = among(order.after, remembered)
            _, carried = self._run(after, x, order.rewound(after, carried, start), window)
        return replace(memory, carried=carried), number

    def evict(self, memory: Memory) -> Memory:
        """Drop the KV that the eviction style drops, of windows that were slept on; new windows begin."""
        plan = self.eviction.plan(memory.counters, memory.device)
        carried = self.order.evicted(memory.carried, plan)
        counters = tuple(map(self.eviction.after, memory.counters))
        return Memory(counters, carried, self.order.window_start(carried), columns=memory.columns)

    def _wanted_now(self, memory: Memory, span: Span, policy: PassPolicy) -> range:
        """The slots that a span has to run, from the first on, where all its rows sleep next.

        The slots after the loop read a window once more in its sleep, from where they stand now. So before a second
        pass only logits would need them.
        """
        order = self.order
        if span.is_wanted or not span.sleeps_next:
            return order.all
        rows = [memory.counters[b].after_reading(n) for b, n in zip(span.rows, span.counts, strict=True)]
        remembered = self.remembered(rows)
        if policy.at_most == 1 and not self.watchers.of_passes:
            return remembered
        return order.up_to_loop if policy.at_least > 1 else max(remembered, order.up_to_loop, key=len)

    def remembered(self, rows: Sequence[Counters]) -> range:
        """The slots in which anything is left of the current windows when these rows have slept, from the first on."""
        return self.order.up_to_memory if all(map(self.eviction.drops_window, rows)) else self.order.all

    def _run(
        self, slots: range, x: torch.Tensor, carried: Sequence[Carried], window: Window
    ) -> tuple[torch.Tensor, tuple[Carried, ...]]:
        return self.order.run(slots, x, carried, window, self.is_checkpointing)

    def _shown(self, carried: Sequence[Carried], policy: PassPolicy) -> list[torch.Tensor] | None:
        """What a policy that looks at the data is shown: the fast weights of the one row, `[H, K, V]` each."""
        return [state[0] for state in self.order.looped(carried)] if policy.depends_on_data else None
