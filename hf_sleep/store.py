"""SleepStore: windows that were read once, by what was read, so that nobody reads the same beginning again."""

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from transformers.utils import logging

from .cache import SleepCache
from .checks import NewerFormatError
from .files import modified
from .held import Held, chained, chained_sleep
from .state import SleepState, fingerprint

logger = logging.get_logger(__name__)

SUFFIX, PART = ".sleep", ".part"
PART_SECONDS = 3600.0
"""After which a file that is still half-written is of a process that was killed."""


class SleepStore:
    """A folder of states by the digest of all that was read, written at window ends.

    Several processes and machines may share one: a state is written whole under its name, and never changes.

    Args:
        url: a folder, or any URL that fsspec knows (`s3://…`, `gs://…`, `memory://…`).
        max_bytes: what may lie there, of this model and others; the states that were not used for longest go first.
            Where the file system does not say when a file was used last, those that were written first.
    """

    def __init__(self, url: str | os.PathLike, max_bytes: int | None = None):
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: it must be at least 1, or None for no limit")
        self.files, self.root = fsspec.core.url_to_fs(os.fspath(url))
        self.max_bytes = max_bytes
        self.files.makedirs(self.root, exist_ok=True)

    def longest(self, model: Any, held: Held, ids: list[int], how: str) -> tuple[int, Held]:
        """How many of the ids that come next were read before, and what is held after them; 0 and `held` for none.

        Args:
            model: that reads.
            held: by the session that reads them.
            ids: of a text.
            how: the passes of its sleeps, as `pass_key` writes them.
        """
        size, done, fill, chain = model.config.sleep.window_size, 0, held.row.fill, held.chain
        ends: list[tuple[int, str]] = []
        if fill == size:
            fill, chain = 0, chained_sleep(chain, how)
        while done + size - fill < len(ids):
            read = ids[done : done + size - fill]
            done, fill, chain = done + len(read), 0, chained_sleep(chained(chain, read), how)
            ends.append((done, chain))
        folder = self._folder(model) if ends else ""
        for done, chain in reversed(ends):
            if (found := self._load(f"{folder}/{chain}{SUFFIX}", model, held.row.seen + done)) is None:
                continue
            memory, passes = found
            passes = (*held.passes, *passes[len(held.passes) :])
            after = replace(held, memory=memory, chain=chain, passes=passes, at_sleep=None)
            return done, replace(after, at_sleep=after)
        return 0, held

    def keep(self, model: Any, cache: SleepCache, held: Held) -> None:
        """Write what is held right after a sleep, unless it is there.

        Args:
            model: that read it.
            cache: with its memory.
            held: names it.
        """
        folder = self._folder(model)
        path = f"{folder}/{held.chain}{SUFFIX}"
        if self.files.exists(path):
            return self._touch(path)
        state = replace(SleepState.from_cache(model, cache), about={"passes": list(held.passes)})
        beside = f"{folder}/.{uuid.uuid4().hex}{PART}"
        try:
            self.files.makedirs(folder, exist_ok=True)
            self.files.pipe_file(beside, state.to_bytes())
            self.files.mv(beside, path)
        except (OSError, ValueError) as error:  # of a full disk, or of values that are not finite
            logger.warning("A state could not be kept in the store: %s", error)
        finally:
            self._discard(beside)
        self._shrink()

    def num_bytes(self) -> int:
        """Bytes of all states there."""
        return sum(size for _, size, _ in self._states())

    def clear(self) -> None:
        """Delete every state.

        Raises:
            OSError: one that may not be deleted.
        """
        for path, _, _ in self._states():
            self._delete(path)

    def _folder(self, model: Any) -> str:
        """Where states of this model with these settings lie."""
        return f"{self.root}/{model_key(model)}"

    def _load(self, path: str, model: Any, seen: int) -> tuple[Any, tuple[int, ...]] | None:
        """The memory of a state right after a sleep, after `seen` tokens, and the N of its sleeps; `None` of none."""
        try:
            data = self.files.cat_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("A state of the store could not be read: %s", error)
            return None
        try:
            state = SleepState.from_bytes(data, path)
            memory = state.to_cache(model).memory
            passes = tuple(int(n) for n in (state.about or {})["passes"])
            if [(row.seen, row.fill) for row in state.rows] != [(seen, 0)] or min(passes, default=1) < 1:
                raise ValueError(f"{path} is not what a sleep after {seen} tokens left")
        except NewerFormatError as error:
            logger.warning("A state in the store is left out: %s", error)
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("A state in the store is left out and deleted: %s", error)
            self._discard(path)
            return None
        self._touch(path)
        return memory, passes

    def _touch(self, path: str) -> None:
        """Note that a state was used, where files say when they were."""
        if isinstance(self.files, LocalFileSystem):
            with suppress(OSError):  # it is gone, or somebody else's
                os.utime(path)

    def _states(self) -> list[tuple[str, int, float]]:
        """Path, bytes and time of last use of every state; what a killed process left half-written goes."""
        self.files.invalidate_cache()
        found = self.files.find(self.root, detail=True)
        files = [(path, info["size"] or 0, modified(info)) for path, info in found.items()]
        for path, _, when in files:
            if path.endswith(PART) and 0 < when < time.time() - PART_SECONDS:
                self._discard(path)
        return sorted((file for file in files if file[0].endswith(SUFFIX)), key=lambda state: state[2])

    def _shrink(self) -> None:
        if self.max_bytes is None:
            return
        states = self._states()
        size = sum(size for _, size, _ in states)
        for path, freed, _ in states:
            if size <= self.max_bytes:
                return
            self._discard(path)
            size -= freed

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.files.rm_file(path)

    def _discard(self, path: str) -> None:
        try:
            self._delete(path)
        except OSError as error:  # it is somebody else's
            logger.warning("A file of the store could not be deleted: %s", error)


def model_key(model: Any) -> str:
    """A name for what states of a model depend on: its weights, dtype and settings, but for the number of passes."""
    settings = {name: value for name, value in model.config.sleep.to_dict().items() if name != "sleep_passes"}
    facts = [fingerprint(model), str(model.dtype), settings]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
