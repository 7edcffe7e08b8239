"""Answers in OpenAI's shapes, whole and in pieces."""

import json
import time
import uuid
from typing import Any

from ..engine import SleepEvent
from .jobs import Ended

END = "data: [DONE]\n\n"


class Shape:
    """Writes one answer.

    Args:
        model: name that it is served under.
    """

    prefix, whole_object, piece_object = "", "", ""

    def __init__(self, model: str):
        self.id, self.model, self.created = f"{self.prefix}-{uuid.uuid4().hex}", model, int(time.time())

    def whole(self, text: str, ended: Ended) -> dict[str, Any]:
        """The whole answer."""
        choice = self._said(text) | {"finish_reason": ended.reason}
        return self._object(self.whole_object, [choice]) | {"usage": ended.usage()}

    def first(self) -> list[dict[str, Any]]:
        """Pieces before the first word."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """Some words."""
        return self._object(self.piece_object, [self._adds(text) | {"finish_reason": None}])

    def last(self, ended: Ended, with_usage: bool) -> list[dict[str, Any]]:
        """Pieces after the last word."""
        pieces = [self._object(self.piece_object, [self._adds("") | {"finish_reason": ended.reason}])]
        if with_usage:
            pieces.append(self._object(self.piece_object, []) | {"usage": ended.usage()})
        return pieces

    def _said(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _adds(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _object(self, name: str, choices: list[Any]) -> dict[str, Any]:
        about = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return about | {"choices": choices}


class ChatShape(Shape):
    """Of chat completions."""

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[dict[str, Any]]:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return [self._object(self.piece_object, [choice])]

    def _said(self, text: str) -> dict[str, Any]:
        return {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}

    def _adds(self, text: str) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}}


class CompletionShape(Shape):
    """Of completions."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def _said(self, text: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None}

    def _adds(self, text: str) -> dict[str, Any]:
        return self._said(text)


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def comment(sleep: SleepEvent) -> str:
    """A sleep, as a comment between events, which clients that do not know it skip."""
    return f": sleep tokens={sleep.tokens} passes={sleep.sleep_passes} seconds={sleep.seconds:.3f}\n\n"
