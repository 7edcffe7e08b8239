"""The application: OpenAI's paths, memories, health and metrics."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..version import __version__
from .bodies import AskBody, ChatBody, CompletionBody, CreateBody, OpenAiBody, ReadBody
from .errors import ApiError, of_validation, refused
from .guard import Guard
from .jobs import Jobs, Work
from .memories import Memories, check_id
from .settings import ServeSettings
from .shapes import ChatShape, CompletionShape, Shape
from .waiting import in_pieces, value_of, whole
from .worker import Worker

UPLOADS_AT_ONCE = 2
"""Bodies that may be large."""


def create_app(model: Any, tokenizer: Any, settings: ServeSettings) -> FastAPI:
    """An application of one model, for any ASGI server: one process, for the memories in RAM are its own.

    Args:
        model: a `SleepForCausalLM`.
        tokenizer: of its base.
        settings: limits, tokens, and where memories are kept.
    """
    worker = Worker(Memories(model.eval(), tokenizer, settings), settings.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.close)

    app = FastAPI(
        title="hf_sleep", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.worker, app.state.uploads = worker, asyncio.Semaphore(UPLOADS_AT_ONCE)
    app.add_middleware(Guard, settings=settings, metrics=worker.metrics)
    _add_errors(app)
    _add_about(app, worker, settings)
    _add_openai(app, Jobs(worker), settings)
    _add_memories(app, worker.memories, Jobs(worker))
    return app


def _add_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return ApiError.of(error).response()

    @app.exception_handler(RequestValidationError)
    async def of_a_body(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(Exception)
    async def of_ours(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed at this request; its log says how", code="internal_error").response()


def _add_about(app: FastAPI, worker: Worker, settings: ServeSettings) -> None:
    """Paths about the server."""
    model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "hf_sleep"}

    @app.get("/health")
    async def health() -> Response:
        if not worker.is_alive:
            raise ApiError(500, "the thread that runs the model has ended: start the server again", code="ended")
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name, settings)
        return model


def _add_openai(app: FastAPI, jobs: Jobs, settings: ServeSettings) -> None:
    """OpenAI's paths."""

    async def answered(request: Request, body: OpenAiBody, work: Work, shape: Shape) -> Any:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        if body.stream:
            return await in_pieces(request, work, shape, with_usage)
        if body.stream_options is not None:
            raise refused("stream_options", None, "they say something with stream=true alone")
        return await whole(request, work, shape)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody, x_memory_id: str | None = Header(None)) -> Any:
        _check_model(body.model, settings)
        _take_memory_id(body, x_memory_id)
        return await answered(request, body, jobs.chat(request.state.owner, body), ChatShape(settings.name))

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody, x_memory_id: str | None = Header(None)) -> Any:
        _check_model(body.model, settings)
        _take_memory_id(body, x_memory_id)
        return await answered(request, body, jobs.complete(request.state.owner, body), CompletionShape(settings.name))


def _add_memories(app: FastAPI, memories: Memories, jobs: Jobs) -> None:
    """Paths of memories. What they do happens in the worker's thread."""

    @app.post("/v1/memories", status_code=201)
    async def create(request: Request, body: CreateBody) -> Any:
        owner = request.state.owner
        return await value_of(request, lambda _: memories.report(owner, memories.create(owner, body.id, body.system)))

    @app.get("/v1/memories")
    async def all_of_them(request: Request) -> Any:
        owner = request.state.owner
        return {"object": "list", "data": await value_of(request, lambda _: memories.list(owner))}

    @app.get("/v1/memories/{id}")
    async def report(request: Request, id: str) -> Any:
        owner = request.state.owner
        return await value_of(request, lambda _: memories.report(owner, id))

    @app.delete("/v1/memories/{id}")
    async def forget(request: Request, id: str) -> Any:
        owner = request.state.owner
        await value_of(request, lambda _: memories.forget(owner, id))
        return {"id": id, "object": "memory", "deleted": True}

    @app.post("/v1/memories/{id}/read")
    async def read(request: Request, id: str, body: ReadBody) -> Any:
        return await value_of(request, jobs.read(request.state.owner, id, body))

    @app.post("/v1/memories/{id}/ask")
    async def ask(request: Request, id: str, body: AskBody) -> Any:
        return await value_of(request, jobs.ask(request.state.owner, id, body))

    @app.get("/v1/memories/{id}/file")
    async def download(request: Request, id: str) -> Any:
        owner = request.state.owner
        content = await value_of(request, lambda _: memories.content(owner, check_id(id)))
        headers = {"Content-Disposition": f'attachment; filename="{id}.sleep"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @app.put("/v1/memories/{id}/file")
    async def upload(request: Request, id: str) -> Any:
        owner = request.state.owner
        async with app.state.uploads:
            content = await request.body()

            def work(_: Any) -> Any:
                memories.upload(owner, id, content)
                return memories.report(owner, id)

            return await value_of(request, work)


def _take_memory_id(body: OpenAiBody, header: str | None) -> None:
    """Let the header X-Memory-Id say what the body may say too.

    Raises:
        ApiError: they differ.
    """
    if header is not None and body.memory_id not in (None, header):
        raise refused("memory_id", None, "the header X-Memory-Id names another memory: leave one of them out")
    body.memory_id = body.memory_id if header is None else header


def _check_model(name: str, settings: ServeSettings) -> None:
    if name != settings.name:
        raise ApiError(
            404, f"this server has one model, {settings.name!r}: name it", param="model", code="model_not_found"
        )
