"""State passing: rows begin with the fast weights that rows of the batch before ended with."""

import random
from dataclasses import replace
from typing import Any

import torch

from ..cache import SleepCache
from ..engine import FixedPasses, Watchers
from ..memory import Counters, FastWeights, Memory


class PassedStates:
    """What rows of one training batch hand on to rows of the next, without their KV and without a gradient.

    Args:
        share: of the optimizer steps whose rows begin so; the rows of the others begin with nothing.
        seed: of the draws. Those of a step depend on the seed and the step alone.

    Source: Buitrago and Gu 2025 (arXiv 2507.02782), state passing.
    """

    def __init__(self, share: float, seed: int):
        self.share, self.seed = share, seed
        self._last: SleepCache | None = None

    def begin(self, rows: int, step: int) -> SleepCache:
        """What a batch of `rows` rows, in the step that comes after `step` others, is read into.

        Every row begins with what another row, drawn at random, left; where the last batch had fewer, with what some
        other row begins with too.
        """
        # A string seeds through SHA-512, so that neighbouring steps are unrelated.
        rng = random.Random(f"{self.seed}/{step}")
        if self._last is None or rng.random() >= self.share:
            return SleepCache()
        cache, held = self._last.fork(), self._last.batch_size
        order = rng.sample(range(held), held)
        cache.memory = cache.memory.select([order[row % held] for row in range(rows)])
        return cache

    def end(self, model: Any, cache: SleepCache) -> None:
        """Keep what the rows of a batch left in `cache`: their fast weights, as if that were where a text begins."""
        cache.memory = cache.memory.map(torch.Tensor.detach)
        sleeper = replace(model._sleeper(), watchers=Watchers())
        with torch.no_grad():  # the one pass is over: this only evicts, and is no sleep to be told of
            memory = sleeper.sleep(cache.memory, range(cache.batch_size), FixedPasses(1))
        carried = tuple(pair if isinstance(pair, FastWeights) else None for pair in memory.carried)
        cache.memory = Memory((Counters(),) * cache.batch_size, carried, memory.window_start)
        self._last = cache
