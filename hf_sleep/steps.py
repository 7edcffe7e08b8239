"""Steps of a session, from one `Held` to the next: read, sleep, answer."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cache import SleepCache
from .compat import CACHE
from .engine import PassPolicy, SleepEvent, of_cache, pass_policy, policy_fields
from .held import Held, Slept, pass_key
from .lora import without_wrapper
from .memory import Memory
from .store import SleepStore
from .turns import MODEL, READER, Turns

Passes = int | PassPolicy | None
LENGTHS = ("max_length", "max_new_tokens")
MAX_NEW_TOKENS = 128
"""Of an answer, where nothing else is said."""


class Sleeps(list[Slept]):
    """The sleeps of a step, and the seconds that it took. Only the last has its memory."""

    seconds: float = 0.0

    def add(self, event: SleepEvent) -> None:
        """Note a sleep, in its hook."""
        self[-1:] = [replace(last, memory=Memory()) for last in self[-1:]]
        self.append(Slept(event.tokens, event.sleep_passes, event.seconds, event.left()))


@dataclass(frozen=True)
class Steps:
    """What a session does, without what it holds.

    Args:
        model: a `SleepForCausalLM`.
        turns: its tokenizer, and what is written around what is said.
        passes: N, or a policy, of sleeps; `None`: the model's.
        store: of windows that were read before.
    """

    model: Any
    turns: Turns
    passes: Passes = None
    store: SleepStore | None = None

    @property
    def window_size(self) -> int:
        """L."""
        return int(self.model.config.sleep.window_size)

    def room(self, held: Held) -> int:
        """Tokens that the current window has room for."""
        return self.window_size - held.row.fill

    def with_passes(self, passes: Passes) -> "Steps":
        """The same with another N, unless it is `None`."""
        return self if passes is None else replace(self, passes=passes)

    def for_turn(self, generation: dict[str, Any]) -> "Steps":
        """The same with the N that the keywords for `generate` ask for, which is taken out, or their config."""
        of_config = getattr(generation.get("generation_config"), "sleep_passes", None)
        given = generation.pop("sleep_passes", None)
        return self.with_passes(of_config if given is None else given)

    # Reading.

    def windows(self, held: Held, ids: list[int]) -> Iterator[tuple[list[int], Held]]:
        """Read ids window by window; gives those that were read in each step, and what is held after it."""
        if held.public is not None and len(ids) > self.room(held):
            held = self.public(held)
        done, held = self._found(held, ids)
        if done:
            yield ids[:done], held
        while done < len(ids):
            room = self.room(held) or self.window_size
            part = ids[done : done + room]
            done += len(part)
            held = self.read(held, part, then_sleep=len(part) == room and done < len(ids))
            yield part, held

    def read_all(self, held: Held, ids: list[int]) -> Held:
        """What is held after ids, window by window."""
        for _, after in self.windows(held, ids):
            held = after
        return held

    def _found(self, held: Held, ids: list[int]) -> tuple[int, Held]:
        """Continue from the store, where the beginning of these ids was read: how many of them, and what is held."""
        if self.store is None or held.public is not None or not self._has_named_passes:
            return 0, held
        return self.store.longest(self.model, held, ids, pass_key(self.model, self.passes))

    def read(self, held: Held, ids: list[int], then_sleep: bool = False) -> Held:
        """What is held after ids of which nothing is asked, none beyond the window."""
        if not ids:
            return held
        cache, (tokens, _) = self.cache(held.memory), self._tensors([ids])
        ends = torch.zeros_like(tokens)
        ends[:, -1] = then_sleep
        nothing = torch.empty(0, dtype=torch.long)
        with self._watched(cache) as slept, torch.no_grad():
            self.model(tokens, cache=cache, logits_to_keep=nothing, sleep_after=ends, sleep_passes=self.passes)
        return self._advanced(held, ids, cache.memory, slept)

    def sleep(self, held: Held, policy: PassPolicy | None = None) -> Held:
        """What is held after a sleep; `policy`, if not this one's own, must run as many passes."""
        held = self.public(held)
        if not held.row.fill:
            return held
        cache = self.cache(held.memory)
        with self._watched(cache) as slept, torch.no_grad():
            self.model.sleep(cache, self.passes if policy is None else policy)
        return self._advanced(held, [], cache.memory, slept)

    def private(self, held: Held, ids: list[int]) -> Iterator[tuple[list[int], Held]]:
        """Read ids that must not be consolidated; gives them, and what is held after them.

        Raises:
            ValueError: they do not fit into the window.
        """
        if len(ids) > self.room(held):
            raise ValueError(
                f"do_not_consolidate: the text has {len(ids)} tokens, and the window has room for {self.room(held)}: "
                "sleep() first, or read less of it"
            )
        public, since = (held, ()) if held.public is None else (held.public, held.since)
        after = self.read(replace(held, public=None), ids)
        yield ids, replace(after, chain=held.chain, public=public, since=since)

    def public(self, held: Held) -> Held:
        """What would be held if no private text had been read: its window, read again without it."""
        if held.public is None:
            return held
        public = self.read(held.public, list(held.since))
        return replace(public, speaking=held.speaking, sources=held.sources, awake=held.awake)

    # Answering.

    def must_sleep(self, held: Held, prompt: list[int], when: str, generation: dict[str, Any]) -> bool:
        """Whether to sleep before a turn.

        Args:
            held: before it.
            prompt: ids of the question.
            when: "when_needed", "always" or "never".
            generation: keywords for `generate`.

        Raises:
            ValueError: no room beside a private text.
        """
        needs, room = len(prompt) + self._max_new_tokens(generation), self.room(held)
        if held.public is not None:
            if needs > room:
                raise ValueError(
                    f"question and answer take up to {needs} tokens, and beside the text that must not be consolidated "
                    f"the window has room for {room}: pass a smaller max_new_tokens, or sleep() first, which drops it"
                )
            return False
        return bool(held.row.fill) and (when == "always" or (when == "when_needed" and needs > room))

    def answer(self, held: Held, prompt: list[int], generation: dict[str, Any]) -> tuple[Held | None, list[int]]:
        """What is held after a turn, and the answer's ids; `None` where a beam search ended with several rows."""
        (said,), memory, slept = self.generate(held, [prompt], generation)
        if len(memory.counters) != 1:
            return None, said
        return self.answered(held, prompt, said, memory.alone(), slept), said

    def answered(self, held: Held, prompt: list[int], said: list[int], memory: Memory, slept: Sleeps) -> Held:
        """What is held after a turn.

        Args:
            held: before it.
            prompt: ids of the question.
            said: ids of the answer, of which the last was not read.
            memory: after what was read.
            slept: the sleeps on the way.
        """
        read = memory.counters[0].seen - held.row.seen - len(prompt)
        after = self._advanced(held, prompt + said[:read], memory, slept)
        if slept and after.at_sleep is not None:
            inside = after.at_sleep.row.seen - held.row.seen > len(prompt)
            after = replace(after, at_sleep=replace(after.at_sleep, speaking=MODEL if inside else READER))
        after = self.read(after, [token for token in said[read:] if token not in self.stops])
        return replace(after, speaking=MODEL)

    def generate(
        self, held: Held, prompts: list[list[int]], generation: dict[str, Any]
    ) -> tuple[list[list[int]], Memory, Sleeps]:
        """Answers to prompts that each follow what is held, the memory after them, and the sleeps of the first."""
        if (self._asked_of("num_return_sequences", generation) or 1) != 1:
            raise ValueError("num_return_sequences must be 1: a session has one answer to a question")
        beams = self._asked_of("num_beams", generation) or 1
        rows = held.memory.select([0] * len(prompts) * beams) if held.memory.counters else held.memory
        cache, (ids, mask) = self.cache(rows.without_columns()), self._tensors(prompts)
        settings, given = self._settings(generation)
        with self._watched(cache) as slept:
            output = self.model.generate(ids, attention_mask=mask, **{CACHE: cache}, **settings)
        sequences = getattr(output, "sequences", output)
        stops = {given} if isinstance(given, int) else set(given or ())
        return [_until(row[ids.shape[1] :].tolist(), stops) for row in sequences], cache.memory, slept

    def _settings(self, generation: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Keywords for `generate`, with a session's own where none are given, and the ids that end an answer."""
        own = {"max_new_tokens": self._max_new_tokens(generation), "eos_token_id": sorted(self.stops) or None}
        own["pad_token_id"] = self._pad
        if (config := generation.get("generation_config")) is None:
            settings = {"sleep_passes": self.passes} | own | generation
            return settings, settings["eos_token_id"]
        # Beside a config, generate warns of keywords that belong into it.
        config = copy.deepcopy(config)
        vars(config).pop("sleep_passes", None)  # `for_turn` has read it
        for name, value in own.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        settings = {"sleep_passes": self.passes} | generation | {"generation_config": config}
        return settings, generation.get("eos_token_id", config.eos_token_id)

    def _asked_of(self, name: str, generation: dict[str, Any]) -> Any:
        """A field of a `GenerationConfig` as `generate` takes it: a keyword, of the config given, or the model's."""
        if name in generation:
            return generation[name]
        given = getattr(generation.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name) if given is None else given

    def ends_without_a_token(self, generation: dict[str, Any]) -> bool:
        """Whether something other than a token ends an answer, and no token does."""
        others = "stopping_criteria" in generation or self._asked_of("stop_strings", generation)
        return bool(others) and self._settings(generation)[1] in (None, [])

    @property
    def _has_named_passes(self) -> bool:
        """Whether the policy has a name and fields, by which a store can tell it from others."""
        try:
            policy_fields(pass_policy(self.model.config.sleep.sleep_passes if self.passes is None else self.passes))
        except ValueError:
            return False
        return True

    @property
    def stops(self) -> set[int]:
        """Ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return {*self.turns.stops, *([] if ends is None else [ends] if isinstance(ends, int) else ends)}

    @property
    def _pad(self) -> int:
        pad = getattr(self.turns.tokenizer, "pad_token_id", None)
        if pad is None or pad >= self.model.config.text_config.vocab_size:
            return next(iter(sorted(self.stops)), 0)
        return int(pad)

    def _max_new_tokens(self, generation: dict[str, Any]) -> int:
        mine = (generation, vars(generation.get("generation_config") or object))
        length, new = (next((m[name] for m in mine if m.get(name) is not None), None) for name in LENGTHS)
        if length is not None and new is None:  # beside the other, generate leaves it out
            raise ValueError(
                f"max_length={length}: it would count what the session has read. Pass max_new_tokens, of the answer"
            )
        given = self._asked_of("max_new_tokens", generation)
        return MAX_NEW_TOKENS if given is None else int(given)

    # Between a value and a call.

    def cache(self, memory: Memory) -> SleepCache:
        """A cache with a memory that the model left."""
        cache = SleepCache()
        if memory.counters:
            cache.hold(self.model, memory)
        return cache

    def _tensors(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as ids, padded on the left, and their mask."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(p)) + list(p) for p in prompts], device=self.model.device)
        mask = torch.ones_like(ids)
        for row, prompt in zip(mask, prompts, strict=True):
            row[: width - len(prompt)] = 0
        return ids, mask

    @contextmanager
    def _watched(self, cache: SleepCache) -> Iterator[Sleeps]:
        """Collect the sleeps of the first row of `cache`."""
        slept, began = Sleeps(), time.perf_counter()

        def note(event: SleepEvent) -> None:
            if event.row == 0:
                slept.add(event)

        with self.model.on_sleep(of_cache(cache, note)):
            yield slept
        slept.seconds = time.perf_counter() - began

    def _advanced(self, held: Held, ids: Sequence[int], memory: Memory, slept: Sleeps) -> Held:
        after = held.after(ids, memory, slept, slept.seconds, pass_key(self.model, self.passes))
        if held.public is not None:
            return replace(after, since=(*held.since, *ids))
        if self.store is not None and slept and after.at_sleep is not None and self._has_named_passes:
            self.store.keep(self.model, self.cache(after.at_sleep.memory), after.at_sleep)
        return after


def _until(said: list[int], stops: set[int]) -> list[int]:
    """What was said up to the first stop; after it come pads."""
    end = next((i + 1 for i, token in enumerate(said) if token in stops), len(said))
    return said[:end]


def cache_from(store: SleepStore, model: Any, input_ids: torch.Tensor, sleep_passes: Passes = None) -> SleepCache:
    """A cache that has read a prompt but for its last token, with what the store has of it: for `generate`.

    `model.generate(input_ids, cache=cache_from(store, model, input_ids))` continues from there. Windows that are read
    on the way are kept in the store.

    Args:
        store: of windows that were read before.
        model: a `SleepForCausalLM`.
        input_ids: `[1, T]`, without pads.
        sleep_passes: N, or a policy; by default the model's.

    Raises:
        ValueError: several rows, or a prompt of one token.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: it must be [1, T], with at least 2 tokens")
    steps = Steps(without_wrapper(model), Turns(None, "", "", "", (), False), sleep_passes, store)
    return steps.cache(steps.read_all(Held(), input_ids[0, :-1].tolist()).memory)
