"""What a session holds between two steps, as a value; and the chain of digests that names what was read."""

import hashlib
import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .engine.passes import PassPolicy, pass_policy, policy_fields
from .memory import Counters, Memory
from .turns import SPEAKING


@dataclass(frozen=True)
class Source:
    """What was read, without its text.

    Args:
        title: a file's name, or what the reader called it.
        tokens: read of it, by this tokenizer.
        sha256: of those tokens, hex.
    """

    title: str
    tokens: int
    sha256: str

    @classmethod
    def of_file(cls, values: Any) -> "Source":
        """Take what a file says of a source.

        Raises:
            TypeError: anything else.
        """
        if type(values) is not dict:
            raise TypeError(f"a source is a {type(values).__name__}")
        source = cls(**values)
        if [type(value) for value in asdict(source).values()] != [str, int, str]:
            raise TypeError(f"a source is {reprlib.repr(values)}")
        return source


@dataclass(frozen=True)
class Slept:
    """One sleep of a session: after how many tokens, with how many passes, in how many seconds, and what it left."""

    tokens: int
    passes: int
    seconds: float
    memory: Memory


@dataclass(frozen=True, eq=False)
class Held:
    """All that a session holds. A value.

    Args:
        memory: of one row, or of none where nothing was read.
        chain: digest of all tokens read and of where sleeps came between them, hex.
        speaking: whose turn it is in, one of `SPEAKING`.
        sources: what was read.
        passes: N of every sleep.
        awake: seconds of reading and answering.
        asleep: seconds of sleeping.
        at_sleep: the same after the last sleep.
        public: the same without what must not be consolidated, before the first such text of this window.
        since: ids that were read after it, without such texts.
    """

    memory: Memory = field(default_factory=Memory)
    chain: str = ""
    speaking: str = SPEAKING[0]
    sources: tuple[Source, ...] = ()
    passes: tuple[int, ...] = ()
    awake: float = 0.0
    asleep: float = 0.0
    at_sleep: "Held | None" = None
    public: "Held | None" = None
    since: tuple[int, ...] = ()

    @property
    def row(self) -> Counters:
        """Counters of the sequence."""
        return self.memory.counters[0] if self.memory.counters else Counters()

    def after(self, ids: Sequence[int], memory: Memory, slept: Sequence[Slept], seconds: float, how: str) -> "Held":
        """What is held when `ids` have been read.

        Args:
            ids: that were read.
            memory: after them.
            slept: the sleeps on the way, in order.
            seconds: that all of it took.
            how: the passes of those sleeps, as `pass_key` writes them.
        """
        now, done = self, 0
        for sleep in slept:
            read = sleep.tokens - self.row.seen
            chain = chained_sleep(chained(now.chain, ids[done:read]), how)
            now = replace(
                now,
                memory=sleep.memory,
                chain=chain,
                passes=(*now.passes, sleep.passes),
                asleep=now.asleep + sleep.seconds,
                at_sleep=None,
            )
            now, done = replace(now, at_sleep=now), read
        awake = now.awake + max(0.0, seconds - sum(sleep.seconds for sleep in slept))
        return replace(now, memory=memory, chain=chained(now.chain, ids[done:]), awake=awake)

    def memories(self) -> list[Memory]:
        """Every memory that is held."""
        parts = [part for part in (self.at_sleep, self.public) if part is not None and part is not self]
        return [self.memory, *(memory for part in parts for memory in part.memories())]

    def about(self) -> dict[str, Any]:
        """What is written beside the tensors of a memory: no text, and no ids."""
        kept = ("chain", "speaking", "awake", "asleep")
        return {name: getattr(self, name) for name in kept} | {
            "passes": list(self.passes),
            "sources": [asdict(source) for source in self.sources],
        }

    @classmethod
    def of_file(cls, memory: Memory, about: dict[str, Any]) -> "Held":
        """Take what `about` wrote.

        Raises:
            ValueError: anything else.
        """
        kinds = {"chain": str, "speaking": str, "awake": float, "asleep": float, "passes": list, "sources": list}
        wrong = [name for name, kind in kinds.items() if type(about.get(name)) is not kind]
        sources: tuple[Source, ...] = ()
        if "sources" not in wrong:
            try:
                sources = tuple(Source.of_file(source) for source in about["sources"])
            except TypeError:
                wrong.append("sources")
        wrong += [name for name in ("awake", "asleep") if name not in wrong and not 0 <= about[name] < math.inf]
        if wrong or about["speaking"] not in SPEAKING or not all(type(n) is int and n > 0 for n in about["passes"]):
            raise ValueError(f"it does not say what a session saves: {', '.join(wrong) or 'speaking, passes'}")
        kept = {name: about[name] for name in ("chain", "speaking", "awake", "asleep")}
        held = cls(memory=memory, passes=tuple(about["passes"]), sources=sources, **kept)
        return replace(held, at_sleep=held) if not held.row.fill and held.row.sleeps else held


def chained(chain: str, ids: Sequence[int]) -> str:
    """The digest after more tokens."""
    for token in ids:
        chain = hashlib.sha256(f"{chain}.{token}".encode()).hexdigest()
    return chain


def chained_sleep(chain: str, how: str) -> str:
    """The digest after a sleep."""
    return hashlib.sha256(f"{chain}.sleep.{how}".encode()).hexdigest()


def pass_key(model: Any, sleep_passes: int | PassPolicy | None) -> str:
    """A policy in a word, for the chain.

    Args:
        model: has the policy where `sleep_passes` is `None`.
        sleep_passes: N, or a policy.

    Raises:
        ValueError: an impossible N.
    """
    policy = pass_policy(model.config.sleep.sleep_passes if sleep_passes is None else sleep_passes)
    try:
        return json.dumps(policy_fields(policy), sort_keys=True)
    except ValueError:  # of the caller's own, not registered
        return repr(policy)


def erase(memories: Sequence[Memory], model: torch.nn.Module) -> None:
    """Overwrite every tensor of memories with zeros, whoever else holds it; never a tensor of the model's."""
    kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def zero(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in kept and storage.nbytes():
            torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage).zero_()
        return t

    with torch.inference_mode():
        for memory in memories:
            memory.map(zero)
