"""Answers in pieces, as they are made, and streamers that mark sleeps."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from .engine import SleepEvent


class Stopped(StoppingCriteria):
    """Ends an answer when nobody listens any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.new_full((len(input_ids),), self.event.is_set()).bool()


class SleepStreamer(TextStreamer):
    """Prints text as it is made, and a mark at each sleep on the way, those of the prompt included.

    Args:
        tokenizer: decodes.
        mark: what is printed; may name `tokens`, `sleep_passes` and `seconds` of a `SleepEvent` in braces.
        others: for transformers' `TextStreamer`: `skip_prompt`, and keywords for `decode`.
    """

    def __init__(self, tokenizer: Any, mark: str = " [slept after {tokens} tokens] ", **others: Any):
        super().__init__(tokenizer, **others)
        self.mark = mark

    def on_sleep(self, event: SleepEvent) -> None:
        """Called by `generate` at each sleep."""
        self.on_finalized_text(self.mark.format_map(vars(event)))


class Pieces(TextStreamer):
    """A streamer that puts text into a queue."""

    def __init__(self, tokenizer: Any, into: "queue.SimpleQueue[Any]"):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.into = into

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.into.put(text)


def streamed(tokenizer: Any, ask: Callable[..., Any]) -> Iterator[str]:
    """Run `ask(streamer=…, stopping_criteria=…)` in a thread, and give its text as it comes.

    Args:
        tokenizer: decodes.
        ask: generates.

    Raises:
        Exception: what `ask` raises.
    """
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stopped, failed, end = Stopped(), [], object()

    def run() -> None:
        try:
            ask(streamer=Pieces(tokenizer, pieces), stopping_criteria=StoppingCriteriaList([stopped]))
        except BaseException as error:  # it is raised again where the text is read
            failed.append(error)
        finally:
            pieces.put(end)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not end:
            yield piece
    finally:
        stopped.event.set()
        thread.join()
    if failed:
        raise failed[0]
