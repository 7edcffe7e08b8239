"""What a chat template writes around what people say, so that a conversation can be read piece by piece.

A session never renders a conversation twice: what was slept on is gone. It reads the opening, a text, the closing with
the generation prompt, generates, and reads what comes between an answer and the next message.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

Text = str | os.PathLike | TextIO | torch.Tensor | Sequence[int] | Iterable[str]
NOBODY, READER, MODEL = SPEAKING = ("nobody", "reader", "model")
"""Whose turn a session is in: before anything was read; in what the reader gives; after an answer."""
SAID = ("said-first-71", "answered-then-72", "said-again-73")
"""What the template is given to see what it writes around it."""


@dataclass(frozen=True)
class Turns:
    """The text between what is said, and a tokenizer for both.

    Args:
        tokenizer: of the base.
        opening: before the first message; with a system prompt, if the template has one.
        closing: from the end of a message to where the answer begins.
        reopening: from the end of an answer to where the next message begins.
        stops: ids that end an answer.
        adds_special: whether the tokenizer adds its own beginning of a sequence, which a template writes itself.
    """

    tokenizer: Any
    opening: str
    closing: str
    reopening: str
    stops: tuple[int, ...]
    adds_special: bool

    @classmethod
    def of(cls, tokenizer: Any, chat: bool | None = None, system: str | None = None, **template: Any) -> "Turns":
        """Find out what a tokenizer's template writes.

        Args:
            tokenizer: with a chat template, or without.
            chat: whether to use it; by default where there is one. Without, texts are joined by line ends.
            system: a system prompt, before all turns; by default what the template itself puts there.
            template: keywords for `apply_chat_template`, such as `enable_thinking=False`.

        Raises:
            ValueError: `chat=True` without a template, or a template that does not write what was said as it was said.
        """
        has_template = getattr(tokenizer, "chat_template", None) is not None
        end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        if chat and not has_template:
            raise ValueError(
                "chat=True: this tokenizer has no chat template. Leave it out: texts are then read as such"
            )
        if not (has_template if chat is None else chat):
            return cls(tokenizer, "" if system is None else system + "\n\n", "\n", "\n", end, adds_special=True)
        said = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), SAID, strict=True)]

        before = [] if system is None else [{"role": "system", "content": system}]

        def rendered(count: int) -> str:
            settings = {"tokenize": False, "add_generation_prompt": True}
            return str(tokenizer.apply_chat_template(before + said[:count], **settings | template))

        first, whole = rendered(1), rendered(3)
        if any(whole.count(text) != 1 for text in SAID) or first.count(SAID[0]) != 1:
            raise ValueError(
                "the tokenizer's chat template does not write each message once and as it is: pass chat=False, and "
                "texts are read without a template"
            )
        opening, closing = first.split(SAID[0])
        reopening = whole.split(SAID[1])[1].split(SAID[2])[0]
        if not whole.startswith(first + SAID[1]):
            logger.warning_once(
                "The chat template writes an answered turn in another way than one that is being answered. What a "
                "session has read stays as it was when it was answered."
            )
        ends = tokenizer(reopening, add_special_tokens=False).input_ids[:1]
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        stops = [token for token in ends if token in special]
        return cls(tokenizer, opening, closing, reopening, tuple(sorted({*end, *stops})), adds_special=False)

    @functools.cached_property
    def tokenizer_id(self) -> str:
        """Of its tokenizer, which a vocabulary of 50,000 takes a tenth of a second to tell."""
        return tokenizer_id(self.tokenizer)

    def encode(self, text: Any) -> list[int]:
        """Ids of a text, as it stands.

        Raises:
            ValueError: what is no string, or no text.
        """
        if not isinstance(text, str):
            raise ValueError(f"a piece is of type {type(text).__name__}: it must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"at {error.start} is {text[error.start]!r}"
            raise ValueError(f"the text is no Unicode: {where}, as bytes that are not UTF-8 are read") from error
        # Without a warning of texts beyond the base's positions: they are read in windows.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def entering(self, speaking: str) -> list[int]:
        """Ids that are read before the reader speaks, where `speaking` did."""
        if speaking != NOBODY:
            return self.encode(self.reopening) if speaking == MODEL else []
        return self._beginning() + self.encode(self.opening)

    def _beginning(self) -> list[int]:
        """Ids that the tokenizer puts before a sequence, where no template does."""
        if not self.adds_special:
            return []
        whole, plain = list(self.tokenizer(SAID[0]).input_ids), self.encode(SAID[0])
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def asking(self, speaking: str, question: str) -> list[int]:
        """Ids of a question, up to where its answer begins.

        Raises:
            ValueError: a question that says nothing.
        """
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question={question!r}: it must be a string that says something")
        before = "\n\n" if speaking == READER else ""
        return self.entering(speaking) + self.encode(before + question + self.closing)

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def pieces(self, text: Text, vocab_size: int) -> tuple[Iterable[list[int]], int | None]:
        """A text's ids, in pieces, and how many there are; `None` where that is not known before.

        Raises:
            ValueError: what is no text, or an id of no token.
        """
        if isinstance(text, torch.Tensor):
            if text.numel() != text.shape[-1:].numel():
                raise ValueError(f"text has shape {tuple(text.shape)}: ids must be [T] or [1, T], one text at a time")
            text = text.flatten().tolist()
        elif isinstance(text, os.PathLike):
            text = Path(text).read_text(encoding="utf-8")
        elif hasattr(text, "read"):
            text = text.read()
        if isinstance(text, str):
            ids = self.encode(text)
            return [ids], len(ids)
        if isinstance(text, bytes | Mapping) or not isinstance(text, Iterable):
            raise ValueError(
                f"text is of type {type(text).__name__}: it must be a string, a path, an open text file, ids, or an "
                "iterator of strings"
            )
        if isinstance(text, Sequence) and all(type(token) is int for token in text):
            ids = [int(token) for token in text]
            if wrong := [token for token in ids if not 0 <= token < vocab_size]:
                raise ValueError(f"text holds the id {wrong[0]}: ids must be from 0 to {vocab_size - 1}")
            return [ids], len(ids)
        return map(self.encode, text), None


def tokenizer_id(tokenizer: Any) -> str:
    """Hex digest of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def name_of(text: Text) -> str:
    """What a report calls a text."""
    if isinstance(text, os.PathLike):
        return Path(text).name
    name = getattr(text, "name", None)
    return Path(name).name if isinstance(name, str) else "text"
