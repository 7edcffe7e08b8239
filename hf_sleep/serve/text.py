"""Answers on their way: pieces of text as they are final, cut at a stop, and counted."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..engine import SleepEvent
from ..streaming import Pieces
from .errors import Gone

LONGEST_STOP = 64
"""Characters, and so at most as many tokens that can hold one."""


class Cut:
    """Text in pieces, up to the first of some stops and without the space around it.

    Args:
        stops: that end it, and are not part of it.
        stripped: whether space at both ends goes.
    """

    def __init__(self, stops: Sequence[str], stripped: bool):
        self.stops, self.stripped = stops, stripped
        self.waiting, self.has_begun, self.is_over = "", not stripped, False

    def feed(self, text: str) -> str:
        """What is certain now, with `text` after all that came before it."""
        if self.is_over:
            return ""
        self.waiting += text
        found = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        if found:
            self.waiting = self.waiting[: min(found)]
            said, self.is_over = self.end(), True
            return said
        sure = len(self.waiting) - self._held_back()
        said = self.waiting[:sure].rstrip() if self.stripped else self.waiting[:sure]
        return self._give(len(said))

    def end(self) -> str:
        """The rest."""
        if self.is_over:
            return ""
        said = self.waiting.rstrip() if self.stripped else self.waiting
        said, self.waiting = self._give(len(said)), ""
        return said

    def _held_back(self) -> int:
        """Characters at the end with which a stop may begin."""
        text = self.waiting
        return max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def _give(self, length: int) -> str:
        said, self.waiting = self.waiting[:length], self.waiting[length:]
        if not self.has_begun:
            said = said.lstrip()
            self.has_begun = bool(said)
        return said


class Listener(StoppingCriteria):
    """Ends an answer at a stop, and drops it when nobody listens any more.

    Args:
        tokenizer: decodes.
        stops: that end the answer.
        is_gone: whether nobody listens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], is_gone: Callable[[], bool]):
        self.tokenizer, self.stops, self.is_gone = tokenizer, stops, is_gone
        self.start: int | None = None
        self.has_stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if self.is_gone():
            raise Gone
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        if self.stops and not self.has_stopped:
            said = input_ids[0, self.start :][-2 * LONGEST_STOP :].tolist()
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            self.has_stopped = any(stop in text for stop in self.stops)
        return input_ids.new_full((len(input_ids),), self.has_stopped).bool()


class Answer(Pieces):
    """A streamer that tells pieces of text, and sleeps, as they come, and counts tokens.

    Args:
        tokenizer: decodes.
        tell: is told strings, and `SleepEvent`s.
        stops: strings that end the answer.
        stripped: whether space at both ends of the text goes.
        is_gone: whether nobody listens any more.
    """

    def __init__(
        self,
        tokenizer: Any,
        tell: Callable[[str | SleepEvent], None],
        stops: Sequence[str],
        stripped: bool,
        is_gone: Callable[[], bool],
    ):
        super().__init__(tokenizer, into=None)  # type: ignore[arg-type]
        self.tell, self.cut, self.listener = tell, Cut(stops, stripped), Listener(tokenizer, stops, is_gone)
        self.prompt_tokens = self.completion_tokens = 0
        self.last: int | None = None

    def generation(self) -> dict[str, Any]:
        """Keywords for `generate`."""
        return {"streamer": self, "stopping_criteria": StoppingCriteriaList([self.listener])}

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.prompt_tokens += value.numel()
        else:
            self.completion_tokens += value.numel()
            self.last = int(value.flatten()[-1])
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        said = self.cut.feed(text)
        self._say(said + self.cut.end() if stream_end else said)

    def on_sleep(self, event: SleepEvent) -> None:
        self.tell(event)

    def finish_reason(self, ends: set[int]) -> str:
        """Why it ended, as OpenAI calls it: a token of `ends` or a stop, or the most tokens that it might have."""
        return "stop" if self.listener.has_stopped or self.last in ends else "length"

    def _say(self, text: str) -> None:
        if text:
            self.tell(text)
