"""Bodies of requests, and what they ask of `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..checks import LEAST_TEMPERATURE
from ..steps import MAX_NEW_TOKENS
from .errors import ApiError, refused
from .text import LONGEST_STOP

USUAL = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "store": False,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
}
"""OpenAI's parameters that this server knows one value of."""
INT64 = 2**63
LONGEST_TITLE = 200
MOST_STOPS = 4


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it must be Unicode text, without halves of surrogate pairs") from None
    return text


String = Annotated[str, AfterValidator(_encodable)]
"""Text that a tokenizer takes."""


class Body(BaseModel):
    """JSON of known fields and their own types alone."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Body):
    """How an answer is drawn; the defaults are OpenAI's, but for the length."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)

    def generation(self, most: int) -> dict[str, Any]:
        """Keywords for `generate`.

        Args:
            most: tokens that an answer may have.

        Raises:
            ApiError: more are asked for.
        """
        given = [name for name in ("max_tokens", "max_completion_tokens") if getattr(self, name) is not None]
        if len(given) == 2 and self.max_tokens != self.max_completion_tokens:
            raise refused("max_tokens", self.max_tokens, "max_completion_tokens says otherwise: leave one of them out")
        length = getattr(self, given[0]) if given else min(most, MAX_NEW_TOKENS)
        if length > most:
            raise refused(given[0], length, f"an answer has {most} tokens at most")
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < LEAST_TEMPERATURE:
            how: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        else:
            how = {"do_sample": True, "temperature": temperature, "top_p": self.top_p or 1.0, "top_k": 0}
        return {"max_new_tokens": length} | how

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Draw from the seed, if there is one, and leave the generators as they were."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(self.seed)
            yield


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool | None = None


class OpenAiBody(Sampling):
    """What chat and completions have in common."""

    model: String
    stop: String | list[String] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: String | None = None
    memory_id: String | None = None
    remember: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_the_usual(cls, values: Any) -> Any:
        """Leave out what says what is the case anyway, and refuse what it says otherwise."""
        if type(values) is not dict:
            return values
        for name in USUAL.keys() & values.keys():
            if values[name] is not None and values[name] != USUAL[name]:
                raise ApiError(
                    400,
                    f"{name}: this server knows no other value than {USUAL[name]!r}",
                    param=name,
                    code="unsupported_value",
                )
        return {name: value for name, value in values.items() if name not in USUAL}

    def generation(self, most: int) -> dict[str, Any]:
        assert self.stops is not None  # which refuses those that cannot be
        return super().generation(most)

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer.

        Raises:
            ApiError: too many or too long ones, or one that is empty.
        """
        stops = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
            raise refused("stop", None, f"it must be at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
        return stops


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: String


class Message(Body):
    """Words of one side."""

    role: Literal["system", "developer", "user", "assistant"]
    content: String | list[Part]
    refusal: None = None

    @property
    def text(self) -> str:
        """All it says."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatBody(OpenAiBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class CompletionBody(OpenAiBody):
    """POST /v1/completions."""

    prompt: String | list[String] | list[int]

    def text(self, vocab_size: int) -> str | list[int]:
        """The prompt: a string, or ids.

        Raises:
            ApiError: several prompts, or ids of no token.
        """
        prompt: Sequence[Any] = self.prompt
        if isinstance(prompt, str):
            return prompt
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return prompt[0]
        if not prompt or not all(type(token) is int and 0 <= token < vocab_size for token in prompt):
            raise refused("prompt", None, f"it must be a string, or ids from 0 to {vocab_size - 1}")
        return list(prompt)


class CreateBody(Body):
    """POST /v1/memories."""

    id: String | None = None
    system: String | None = Field(None, min_length=1)


class ReadBody(Body):
    """POST /v1/memories/ID/read."""

    text: String = Field(min_length=1)
    title: String | None = Field(None, min_length=1, max_length=LONGEST_TITLE)
    then_sleep: bool = False


class AskBody(Sampling):
    """POST /v1/memories/ID/ask."""

    question: String | None = None
    questions: list[String] | None = Field(None, min_length=1)

    def all(self, most: int) -> list[str]:
        """The questions.

        Raises:
            ApiError: none, too many, or one that says nothing.
        """
        if (self.question is None) == (self.questions is None):
            raise refused("question", None, "pass question, a string, or questions, a list of them", "invalid_value")
        asked = [self.question] if self.question is not None else self.questions or []
        if len(asked) > most or not all(question.strip() for question in asked):
            raise refused("questions", None, f"it must be at most {most} strings that say something")
        return asked


def conversation(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str]], str]:
    """A list of messages as a system prompt, turns that took place, and the question.

    Raises:
        ApiError: an order in which nobody speaks.
    """
    system, rest = None, list(messages)
    if rest[0].role in ("system", "developer"):
        system, rest = rest[0].text, rest[1:]
    for i, message in enumerate(rest):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise refused(
                f"messages.{i + len(messages) - len(rest)}.role",
                None,
                f"it must be {expected!r}: after at most one system message, user and assistant take turns",
            )
        if not message.text.strip():
            raise refused(f"messages.{i + len(messages) - len(rest)}.content", None, "it must say something")
    if len(rest) % 2 == 0:
        raise refused("messages", None, "the last one must be the user's")
    said = [message.text for message in rest]
    return system, list(zip(said[:-1:2], said[1::2], strict=True)), said[-1]
