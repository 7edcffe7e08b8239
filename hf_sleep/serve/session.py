"""ServedSession: a session, and what a server asks of it besides."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..session import SleepSession
from ..turns import MODEL, NOBODY


class ServedSession(SleepSession):
    """A `SleepSession` that counts its bytes, takes turns that others had, and continues a text as it stands."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read yet."""
        return not self._held.memory.counters

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self._held.row.seen

    def num_bytes(self) -> int:
        """Bytes of all tensors that are held, each storage once: what is read now, and what can be gone back to."""
        sizes: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return t

        for held in (self._held, self._before, *(self._rested or ())):
            for memory in () if held is None else held.memories():
                memory.map(note)
        return sum(sizes.values())

    def replay(self, question: str, answer: str, **generation: Any) -> None:
        """Keep a turn that took place elsewhere, as if this session had answered so.

        Args:
            question: in the reader's words.
            answer: that was given.
            generation: keywords for `generate` that decide whether to sleep before it, as they do in `ask`.
        """
        with self._step():
            prompt = self.steps.turns.asking(self._held.speaking, question)
            held = self._before_turn(self.steps, prompt, generation)
            held = self.steps.read_all(held, prompt + self.steps.turns.encode(answer))
            self._held = replace(held, speaking=MODEL)

    def complete(self, text: str | Sequence[int], *, remember: bool = False, **generation: Any) -> None:
        """Continue a text as it stands, without a template; a streamer tells how.

        Args:
            text: a string, or ids.
            remember: keep the text, and how it was continued.
            generation: for `generate`.

        Raises:
            ValueError: no text at all.
        """
        with self._step() if remember else self._still():
            turns = replace(self.steps.turns, opening="", adds_special=True)
            ids = turns.encode(text) if isinstance(text, str) else list(text)
            if self._held.speaking == NOBODY and isinstance(text, str):
                ids = turns.entering(NOBODY) + ids
            if not ids:
                raise ValueError("there is nothing to continue: the prompt has no tokens")
            held, _ = self.steps.answer(self._held, ids, generation)
            if remember and held is not None:
                self._held = held
