"""Waiting for a job, for as long as its client does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine import SleepEvent
from .errors import ApiError
from .jobs import Ended, Started, Work
from .shapes import END, Shape, comment, event
from .worker import Done, Job

CLIENT_IS_GONE = 499
"""The status that is counted where nobody is there to be told one."""


async def value_of(request: Request, work: Work) -> Any:
    """What a job gives in the end.

    Raises:
        ApiError: that it ended with.
    """
    job = request.app.state.worker.submit(work)
    async with _watched(request, job) as following:
        while not isinstance(told := await following(), Done):
            pass
    return told.value


async def whole(request: Request, work: Work, shape: Shape) -> dict[str, Any]:
    """An answer when it is whole.

    Raises:
        ApiError: that the job ended with.
    """
    job, said = request.app.state.worker.submit(work), []
    async with _watched(request, job) as following:
        while not isinstance(told := await following(), Done):
            if isinstance(told, str):
                said.append(told)
    return shape.whole("".join(said), told.value)


async def in_pieces(request: Request, work: Work, shape: Shape, with_usage: bool) -> StreamingResponse:
    """An answer as it is made. What is wrong before its first word is told by the status.

    Raises:
        ApiError: that the job ended with before it had begun.
    """
    job = request.app.state.worker.submit(work)
    async with _watched(request, job, may_go_on=True) as following:
        sleeps = []
        while not isinstance(told := await following(), Started):
            sleeps += [comment(told)] if isinstance(told, SleepEvent) else []
    return Streamed(job, _pieces(job, shape, sleeps, with_usage))


class Streamed(StreamingResponse):
    """Server-sent events of a job, which ends when they are not read any more."""

    def __init__(self, job: Job, pieces: AsyncIterator[str]):
        # Proxies that gather what they pass on are told not to.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.gone.set()


async def _pieces(job: Job, shape: Shape, before: list[str], with_usage: bool) -> AsyncIterator[str]:
    for text in (*before, *map(event, shape.first())):
        yield text
    while not isinstance(told := await job.events.get(), Done | ApiError):
        yield comment(told) if isinstance(told, SleepEvent) else event(shape.piece(told))
    if isinstance(told, ApiError):
        yield event(told.body())
        return
    ended: Ended = told.value
    for piece in shape.last(ended, with_usage):
        yield event(piece)
    yield END


@asynccontextmanager
async def _watched(request: Request, job: Job, may_go_on: bool = False) -> AsyncIterator[Callable[[], Any]]:
    """A function that waits for a job's next event, and ends the job where its client is gone first.

    Args:
        request: of the client.
        job: that answers it.
        may_go_on: whether the job goes on when this is over without an error.
    """
    gone = asyncio.ensure_future(_until_gone(request))

    async def following() -> Any:
        told = asyncio.ensure_future(job.events.get())
        try:
            await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                raise ApiError(CLIENT_IS_GONE, "the client is gone")
            if isinstance(event := told.result(), ApiError):
                raise event
            return event
        finally:
            told.cancel()

    try:
        yield following
    except BaseException:
        job.gone.set()
        raise
    finally:
        gone.cancel()
        if not may_go_on:
            job.gone.set()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
