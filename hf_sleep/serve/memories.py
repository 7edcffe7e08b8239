"""Memories of a server: in RAM up to a limit, and on a shelf. Only the thread that runs the model calls it."""

import hashlib
import re
import reprlib
import time
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from transformers.utils import logging

from ..state import SleepState
from ..store import SleepStore, model_key
from .errors import ApiError, refused
from .session import ServedSession
from .settings import ServeSettings
from .shelf import Changed, Shelf, Volume, opening_of, unread

logger = logging.get_logger(__name__)

ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MOST_TOKENS = 2**24
"""That a memory which is uploaded may have read: `generate` makes a mask over all of them."""
MOST_HEADER = 4_000_000
"""Bytes of the header of a memory which is uploaded: to parse it takes many times as many."""


@dataclass
class Kept:
    """A memory in RAM.

    Args:
        session: that holds it.
        version: of its file, if there is one; else how often it changed.
        used: when, in seconds since the epoch.
        num_bytes: that it takes.
        system: its system prompt, while it has read nothing.
    """

    session: ServedSession
    version: int
    used: float
    num_bytes: int
    system: str | None = None


class Memories:
    """The memories of a server.

    Args:
        model: a `SleepForCausalLM`.
        tokenizer: of its base.
        settings: of the server.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ServeSettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self.shelf = None if settings.store is None else Shelf(settings.store, model_key(model))
        self._prefixes: dict[str, SleepStore] = {}

    # One memory.

    def session(self, owner: str, system: str | None = None) -> ServedSession:
        """A session that has read nothing."""
        return ServedSession(self.model, self.tokenizer, system=system, store=self._store(owner))

    def create(self, owner: str, id: str | None, system: str | None) -> str:
        """A memory that has read nothing; gives its id.

        Raises:
            ApiError: there is one of that name, or there are too many.
        """
        id = uuid.uuid4().hex if id is None else check_id(id)
        version = self._version(owner, id)
        if version > 0:
            raise ApiError(409, f"there is a memory {id!r} already: choose another id", param="id", code="exists")
        self._check_number(owner)
        self._put(owner, id, _first(version), self.session(owner, system), unread(system), system)
        return id

    def current(self, owner: str, id: str) -> Kept:
        """A memory as it is now, whichever server wrote it last.

        Raises:
            ApiError: there is none, or its file is damaged.
        """
        key = (owner, check_id(id))
        if self.shelf is not None:
            self._refresh(self.shelf, key)
        if key not in self.kept:
            raise ApiError(
                404,
                f'there is no memory {id!r}: POST /v1/memories {{"id": "{id}"}} makes one',
                param="memory_id",
                code="memory_not_found",
            )
        self.kept.move_to_end(key)
        kept = self.kept[key]
        kept.used = time.time()
        return kept

    def commit(self, owner: str, id: str, kept: Kept, session: ServedSession) -> None:
        """Let a memory be what `session` holds, in RAM and on the shelf.

        Args:
            owner: of the memory.
            id: of the memory.
            kept: what `current` gave, from which the session went on.
            session: a fork of it, that nobody else uses.

        Raises:
            ApiError: another server changed it meanwhile, or it has no room. It stays as it was then.
        """
        content = unread(kept.system) if session.is_empty else session.to_state().to_bytes()
        self._put(owner, id, kept.version + 1, session.fork(), content, kept.system if session.is_empty else None)

    def content(self, owner: str, id: str) -> bytes:
        """A memory as a file.

        Raises:
            ApiError: there is none, or it has read nothing.
        """
        session = self.current(owner, id).session
        if session.is_empty:
            raise ApiError(409, f"the memory {id!r} has read nothing: there is no file of it", code="memory_empty")
        return session.to_state().to_bytes()

    def upload(self, owner: str, id: str, content: bytes) -> None:
        """Let a memory be what a file holds; make it where there is none.

        Raises:
            ApiError: a bad file, which changes nothing.
        """
        check_id(id)
        try:
            session = self._loaded(owner, content, "the file")
        except ValueError as error:
            raise ApiError(400, " ".join(str(error).split()), param="file", code="invalid_memory") from error
        version = self._version(owner, id)
        if version <= 0:
            self._check_number(owner)
        self._put(owner, id, version + 1 if version > 0 else _first(version), session, content)

    def forget(self, owner: str, id: str) -> None:
        """Overwrite a memory with zeros, and delete its files.

        Raises:
            ApiError: there is none.
        """
        version = self._version(owner, check_id(id))
        if version <= 0:
            raise ApiError(404, f"there is no memory {id!r}", param="memory_id", code="memory_not_found")
        self._drop((owner, id))
        if self.shelf is not None:
            while True:
                with suppress(Changed):
                    return self.shelf.write(owner, id, version + 1, b"")
                version = abs(self._version(owner, id))

    def report(self, owner: str, id: str) -> dict[str, Any]:
        """What a memory tells of itself."""
        kept = self.current(owner, id)
        about = asdict(kept.session.report())
        return {"id": id, "object": "memory", "version": kept.version, "used": kept.used} | about

    # All of them.

    def list(self, owner: str) -> list[dict[str, Any]]:
        """The memories of one owner, without a look into them: id, when used, bytes, whether in RAM."""
        if self.shelf is None:
            found = [(id, kept.used, kept.num_bytes) for (of, id), kept in self.kept.items() if of == owner]
        else:
            volumes = [volume for _, volume in self.shelf.all(owner) if volume.num_bytes]
            found = [(volume.id, volume.when, volume.num_bytes) for volume in volumes]
        return [
            {"id": id, "object": "memory", "used": used, "bytes": size, "in_ram": (owner, id) in self.kept}
            for id, used, size in sorted(found)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes in RAM."""
        return sum(kept.num_bytes for kept in self.kept.values())

    def recount(self) -> None:
        """Count the bytes of what was used, and let the least recently used ones leave RAM where there is a shelf."""
        for key in list(self.kept)[-1:]:
            self.kept[key].num_bytes = self.kept[key].session.num_bytes()
        while self.shelf is not None and self.kept and self.num_bytes > self.settings.max_ram_bytes:
            self._drop(next(iter(self.kept)))

    def sweep(self) -> None:
        """Forget what was not used for too long."""
        ttl, now = self.settings.ttl, time.time()
        for (owner, id), kept in list(self.kept.items()):
            if ttl is not None and now - kept.used > ttl and self.shelf is None:
                self._drop((owner, id))
        if self.shelf is None:
            return
        there = {(owner, volume.id) for owner, volume in self.shelf.all() if volume.num_bytes}
        for key in self.kept.keys() - there:  # another server forgot it
            self._drop(key)
        for owner, volume in self.shelf.sweep(ttl):
            kept_here = self.kept.get((owner, volume.id))
            if ttl is None or kept_here is None or now - kept_here.used > ttl:
                with suppress(ApiError):  # another server forgot it just now
                    self.forget(owner, volume.id)

    # Inside.

    def _store(self, owner: str) -> SleepStore | None:
        if not self.settings.prefix_bytes:
            return None
        if owner not in self._prefixes:
            url = f"{self.settings.store}/prefixes/{owner}"
            self._prefixes[owner] = SleepStore(url, self.settings.prefix_bytes)
        return self._prefixes[owner]

    def _version(self, owner: str, id: str) -> int:
        """Of a memory; of one that was forgotten, negative; 0 where there never was one."""
        if self.shelf is None:
            kept = self.kept.get((owner, id))
            return 0 if kept is None else kept.version
        volume = self.shelf.newest(owner, id)
        return 0 if volume is None else volume.version if volume.num_bytes else -volume.version

    def _refresh(self, shelf: Shelf, key: tuple[str, str]) -> None:
        """Make RAM hold what the shelf holds."""
        while (volume := shelf.newest(*key)) is not None and volume.num_bytes:
            kept = self.kept.get(key)
            if kept is not None and kept.version == volume.version:
                return shelf.touch(volume)
            self._drop(key)
            with suppress(FileNotFoundError):  # a newer version has taken its place
                self._keep(key, volume, shelf.read(volume))
        self._drop(key)

    def _keep(self, key: tuple[str, str], volume: Volume, content: bytes) -> None:
        owner, id = key
        system = None
        try:
            if content.startswith(b"{"):
                system = opening_of(content)
                session = self.session(owner, system)
            else:
                session = self._loaded(owner, content, f"the memory {id!r}")
        except ValueError as error:
            message = " ".join(str(error).split())
            logger.warning("A memory of the store cannot be used: %r", message)
            raise ApiError(
                409, f"{message}. Delete it, or upload it again", param="memory_id", code="invalid_memory"
            ) from error
        self.kept[key] = Kept(session, volume.version, time.time(), session.num_bytes(), system)
        self._make_room(key)

    def _loaded(self, owner: str, content: bytes, name: str) -> ServedSession:
        """The session of a file.

        Raises:
            ValueError: a bad file, whatever is wrong with it.
        """
        if int.from_bytes(content[:8], "little") > MOST_HEADER:
            raise ValueError(f"{name} is no sleep state: its header has more than {MOST_HEADER:,} bytes")
        try:
            state = SleepState.from_bytes(content, name)
            if len(state.rows) != 1 or state.rows[0].seen != state.columns or state.columns > MOST_TOKENS:
                raise ValueError(
                    f"{name} is a state of {len(state.rows)} sequences in {reprlib.repr(state.columns)} columns: a "
                    f"server takes what a session saved, of up to {MOST_TOKENS:,} tokens"
                )
            return ServedSession.of_state(state, self.model, self.tokenizer, name=name, store=self._store(owner))
        except (TypeError, KeyError, OverflowError, RuntimeError, RecursionError, MemoryError) as error:
            raise ValueError(f"{name} is no sleep state: {type(error).__name__}") from error

    def _put(
        self, owner: str, id: str, version: int, session: ServedSession, content: bytes, system: str | None = None
    ) -> None:
        """Write a version, and hold it in RAM."""
        key, size = (owner, id), session.num_bytes()
        before = self.kept[key].num_bytes if key in self.kept else 0
        if self.shelf is None and self.num_bytes - before + size > self.settings.max_ram_bytes:
            raise ApiError(
                507,
                f"the server's memories may take {self.settings.max_ram_bytes:,} bytes, and this one has no room: "
                "delete some",
                code="memories_full",
            )
        if self.shelf is not None:
            try:
                self.shelf.write(owner, id, version, content)
            except Changed as error:
                self._drop(key)
                raise ApiError(
                    409,
                    f"another server changed the memory {id!r} meanwhile: send the request again",
                    param="memory_id",
                    code="memory_changed",
                ) from error
        self.kept[key] = Kept(session, version, time.time(), size, system)
        self._make_room(key)

    def _check_number(self, owner: str) -> None:
        if len(self.list(owner)) >= self.settings.max_memories:
            raise refused("memories", self.settings.max_memories, "that is the most: delete one", "too_many_memories")

    def _make_room(self, key: tuple[str, str]) -> None:
        """Let others leave RAM, where they are on the shelf."""
        self.kept.move_to_end(key)
        while self.shelf is not None and len(self.kept) > 1 and self.num_bytes > self.settings.max_ram_bytes:
            self._drop(next(iter(self.kept)))

    def _drop(self, key: tuple[str, str]) -> None:
        """Overwrite with zeros what RAM holds of a memory."""
        kept = self.kept.pop(key, None)
        if kept is not None:
            kept.session.forget()


def _first(version: int) -> int:
    """The number that a new memory begins with, above that of any memory of its name which was forgotten.

    A shelf does not remember for ever that one was. The clock does: no memory changes every second.

    Args:
        version: as `_version` gives it.
    """
    return max(abs(version) + 1, int(time.time()))


def check_id(id: str) -> str:
    """The id, if it is one.

    Raises:
        ApiError: it is not.
    """
    if ID.fullmatch(id) is None:
        raise ApiError(
            400,
            "an id of a memory is 1 to 64 of a-z, 0-9, _ and -, and begins with a letter or digit",
            param="memory_id",
            code="invalid_id",
        )
    return id


def owner_of(token: str | None) -> str:
    """The name of a folder for what belongs to a bearer token; it does not tell the token."""
    return "anybody" if token is None else hashlib.sha256(token.encode()).hexdigest()[:32]
