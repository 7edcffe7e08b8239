"""Worker: the one thread that runs the model, and the queue before it."""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from .errors import ApiError, Gone
from .memories import Memories
from .metrics import Metrics

logger = logging.get_logger(__name__)

SWEEP_SECONDS = 30.0
"""Between two looks for memories that were not used for too long, where nothing is asked less often."""
ENDING = ApiError(503, "the server is shutting down", code="shutting_down")


@dataclass(frozen=True)
class Done:
    """The last event of a job that went well."""

    value: Any


class Job:
    """What a request asks of the model.

    Args:
        work: is called with the job in the worker's thread.
    """

    def __init__(self, work: Callable[["Job"], Any]):
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = threading.Event()

    def tell(self, event: Any) -> None:
        """Give an event to who waits; from the worker's thread. The last one is `Done`, or an `ApiError`."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def check(self, *_: Any) -> None:
        """End the job where nobody waits.

        Raises:
            Gone: nobody does.
        """
        if self.gone.is_set():
            raise Gone


class Worker:
    """A thread that runs one job after the other.

    Args:
        memories: only this thread uses them.
        max_queue: jobs that may wait.
    """

    def __init__(self, memories: Memories, max_queue: int):
        self.memories = memories
        self._jobs: queue.Queue[Job | None] = queue.Queue(max_queue)
        self.metrics = Metrics(self._jobs.qsize)
        self._closed, self._current, self._seconds = False, None, 0.0
        self._thread = threading.Thread(target=self._run, name="hf-sleep", daemon=True)

    _current: Job | None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Put a job at the queue's end.

        Raises:
            ApiError: the queue is full, or the server ends.
        """
        if self._closed:
            raise ENDING
        job = Job(work)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            wait = min(60, max(1, math.ceil(self._seconds * self._jobs.qsize())))
            raise ApiError(
                503,
                f"{self._jobs.qsize()} requests wait for the model already: try again in {wait} s",
                code="overloaded",
                headers={"Retry-After": str(wait)},
            ) from None
        return job

    def close(self) -> None:
        """Drop what waits and what is on its way, which leaves memories as they were before it, and end the thread."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                waiting = self._jobs.get_nowait()
                if waiting is not None:
                    waiting.tell(ENDING)
        current = self._current
        if current is not None:
            current.gone.set()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        swept = time.monotonic()
        with self.memories.model.on_sleep(self.metrics.slept):
            while True:
                try:
                    job = self._jobs.get(timeout=min(SWEEP_SECONDS, self.memories.settings.ttl or SWEEP_SECONDS))
                    if job is None:
                        return
                    self._do(job)
                except queue.Empty:
                    pass
                if time.monotonic() - swept > min(SWEEP_SECONDS, self.memories.settings.ttl or SWEEP_SECONDS):
                    self._sweep()
                    swept = time.monotonic()

    def _do(self, job: Job) -> None:
        self._current, began = job, time.monotonic()
        told = ENDING if self._closed else self._outcome(job)
        self._current = None
        self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        self._tidy()
        job.tell(told)

    def _outcome(self, job: Job) -> Done | ApiError:
        """How a job ended. Whatever happens in it, the next one begins."""
        try:
            job.check()
            with self.memories.model.on_sleep(job.check):
                return Done(job.work(job))
        except Gone:
            self.metrics.dropped()
            return ENDING
        except ApiError as error:
            return error
        except ValueError as error:  # of the library: what was asked cannot be
            return ApiError(400, " ".join(str(error).split()), code="invalid_value")
        except Exception:
            logger.exception("A request failed")
            return ApiError(500, "the server failed at this request; its log says how", code="internal_error")

    def _tidy(self) -> None:
        try:
            self.memories.recount()
        except Exception:
            logger.exception("Memories could not be counted")
        self.metrics.hold(len(self.memories.kept), self.memories.num_bytes)

    def _sweep(self) -> None:
        try:
            self.memories.sweep()
        except Exception:
            logger.exception("Old memories could not be forgotten")
        self._tidy()
