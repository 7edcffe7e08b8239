"""SleepSession: a memory with a model and a tokenizer, that people read into, ask, save and erase."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from .checks import reject
from .held import Held, Source, erase, pass_key
from .idle import IdleSleep
from .lora import without_wrapper
from .report import Progress, Reading, Report
from .state import SleepState
from .steps import Passes, Steps
from .store import SleepStore
from .streaming import streamed
from .turns import READER, Text, Turns, name_of

BEFORE_TURNS = ("when_needed", "always", "never")


class SleepSession:
    """A memory with a model and a tokenizer.

    Read into it, ask it, save it. A step that fails leaves it as it was; a `read` that is interrupted keeps the windows
    that were read. Several sessions may share a model; two of them must not call it at the same time.

    Args:
        model: a `SleepForCausalLM`, or a `PeftModel` of one; it is set to evaluation.
        tokenizer: of its base.
        chat: whether turns are written with the tokenizer's chat template; by default where there is one.
        system: a system prompt.
        sleep_passes: N, or a policy, of this session's sleeps; by default the model's.
        sleep_before_turns: when to sleep before a question is read. "when_needed": where question and answer do not fit
            into the window any more, so that no window ends between them; "always"; "never".
        store: where windows that were read once are kept, and looked up.
        template: further keywords for the chat template.

    Raises:
        ValueError: settings that do not fit the tokenizer.
        TypeError: a model that does not sleep.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        chat: bool | None = None,
        system: str | None = None,
        sleep_passes: Passes = None,
        sleep_before_turns: str = "when_needed",
        store: SleepStore | None = None,
        **template: Any,
    ) -> None:
        if sleep_before_turns not in BEFORE_TURNS:
            raise reject("sleep_before_turns", sleep_before_turns, f"it must be one of {', '.join(BEFORE_TURNS)}")
        model = without_wrapper(model).eval()
        pass_key(model, sleep_passes)
        self.steps = Steps(model, Turns.of(tokenizer, chat, system, **template), sleep_passes, store)
        self.sleep_before_turns = sleep_before_turns
        self._lock, self._idle = threading.RLock(), None
        self._held, self._before, self._rested = Held(), None, None

    _held: Held
    _before: Held | None
    """What was held before the last step, for `undo`."""
    _rested: tuple[Held, Held] | None
    """What was held when a question came that needed a sleep, and the same after that sleep."""
    _idle: IdleSleep | None

    @property
    def model(self) -> Any:
        """The model that reads and answers."""
        return self.steps.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.steps.turns.tokenizer

    # Reading.

    def read(
        self,
        text: Text,
        *,
        title: str | None = None,
        then_sleep: bool = False,
        do_not_consolidate: bool = False,
        sleep_passes: Passes = None,
        progress: bool = True,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> int:
        """Read a text, sleeping whenever a window is full.

        Args:
            text: a string; a path or an open file; token ids; or an iterator of strings, each read as it comes.
            title: how the report calls it; by default a file's name.
            then_sleep: sleep at its end, whatever the window holds.
            do_not_consolidate: the text can be asked about for as long as its window lasts, and never reaches the fast
                weights: before the next sleep the window is read again without it. It must fit into the window. What
                the model says of it in a turn that is remembered is not covered.
            sleep_passes: N, or a policy, for this text; by default the session's.
            progress: show a bar, of a text of more than one window.
            on_progress: called after each window, or part of one.

        Returns:
            Tokens read.

        Raises:
            ValueError: what cannot be read, or a private text that does not fit; nothing was read then.
        """
        steps = self.steps.with_passes(sleep_passes)
        pass_key(self.model, steps.passes)
        read = steps.private if do_not_consolidate else steps.windows
        pieces, total = steps.turns.pieces(text, self.model.config.text_config.vocab_size)
        is_long = total is None or total > steps.window_size
        with self._step(), Reading(total, progress and is_long, on_progress) as reading:
            try:
                for ids in pieces:
                    held = self._held
                    held = steps.read_all(held, steps.turns.entering(held.speaking))
                    held = replace(held, speaking=READER)
                    for part, after in read(held, ids):
                        self._held = after
                        reading.tell(part, after)
            finally:
                if reading.tokens:
                    source = Source(title or name_of(text), reading.tokens, reading.digest.hexdigest())
                    self._held = replace(self._held, sources=(*self._held.sources, source))
            if then_sleep:
                self._held = steps.sleep(self._held)
        return reading.tokens

    # Asking.

    def ask(self, question: str, *, remember: bool = False, **generation: Any) -> str:
        """Answer a question, from a fork: the memory stays as it was.

        Args:
            question: in the reader's words; the template's come by themselves.
            remember: keep the turn, question and answer.
            generation: for `generate`: `max_new_tokens` (128), `do_sample`, `streamer`, …

        Returns:
            The answer, without special tokens.

        Raises:
            ValueError: a question that cannot be read, or that has no room beside a private text.
        """
        with self._step() if remember else self._still():
            prompt = self.steps.turns.asking(self._held.speaking, question)
            held, said = self.steps.answer(self._before_turn(prompt, generation), prompt, generation)
            if remember:
                if held is None:
                    raise ValueError(
                        "remember=True with num_beams: a beam search leaves several memories. Leave one out"
                    )
                self._held = held
            return self.steps.turns.answer(said)

    def chat(self, message: str, **generation: Any) -> str:
        """Answer a message and keep the turn: `ask(message, remember=True)`."""
        return self.ask(message, remember=True, **generation)

    def stream(self, question: str, *, remember: bool = False, **generation: Any) -> Iterator[str]:
        """The same as `ask`, in pieces as they are made. Leaving the loop early ends the answer there."""
        return streamed(self.tokenizer, lambda **how: self.ask(question, remember=remember, **generation | how))

    def ask_many(self, questions: Sequence[str], **generation: Any) -> list[str]:
        """Answer many questions as a batch, each from a fork of its own: as `ask` answers each alone.

        Where there has to be a sleep before them, it is one for all.
        """
        with self._still():
            prompts = [self.steps.turns.asking(self._held.speaking, question) for question in questions]
            groups: dict[int, tuple[Held, list[int]]] = {}
            for i, prompt in enumerate(prompts):
                held = self._before_turn(prompt, generation)
                groups.setdefault(id(held), (held, []))[1].append(i)
            answers: dict[int, str] = {}
            for held, group in groups.values():
                said, _, _ = self.steps.generate(held, [prompts[i] for i in group], generation)
                answers |= dict(zip(group, map(self.steps.turns.answer, said), strict=True))
            return [answers[i] for i in range(len(prompts))]

    def begin(self, question: str, generation: dict[str, Any]) -> tuple[Held, Held, list[int]]:
        """For who answers outside `ask`: what is held, what the turn follows, and the question's ids.

        Raises:
            ValueError: as `ask`.
        """
        with self._still():
            prompt = self.steps.turns.asking(self._held.speaking, question)
            return self._held, self._before_turn(prompt, generation), prompt

    def keep(self, begun: Held, held: Held) -> None:
        """Keep a turn that was answered outside, and that began with `begun`.

        Raises:
            RuntimeError: something else was read or remembered since.
        """
        with self._step():
            if self._held is not begun:
                raise RuntimeError("the session has changed since the question was asked: its answer cannot be kept")
            self._held = held

    def _before_turn(self, prompt: list[int], generation: dict[str, Any]) -> Held:
        """What a question follows: what is held, after a sleep where one is due, which is made once for many."""
        if not self.steps.must_sleep(self._held, prompt, self.sleep_before_turns, generation):
            return self._held
        if self._rested is None or self._rested[0] is not self._held:
            self._rested = (self._held, self.steps.sleep(self._held))
        return self._rested[1]

    # Sleeping, and going back.

    def sleep(self, sleep_passes: Passes = None) -> None:
        """Sleep now, on what the window holds: in idle time, or at a document's end.

        Args:
            sleep_passes: N, or a policy; by default the session's.
        """
        with self._step():
            self._held = self.steps.with_passes(sleep_passes).sleep(self._held)

    def sleep_when_idle(self, seconds: float | None = 1.0) -> None:
        """Sleep in the background when nothing was asked for so long; `None` ends it.

        What comes next waits for one pass at most: a sleep that is not over by then is dropped, as if it had never
        begun.
        """
        if self._idle is not None:
            self._idle.pause()
        self._idle = None if seconds is None else IdleSleep(seconds, self._sleep_unless)
        if self._idle is not None:
            self._idle.resume()

    def _sleep_unless(self, cancelled: threading.Event) -> None:
        held = self.steps.sleep(self._held, IdleSleep.policy(self.model, self.steps.passes, cancelled))
        self._held = held

    def undo(self) -> None:
        """Take back the last step that changed the memory: a read, a turn, a sleep or a rollback. Only the last.

        Raises:
            ValueError: nothing to take back.
        """
        with self._still():
            if self._before is None:
                raise ValueError("there is nothing to undo: a session keeps what it held before its last step alone")
            self._held, self._before, self._rested = self._before, None, None

    def rollback(self) -> None:
        """Go back to the last sleep: what was read or said since is forgotten.

        Raises:
            ValueError: it has not slept since it was made or loaded.
        """
        with self._step():
            slept = self._held.at_sleep
            if slept is None:
                raise ValueError(
                    "there is no sleep to go back to: the session has not slept since it was made or loaded"
                )
            self._held = replace(slept, at_sleep=slept)

    def forget(self) -> None:
        """Forget everything: every tensor of this memory is overwritten with zeros and dropped.

        Forks share tensors with it, so forget them too. Files and stores are left alone.
        """
        with self._still():
            held = [part for part in (self._held, self._before, *(self._rested or ())) if part is not None]
            self._held, self._before, self._rested = Held(), None, None
            erase([memory for part in held for memory in part.memories()], self.model)

    def fork(self) -> Self:
        """A second session that holds the same and continues alone. It costs nothing: tensors are shared."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._lock, twin._idle, twin._before, twin._rested = threading.RLock(), None, None, None
        return twin

    # Keeping.

    def save(self, path: str | os.PathLike) -> None:
        """Write the memory as a `SleepState`, with where it comes from: titles, counts and digests, and no text.

        A text that must not be consolidated is not in it. What is still in the window is there as keys and values, from
        which it can be guessed: `sleep()` first, where that matters.

        Raises:
            ValueError: a session that has read nothing.
        """
        self.to_state().save(path)

    def to_state(self) -> SleepState:
        """The memory as `save` writes it."""
        with self._still():
            held = self.steps.public(self._held)
            if not held.memory.counters:
                raise ValueError("the session has read nothing: there is nothing to save")
            about = held.about() | {"tokenizer": self.steps.turns.tokenizer_id, "saved": time.time()}
            return replace(SleepState.from_cache(self.model, self.steps.cache(held.memory)), about=about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any, tokenizer: Any, **settings: Any) -> Self:
        """Continue a session that was saved, token for token.

        Args:
            path: what `save` wrote.
            model: the same model.
            tokenizer: the same tokenizer.
            settings: as a new session takes them.

        Raises:
            ValueError: another model or tokenizer, or a file that no session saved.
        """
        return cls.of_state(SleepState.load(path), model, tokenizer, name=str(path), **settings)

    @classmethod
    def of_state(
        cls, state: SleepState, model: Any, tokenizer: Any, *, name: str = "the state", **settings: Any
    ) -> Self:
        """The session of a state, as `load` does it; errors call it `name`."""
        session = cls(model, tokenizer, **settings)
        if state.about is None or len(state.rows) != 1:
            raise ValueError(
                f"{name} is a state of {len(state.rows)} sequences that no session saved: SleepState.to_cache(model) "
                "makes a cache of it"
            )
        if state.about.get("tokenizer") != session.steps.turns.tokenizer_id:
            raise ValueError(f"{name} was read with another tokenizer: load it with the one that it was saved with")
        memory = state.to_cache(model).memory
        try:
            session._held = Held.of_file(memory, state.about)
        except ValueError as error:
            raise ValueError(f"{name} cannot be continued: {error}") from error
        return session

    def report(self) -> Report:
        """Tokens, sleeps, seconds and bytes, and what was read."""
        held = self._held
        cache = self.steps.cache(held.memory)
        return Report(
            tokens=held.row.seen,
            window_tokens=held.row.fill,
            sleeps=held.row.sleeps,
            sleep_passes=list(held.passes),
            seconds_awake=held.awake,
            seconds_asleep=held.asleep,
            kv_bytes=cache.kv_bytes(),
            fast_weight_bytes=cache.fast_weight_bytes(),
            num_bytes=cache.num_bytes(),
            sources=list(held.sources),
        )

    def __repr__(self) -> str:
        row = self._held.row
        return f"SleepSession(tokens={row.seen}, sleeps={row.sleeps}, bytes={self._held.memory.num_bytes():,})"

    @contextmanager
    def _still(self) -> Iterator[None]:
        """One thread at a time, and no sleep in the background."""
        with self._lock:
            if self._idle is not None:
                self._idle.pause()
            try:
                yield
            finally:
                if self._idle is not None:
                    self._idle.resume()

    @contextmanager
    def _step(self) -> Iterator[None]:
        """A step that changes what is held, and can be undone."""
        with self._still():
            held = self._held
            try:
                yield
            finally:
                if self._held is not held:
                    self._before, self._rested = held, None
