"""ServeSettings: limits of a server, and where its memories are kept."""

import math
from dataclasses import dataclass

from ..checks import reject, require_int

LOCAL = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""
LOCAL_NAMES = ("127.0.0.1", "[::1]", "localhost")
"""The same, as a request's Host header names them."""


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server, and where its memories are kept.

    Args:
        name: that the model is served under.
        store: a folder, or any URL that fsspec knows, where memories are written after every change. Servers of one
            model may share it. `None`: memories live in RAM and end with the server.
        tokens: bearer tokens, one of which a request must carry; each has memories of its own. None: anybody may ask.
        hosts: names in the Host header that are answered; none: all. Without tokens it keeps other sites' pages away.
        max_ram_bytes: of all memories in RAM. With a store the least recently used ones leave it; without, what would
            not fit is refused.
        max_memories: per token.
        ttl: seconds without use after which a memory is forgotten, in RAM and in the store; `None`: never.
        max_body_bytes: of a request, but for an upload.
        max_upload_bytes: of a memory that is uploaded.
        max_tokens: of an answer.
        max_questions: of one request.
        max_queue: requests that wait for the model.
        prefix_bytes: of windows that were read before, kept in the store for each token, so that the same beginning is
            not read again; 0: none.
        seconds_to_send: that a client may take to send a body, or to take a piece of an answer.

    Raises:
        ValueError: a setting that cannot work.
    """

    name: str
    store: str | None = None
    tokens: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_ram_bytes: int = 4_000_000_000
    max_memories: int = 1000
    ttl: float | None = None
    max_body_bytes: int = 4_000_000
    max_upload_bytes: int = 256_000_000
    max_tokens: int = 1024
    max_questions: int = 32
    max_queue: int = 64
    prefix_bytes: int = 0
    seconds_to_send: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_ram_bytes", "max_memories", "max_body_bytes", "max_upload_bytes", "max_tokens"):
            require_int(f"ServeSettings.{name}", getattr(self, name), 1)
        for name in ("max_questions", "max_queue"):
            require_int(f"ServeSettings.{name}", getattr(self, name), 1)
        require_int("ServeSettings.prefix_bytes", self.prefix_bytes, 0)
        for name, seconds in (("ttl", self.ttl), ("seconds_to_send", self.seconds_to_send)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise reject(f"ServeSettings.{name}", seconds, "it must be a number of seconds above 0")
        if any(not token or not token.isascii() or token.split() != [token] for token in self.tokens):
            raise ValueError("a bearer token must be ASCII text without spaces")
        if self.prefix_bytes and self.store is None:
            raise reject("ServeSettings.prefix_bytes", self.prefix_bytes, "windows are kept in a store: give one")
