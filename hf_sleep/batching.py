"""SessionBatch: answers for many sessions at once, each joining and leaving the batch when it likes."""

import copy
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from .cache import SleepCache
from .engine import SleepEvent, of_cache
from .held import Held, pass_key
from .lora import without_wrapper
from .memory import Memory
from .session import SleepSession
from .steps import MAX_NEW_TOKENS, Sleeps

FIELDS = {
    *("max_new_tokens", "min_new_tokens", "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("typical_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"),
}
"""Of a `GenerationConfig`, what a batch heeds."""


@dataclass(eq=False)
class Turn:
    """A question on its way.

    Args:
        session: whose memory is asked.
        begun: what it held when the question came.
        held: what the turn follows: the same, after a sleep where one was due.
        prompt: ids of the question.
        config: how to generate.
        remember: whether the session keeps the turn.
        answer: the text, when it is there.
        said: ids of the answer so far.
        slept: the turn's sleeps.
    """

    session: SleepSession
    begun: Held
    held: Held
    prompt: list[int]
    config: Any
    remember: bool
    answer: "Future[str]" = field(default_factory=Future)
    said: list[int] = field(default_factory=list)
    slept: Sleeps = field(default_factory=Sleeps)
    processors: Any = None
    generator: torch.Generator | None = None

    @property
    def is_over(self) -> bool:
        """Whether the answer has ended."""
        ends = self.config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return self.answer.done() or len(self.said) >= self.config.max_new_tokens or self.said[-1] in ends

    def choose(self, logits: torch.Tensor) -> None:
        """Say the next token, out of logits `[vocab]`, as `generate` does."""
        scores = logits.float()[None]
        if self.processors:
            read = torch.tensor([self.prompt + self.said], device=logits.device)
            scores = self.processors(read, scores)
        if self.config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        else:
            token = scores.argmax(-1)
        self.said.append(int(token))


class SessionBatch:
    """Continuous batching: rows of many sessions in one batch, each of which joins when it is asked, sleeps when its
    own window is full, with its own N, and leaves when its answer ends.

    Answers are those that `ask` gives each session alone. One thread at a time may use it; a session must not be used
    otherwise while a question to it is on its way.

    Args:
        model: the sessions' model.
        max_rows: answers at a time; further ones wait.

    Raises:
        ValueError: fewer than one row.
    """

    def __init__(self, model: Any, max_rows: int = 32) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: it must be at least 1")
        self.model, self.max_rows = without_wrapper(model), max_rows
        self.waiting: deque[Turn] = deque()
        self.turns: list[Turn] = []
        self._cache = SleepCache()

    def submit(
        self, session: SleepSession, question: str, *, remember: bool = False, **generation: Any
    ) -> "Future[str]":
        """Ask a session, with the next `step`.

        Args:
            session: of this batch's model.
            question: as `ask` takes it.
            remember: keep the turn.
            generation: fields of a `GenerationConfig` (`FIELDS`), and `seed` for sampling of its own.

        Raises:
            ValueError: a session of another model, or what `ask` refuses; keywords that are no such field.
        """
        if session.model is not self.model:
            raise ValueError("the session has another model than this batch")
        seed = generation.pop("seed", None)
        config = self._config(generation, session.steps.stops)
        generator = None if seed is None else torch.Generator(self.model.device).manual_seed(seed)
        begun, held, prompt = session.begin(question, {"max_new_tokens": config.max_new_tokens})
        turn = Turn(session, begun, held, prompt, config, remember, generator=generator)
        try:
            turn.processors = self.model._get_logits_processor(config, len(prompt), device=str(self.model.device))
        except BaseException:
            session.end()
            raise
        turn.answer.set_running_or_notify_cancel()
        turn.answer.add_done_callback(lambda _: session.end())
        self.waiting.append(turn)
        return turn.answer

    def run(self) -> None:
        """Take steps until every question is answered."""
        while self.step():
            pass

    @torch.no_grad()
    def step(self) -> bool:
        """Let those join that wait, and say one token in each row; tells whether any is left.

        Ctrl-C ends the turns that it meets, as an error does, and reaches the caller; those that wait stay.
        """
        while self.waiting and len(self.turns) < self.max_rows:
            self._join(self.waiting.popleft())
        if self.turns:
            try:
                self._say()
            except BaseException as error:
                for turn in self.turns:
                    if not turn.answer.done():
                        turn.answer.set_exception(error)
                self.turns, self._cache = [], SleepCache()
                if not isinstance(error, Exception):
                    raise
            self._leave()
        return bool(self.turns or self.waiting)

    def _say(self) -> None:
        """One token more in each row."""
        began = time.perf_counter()
        self._sleep_where_full()
        said = torch.tensor([turn.said[-1:] for turn in self.turns], device=self.model.device)
        logits = self.model(said, cache=self._cache).logits[:, -1]
        seconds = (time.perf_counter() - began) / len(self.turns)
        for turn, row in zip(self.turns, logits, strict=True):
            turn.slept.seconds += seconds
            try:
                turn.choose(row)
            except Exception as error:
                turn.answer.set_exception(error)

    def _config(self, generation: dict[str, Any], stops: set[int]) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        if wrong := generation.keys() - FIELDS:
            works = ", ".join(sorted(FIELDS))
            raise ValueError(f"{min(wrong)} cannot be set in a batch of sessions: seed and {works} can. Or use ask")
        config.update(**config._get_default_generation_params(), defaults_only=True)  # as generate does
        config.update(**{"eos_token_id": sorted(stops) or None} | generation)
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            raise ValueError("the model's generation_config has several beams or sequences: use ask")
        config.max_new_tokens = MAX_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens
        self.model._prepare_special_tokens(config, device=self.model.device)
        return config

    def _join(self, turn: Turn) -> None:
        """Read a question alone, and take its row in."""
        steps, began = turn.session.steps, time.perf_counter()
        cache = steps.cache(turn.held.memory)
        ids = torch.tensor([turn.prompt], device=self.model.device)

        def note(event: SleepEvent) -> None:
            turn.slept.add(event)

        try:
            with self.model.on_sleep(of_cache(cache, note)):
                logits = self.model(ids, cache=cache, logits_to_keep=1, sleep_passes=steps.passes).logits
            turn.choose(logits[0, -1])
        except BaseException as error:
            turn.answer.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        turn.slept.seconds += time.perf_counter() - began
        self._cache = cache if not self.turns else SleepCache.cat([self._cache, cache])
        self.turns.append(turn)
        self._leave()

    def _sleep_where_full(self) -> None:
        """Let the rows sleep whose windows are full: those of the same N together."""
        size = self.model.config.sleep.window_size
        groups: dict[str, list[int]] = {}
        for b, (turn, row) in enumerate(zip(self.turns, self._cache.memory.counters, strict=True)):
            if row.fill == size:
                groups.setdefault(pass_key(self.model, turn.session.steps.passes), []).append(b)
        for rows in groups.values():
            part = self._cache.fork()
            part.select_rows(torch.tensor(rows))
            turns = [self.turns[b] for b in rows]

            def note(event: SleepEvent, turns: list[Turn] = turns) -> None:
                turns[event.row].slept.add(event)

            with self.model.on_sleep(of_cache(part, note)):
                self.model.sleep(part, turns[0].session.steps.passes)
            self._cache.hold(self.model, self._cache.memory.merge(rows, part.memory))

    def _leave(self) -> None:
        """Give the answers that have ended, and continue with the other rows."""
        over = [b for b, turn in enumerate(self.turns) if turn.is_over]
        if not over:
            return
        for b in over:
            turn, memory = self.turns[b], self._cache.memory.select([b]).alone()
            try:
                if not turn.answer.done():
                    turn.answer.set_result(self._answer(turn, memory))
            except Exception as error:
                turn.answer.set_exception(error)
        rest = [b for b in range(len(self.turns)) if b not in over]
        self.turns = [self.turns[b] for b in rest]
        self._cache.hold(self.model, self._cache.memory.select(rest) if rest else Memory())

    def _answer(self, turn: Turn, memory: Memory) -> str:
        steps = turn.session.steps
        if turn.remember:
            turn.session.keep(turn.begun, steps.answered(turn.held, turn.prompt, turn.said, memory, turn.slept))
        return steps.turns.answer(turn.said)
