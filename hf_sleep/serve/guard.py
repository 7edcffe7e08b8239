"""Guard: who may ask, how large a body may be, how slow a client; and how it was answered."""

import asyncio
import hmac
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .memories import owner_of
from .metrics import Metrics
from .settings import ServeSettings

OPEN = ("/health",)
"""Paths that need no token."""


class TooSlow(Exception):
    """A client that does not take what it asked for."""


class Guard:
    """Middleware before everything else.

    Args:
        app: that answers.
        settings: of the server.
        metrics: count.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                await asyncio.wait_for(send(message), self.settings.seconds_to_send)
            except TimeoutError:
                raise TooSlow from None

        try:
            scope.setdefault("state", {})["owner"] = self._admit(scope)
            await self.app(scope, self._limited(scope, receive), sent)
        except ApiError as error:
            await error.response()(scope, receive, sent)
        except TooSlow:
            status = 408
        finally:
            self.metrics.answered(scope["method"], getattr(scope.get("route"), "path", "unknown"), status)

    def _admit(self, scope: Scope) -> str:
        """Whose memories a request may use.

        Raises:
            ApiError: nobody's.
        """
        headers = dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self.settings.hosts and host not in self.settings.hosts:
            raise ApiError(421, "the Host header names another host than this server's", code="wrong_host")
        if self.settings.tokens and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            tokens = [t for t in self.settings.tokens if hmac.compare_digest(t.encode(), given.strip())]
            if scheme.lower() != b"bearer" or not tokens:
                raise ApiError(
                    401,
                    "a bearer token of this server's is needed",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            return owner_of(tokens[0])
        return owner_of(None)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` of a body that is not too large, and does not take too long.

        Raises:
            ApiError: a body whose length says that it is too large.
        """
        settings = self.settings
        most = settings.max_upload_bytes if scope["method"] == "PUT" else settings.max_body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise _too_large(most)
        read, is_whole, until = 0, False, time.monotonic() + settings.seconds_to_send

        async def limited() -> Message:
            nonlocal read, is_whole
            if is_whole:
                return await receive()
            try:
                message: Any = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise ApiError(408, "the body took too long", code="timeout") from None
            read += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if read > most:
                raise _too_large(most)
            return message

        return limited


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is too large: {most:,} bytes at most", code="body_too_large")
