"""SleepSession: a memory with a model and a tokenizer, that people read into, ask, save and erase."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from transformers import StoppingCriteriaList

from .checks import reject
from .held import Held, Source, erase, pass_key
from .idle import IdleSleep
from .lora import without_wrapper
from .report import Progress, Reading, Report
from .saved import Saved
from .steps import Passes, Steps
from .store import SleepStore
from .streaming import streamed
from .turns import READER, Text, Turns, name_of

BEFORE_TURNS = ("when_needed", "always", "never")


class SleepSession(Saved):
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
        self._lock, self._idle, self._depth, self._asked = threading.RLock(), None, 0, 0
        self._held, self._before, self._rested = Held(), None, None

    _held: Held
    _before: Held | None
    """What was held before the last step, for `undo`."""
    _rested: tuple[Held, Held, Passes] | None
    """What was held when a question came that needed a sleep, the same after that sleep, and its passes."""
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
            ValueError: what cannot be read, or a private text that does not fit; nothing was read then, but for what an
                iterator gave before.
        """
        steps = self.steps.with_passes(sleep_passes)
        pass_key(self.model, steps.passes)
        read = steps.private if do_not_consolidate else steps.windows
        if not isinstance(title, str | None):
            raise ValueError(f"title={title!r}: it must be a string")
        pieces, total = steps.turns.pieces(text, self.model.config.text_config.vocab_size)
        is_long = total is None or total > steps.window_size
        if do_not_consolidate:
            pieces = [[token for piece in pieces for token in piece]]
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
                if reading.tokens and not do_not_consolidate:
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
        steps = self.steps.for_turn(generation)
        with self._step() if remember else self._still():
            prompt = steps.turns.asking(self._held.speaking, question)
            before = self._before_turn(steps, prompt, generation)
            if not remember:
                (said,), _, _ = steps.generate(before, [prompt], generation)
                return steps.turns.answer(said)
            held, said = steps.answer(before, prompt, generation)
            if held is None:
                raise ValueError("remember=True with num_beams: a beam search leaves several memories. Leave one out")
            self._held = held
            return steps.turns.answer(said)

    def chat(self, message: str, **generation: Any) -> str:
        """Answer a message and keep the turn: `ask(message, remember=True)`."""
        return self.ask(message, remember=True, **generation)

    def stream(self, question: str, *, remember: bool = False, **generation: Any) -> Iterator[str]:
        """The same as `ask`, in pieces as they are made. Leaving the loop early ends the answer there."""
        if "streamer" in generation:
            raise ValueError("streamer: stream is one itself. Use ask(…, streamer=…), or leave it out")
        given = generation.pop("stopping_criteria", [])

        def ask(streamer: Any, stopping_criteria: Any) -> str:
            criteria = StoppingCriteriaList([*given, *stopping_criteria])
            how = {"streamer": streamer, "stopping_criteria": criteria}
            return self.ask(question, remember=remember, **generation, **how)

        return streamed(self.tokenizer, ask)

    def ask_many(self, questions: Sequence[str], **generation: Any) -> list[str]:
        """Answer many questions as a batch, each from a fork of its own: as `ask` answers each alone.

        Where there has to be a sleep before them, it is one for all.
        """
        if self.steps.ends_without_a_token(generation):
            # generate keeps rows of a batch apart that have ended only where some token ends one.
            return [self.ask(question, **generation) for question in questions]
        steps = self.steps.for_turn(generation)
        with self._still():
            prompts = [steps.turns.asking(self._held.speaking, question) for question in questions]
            groups: dict[int, tuple[Held, list[int]]] = {}
            for i, prompt in enumerate(prompts):
                held = self._before_turn(steps, prompt, generation)
                groups.setdefault(id(held), (held, []))[1].append(i)
            answers: dict[int, str] = {}
            for held, group in groups.values():
                said, _, _ = steps.generate(held, [prompts[i] for i in group], generation)
                answers |= dict(zip(group, map(steps.turns.answer, said), strict=True))
            return [answers[i] for i in range(len(prompts))]

    def begin(self, question: str, generation: dict[str, Any]) -> tuple[Held, Held, list[int]]:
        """For who answers outside `ask`: what is held, what the turn follows, and the question's ids.

        Raises:
            ValueError: as `ask`.
        """
        with self._still():
            prompt = self.steps.turns.asking(self._held.speaking, question)
            begun = self._held, self._before_turn(self.steps, prompt, generation), prompt
            self._asked += 1
            return begun

    def end(self) -> None:
        """Say that a turn which `begin` began is over: until then there is no sleep in the background."""
        with self._still():
            self._asked -= 1

    def keep(self, begun: Held, held: Held) -> None:
        """Keep a turn that was answered outside, and that began with `begun`.

        Raises:
            RuntimeError: something else was read or remembered since.
        """
        with self._step():
            if self._held is not begun:
                raise RuntimeError("the session has changed since the question was asked: its answer cannot be kept")
            self._held = held

    def _before_turn(self, steps: Steps, prompt: list[int], generation: dict[str, Any]) -> Held:
        """What a question follows: what is held, after a sleep where one is due, which is made once for many."""
        if not steps.must_sleep(self._held, prompt, self.sleep_before_turns, generation):
            return self._held
        if self._rested is None or self._rested[0] is not self._held or self._rested[2] != steps.passes:
            self._rested = (self._held, steps.sleep(self._held), steps.passes)
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
        if self._asked or self._held.public is not None:
            return
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
            held = [part for part in (self._held, self._before, *(self._rested or ())[:2]) if part is not None]
            self._held, self._before, self._rested = Held(), None, None
            erase([memory for part in held for memory in part.memories()], self.model)

    def __copy__(self) -> Self:
        return self.fork()

    def __deepcopy__(self, memo: dict) -> Self:
        raise TypeError("a session shares its model: fork() continues it alone, and save(path) keeps it")

    def __reduce__(self) -> Any:
        raise TypeError("a session belongs to a live model and cannot be pickled: save(path), and load it elsewhere")

    def fork(self) -> Self:
        """A second session that holds the same and continues alone. It costs nothing: tensors are shared."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._lock, twin._idle, twin._before, twin._rested = threading.RLock(), None, None, None
        twin._depth = twin._asked = 0
        return twin

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
            idle, self._depth = self._idle, self._depth + 1
            if idle is not None and self._depth == 1:
                idle.pause()
            try:
                yield
            finally:
                self._depth -= 1
                if self._idle is not None and not self._depth:
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
