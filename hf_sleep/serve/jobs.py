"""Jobs: what requests do in the worker's thread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .bodies import AskBody, ChatBody, CompletionBody, OpenAiBody, ReadBody, conversation
from .errors import ApiError, refused
from .memories import Kept, Memories
from .metrics import Metrics
from .session import ServedSession
from .text import Answer
from .worker import Job, Worker

Work = Callable[[Job], Any]


class Started:
    """Told when a request has all it needs, before its first word."""


@dataclass(frozen=True)
class Ended:
    """How an answer ended: OpenAI's reason, and tokens of the prompt and of it."""

    reason: str
    prompt_tokens: int
    completion_tokens: int

    def usage(self) -> dict[str, int]:
        """As OpenAI counts."""
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return tokens | {"total_tokens": self.prompt_tokens + self.completion_tokens}


class Jobs:
    """What a server can do for an owner of memories.

    Args:
        worker: has the thread.
    """

    def __init__(self, worker: Worker):
        self.memories: Memories = worker.memories
        self.metrics: Metrics = worker.metrics
        self.settings = worker.memories.settings

    def chat(self, owner: str, body: ChatBody) -> Work:
        """Answer the last message.

        Raises:
            ApiError: what can be said of it before it is begun.
        """
        system, turns, question = conversation(body.messages)
        if body.memory_id is not None and turns:
            raise refused("messages", None, "with a memory_id only the new message is sent: the memory has the others")
        generation = body.generation(self.settings.max_tokens)

        def ask(session: ServedSession, answer: Answer, remember: bool) -> None:
            session.ask(question, remember=remember, **generation | answer.generation())

        def work(job: Job) -> Ended:
            kept, session = self._opened(owner, body, system)
            for said in turns:
                session.replay(*said, **generation)
            read = 0 if kept is not None else session.tokens
            return self._answered(job, owner, body, kept, session, ask, read, stripped=True)

        return work

    def complete(self, owner: str, body: CompletionBody) -> Work:
        """Continue a text.

        Raises:
            ApiError: what can be said of it before it is begun.
        """
        prompt = body.text(self.memories.model.config.text_config.vocab_size)
        if not prompt:
            raise refused("prompt", None, "it must not be empty")
        generation = body.generation(self.settings.max_tokens)

        def complete(session: ServedSession, answer: Answer, remember: bool) -> None:
            session.complete(prompt, remember=remember, **generation | answer.generation())

        def work(job: Job) -> Ended:
            kept, session = self._opened(owner, body, None)
            return self._answered(job, owner, body, kept, session, complete, 0, stripped=False)

        return work

    def read(self, owner: str, id: str, body: ReadBody) -> Work:
        """Read a text into a memory; gives the tokens read, and its report."""

        def work(job: Job) -> dict[str, Any]:
            kept = self.memories.current(owner, id)
            session = kept.session.fork()
            read = session.read(body.text, title=body.title, then_sleep=body.then_sleep, progress=False)
            job.check()
            self.memories.commit(owner, id, kept, session)
            self.metrics.used(read, 0)
            return {"read": read} | self.memories.report(owner, id)

        return work

    def ask(self, owner: str, id: str, body: AskBody) -> Work:
        """Answer questions from a memory, each alone, and leave it as it is."""
        questions, generation = body.all(self.settings.max_questions), body.generation(self.settings.max_tokens)

        def work(job: Job) -> dict[str, Any]:
            session, tokenizer = self.memories.current(owner, id).session, self.memories.tokenizer
            listener = Answer(tokenizer, lambda _: None, (), True, job.gone.is_set).generation()["stopping_criteria"]
            with body.seeded(self.memories.model.device):
                answers = session.ask_many(questions, stopping_criteria=listener, **generation)
            counts = [sum(len(tokenizer(text).input_ids) for text in texts) for texts in (questions, answers)]
            self.metrics.used(*counts)
            return {"id": id, "object": "memory.answers", "answers": answers}

        return work

    def _opened(self, owner: str, body: OpenAiBody, system: str | None) -> tuple[Kept | None, ServedSession]:
        """The memory that a request names, if it does, and a session to continue.

        Raises:
            ApiError: a system prompt for a memory that has begun.
        """
        if body.memory_id is None:
            if body.remember:
                raise refused("remember", True, "without a memory_id there is nothing to keep a turn in")
            return None, self.memories.session(owner, system)
        kept = self.memories.current(owner, body.memory_id)
        if system is None:
            return kept, kept.session if body.remember is False else kept.session.fork()
        if not kept.session.is_empty or kept.system is not None:
            raise ApiError(
                400,
                "a system message stands at the start of a memory alone, and this one has begun: leave it out, or "
                "make another memory",
                param="messages",
                code="memory_has_begun",
            )
        return kept, self.memories.session(owner, system)

    def _answered(
        self,
        job: Job,
        owner: str,
        body: OpenAiBody,
        kept: Kept | None,
        session: ServedSession,
        answer_with: Callable[[ServedSession, Answer, bool], None],
        read: int,
        stripped: bool,
    ) -> Ended:
        """Answer, telling the job, and keep the turn where it is to be kept."""
        remember = kept is not None and body.remember is not False
        answer = Answer(self.memories.tokenizer, job.tell, body.stops, stripped, job.gone.is_set)
        job.tell(Started())
        with body.seeded(self.memories.model.device):
            answer_with(session, answer, remember)
        job.check()
        if remember:
            assert kept is not None
            assert body.memory_id is not None
            self.memories.commit(owner, body.memory_id, kept, session)
        ended = Ended(answer.finish_reason(session.steps.stops), read + answer.prompt_tokens, answer.completion_tokens)
        self.metrics.used(ended.prompt_tokens, ended.completion_tokens)
        return ended
