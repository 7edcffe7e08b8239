"""Writing files whole: a reader, or a crash, never meets half of one."""

import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Any


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file beside its place, bring it to the disk, and only then let it take its place.

    Whatever happens on the way, `path` holds what it held before or all of `content`; of an error nothing is left.

    Args:
        path: of a file, new or to be replaced, whose permissions stay; of a link, the file it leads to.
        content: text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: as `open` raises, and for what is no regular file.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no folder to write into", str(path.parent))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file, which alone can be replaced by a new one", str(path))
    beside = path.with_name(f".{path.name[:48]}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":
        _sync_folder(path.parent)


def modified(info: dict[str, Any]) -> float:
    """When a file was used or written last, as its file system says it, in seconds since the epoch.

    Args:
        info: what fsspec knows of it.
    """
    known = (info.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "created"))
    when = next((value for value in known if value is not None), 0.0)
    return when.timestamp() if hasattr(when, "timestamp") else float(when)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's new names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems say that cannot sync a folder by itself
            raise
    finally:
        os.close(descriptor)
