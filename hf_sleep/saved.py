"""Sessions as files: what `save` writes, and `load` continues."""

import os
import time
from dataclasses import replace
from typing import Any, Self

import torch

from .held import Held
from .state import SleepState
from .steps import Steps


class Saved:
    """The part of a `SleepSession` that writes files and reads them."""

    steps: Steps
    _held: Held
    _still: Any

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        raise NotImplementedError

    def save(self, path: str | os.PathLike) -> None:
        """Write the memory as a `SleepState`, with where it comes from: titles, counts and digests, and no text.

        A text that must not be consolidated is not in it. What is still in the window, and what sinks and a sliding
        window retain, is there as keys and values, from which it can be guessed. With hard eviction and without sinks
        nothing of it is left after `sleep()`.

        Raises:
            ValueError: a session that has read nothing.
        """
        self.to_state().save(path)

    def to_state(self) -> SleepState:
        """The memory as `save` writes it."""
        with self._still():
            held = self.steps.public(self._held)
            if not held.memory.counters:
                raise ValueError("the session has read nothing: there is nothing to save")
            about = held.about() | {"tokenizer": self.steps.turns.tokenizer_id, "saved": time.time()}
            return replace(SleepState.from_cache(self.steps.model, self.steps.cache(held.memory)), about=about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any, tokenizer: Any, **settings: Any) -> Self:
        """Continue a session that was saved, token for token.

        Args:
            path: what `save` wrote.
            model: the same model.
            tokenizer: the same tokenizer.
            settings: as a new session takes them.

        Raises:
            ValueError: another model or tokenizer, or a file that no session saved.
        """
        return cls.of_state(SleepState.load(path), model, tokenizer, name=str(path), **settings)

    @classmethod
    def of_state(
        cls, state: SleepState, model: Any, tokenizer: Any, *, name: str = "the state", **settings: Any
    ) -> Self:
        """The session of a state, as `load` does it; errors call it `name`."""
        session = cls(model, tokenizer, **settings)
        if state.about is None or len(state.rows) != 1:
            raise ValueError(
                f"{name} is a state of {len(state.rows)} sequences that no session saved: SleepState.to_cache(model) "
                "makes a cache of it"
            )
        if state.about.get("tokenizer") != session.steps.turns.tokenizer_id:
            raise ValueError(f"{name} was read with another tokenizer: load it with the one that it was saved with")
        memory = state.to_cache(session.steps.model).memory.map(torch.clone)
        try:
            session._held = Held.of_file(memory, state.about)
        except ValueError as error:
            raise ValueError(f"{name} cannot be continued: {error}") from error
        return session
