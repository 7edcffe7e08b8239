"""Base of the tasks in words: how their text becomes tokens."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

from .task import Task


@lru_cache(maxsize=100_000)
def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def start_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before every text; not what some put after it."""
    ids = list(tokenizer("")["input_ids"])
    ends = tokenizer.eos_token_id is not None and tokenizer.eos_token_id != tokenizer.bos_token_id
    while ends and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


@dataclass(frozen=True)
class TaskInWords(Task):
    """A task whose rows are made of sentences.

    Args:
        tokenizer: of the model.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def _encode(self, text: str) -> list[int]:
        return list(encode(text, self.tokenizer))

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before every text."""
        return start_of(self.tokenizer)
