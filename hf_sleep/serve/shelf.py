"""Shelf: memories as files that several servers share, each version of one written once and whole."""

import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..files import modified, write_file

SUFFIX, PART = ".memory", ".part"
KEPT_SECONDS = 3600.0
"""How long a shelf remembers that a memory was forgotten, so that a server that still works on it learns of it."""


@dataclass(frozen=True)
class Volume:
    """The newest version of one memory.

    Args:
        id: of the memory.
        version: grows with every change.
        num_bytes: of the file; 0: the memory was forgotten.
        when: it was written, or used last where the file system says it, in seconds since the epoch.
        path: of the file.
    """

    id: str
    version: int
    num_bytes: int
    when: float
    path: str


class Changed(Exception):
    """Another server wrote this version first."""


class Shelf:
    """Memories of one model as files: `OWNER/m-ID/VERSION.memory`.

    A change is a new file under the next number, which only one server can write. An empty file says that the memory
    was forgotten. So a server sees by the number whether what it has in RAM is still right.

    Args:
        url: a folder, or any URL that fsspec knows.
        model: a name for the model, whose memories mean nothing to others.
    """

    def __init__(self, url: str | os.PathLike, model: str):
        self.files, root = fsspec.core.url_to_fs(os.fspath(url))
        self.root = f"{root}/memories/{model}"
        self.files.makedirs(self.root, exist_ok=True)

    def newest(self, owner: str, id: str) -> Volume | None:
        """The newest version of a memory, also of one that was forgotten; `None` where there never was one."""
        return max(self._volumes(self._folder(owner, id)), key=lambda volume: volume.version, default=None)

    def all(self, owner: str | None = None) -> list[tuple[str, Volume]]:
        """Owner and newest version of every memory, of one owner or of all, the forgotten ones included."""
        newest: dict[tuple[str, str], Volume] = {}
        for volume in self._volumes(self.root if owner is None else f"{self.root}/{owner}"):
            key = (volume.path.split("/")[-3], volume.id)
            if key not in newest or newest[key].version < volume.version:
                newest[key] = volume
        return [(of, volume) for (of, _), volume in newest.items()]

    def read(self, volume: Volume) -> bytes:
        """Its content.

        Raises:
            FileNotFoundError: a newer version has taken its place.
        """
        data: bytes = self.files.cat_file(volume.path)
        self.touch(volume)
        return data

    def touch(self, volume: Volume) -> None:
        """Note that it was used, where files say when they were."""
        if isinstance(self.files, LocalFileSystem):
            with suppress(OSError):  # it is gone, or somebody else's
                os.utime(volume.path)

    def write(self, owner: str, id: str, version: int, content: bytes) -> None:
        """Write a version, whole or not at all, and delete those before it.

        Raises:
            Changed: it is there already.
        """
        folder = self._folder(owner, id)
        self.files.makedirs(folder, exist_ok=True)
        path = f"{folder}/{version:012d}{SUFFIX}"
        try:
            if isinstance(self.files, LocalFileSystem):
                self._link(path, content)
            else:
                self.files.pipe_file(path, content, mode="create")
        except FileExistsError as error:
            raise Changed from error
        for volume in self._volumes(folder):
            if volume.version < version:
                self._delete(volume.path)

    def sweep(self, ttl: float | None) -> list[tuple[str, Volume]]:
        """Drop what is left of forgotten memories, and give those that were not used for `ttl` seconds."""
        old, now = [], time.time()
        if isinstance(self.files, LocalFileSystem):
            for part in Path(self.root).rglob(f".*{PART}"):  # of a server that was killed while it wrote
                with suppress(FileNotFoundError):
                    if now - part.stat().st_mtime > KEPT_SECONDS:
                        part.unlink()
        for owner, volume in self.all():
            if not volume.num_bytes and now - volume.when > KEPT_SECONDS:
                self._delete(volume.path)
                with suppress(OSError):  # somebody makes it again just now
                    self.files.rmdir(self._folder(owner, volume.id))
            elif volume.num_bytes and ttl is not None and now - volume.when > ttl:
                old.append((owner, volume))
        return old

    def _link(self, path: str, content: bytes) -> None:
        """Write beside the place, bring it to the disk, and give it its name if nothing has that name."""
        beside = Path(path).with_name(f".{uuid.uuid4().hex}{PART}")
        try:
            write_file(beside, content)
            os.link(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _folder(self, owner: str, id: str) -> str:
        return f"{self.root}/{owner}/m-{id}"

    def _volumes(self, folder: str) -> list[Volume]:
        if isinstance(self.files, LocalFileSystem):
            return _local_volumes(Path(folder))
        self.files.invalidate_cache()
        found: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError):
            found = self.files.find(folder, detail=True)
        return [volume for path, info in found.items() if (volume := _volume(path, info)) is not None]

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.files.rm_file(path)


def _local_volumes(folder: Path) -> list[Volume]:
    """The versions in a folder; looked for again where one is deleted while we look, for a newer one is then there."""
    while True:
        found, missed = [], False
        for path in folder.rglob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                missed = True
                continue
            info = {"size": status.st_size, "mtime": status.st_mtime}
            if (volume := _volume(path.as_posix(), info)) is not None:
                found.append(volume)
        if not missed:
            return found


def _volume(path: str, info: dict[str, Any]) -> Volume | None:
    """What a file is; `None` for one that is no version of a memory."""
    name, folder = path.split("/")[-1], path.split("/")[-2]
    number = name.removesuffix(SUFFIX)
    if not (name.endswith(SUFFIX) and number.isdecimal() and folder.startswith("m-")):
        return None
    return Volume(folder[2:], int(number), info["size"] or 0, modified(info), path)


def opening_of(content: bytes) -> str | None:
    """The system prompt of a memory that has read nothing.

    Raises:
        ValueError: anything else.
    """
    about = json.loads(content)
    if type(about) is not dict or about.keys() != {"system"} or not isinstance(about["system"], str | None):
        raise ValueError("it is no memory")
    system: str | None = about["system"]
    return system


def unread(system: str | None) -> bytes:
    """The content of a memory that has read nothing."""
    return json.dumps({"system": system}).encode()
