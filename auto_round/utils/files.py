"""Files that outlive a power cut, a full disk and a second run: flushing, locking, and writing all of what was given.

A file that was not fsynced may be empty after a power cut, and its name may be gone unless its folder was fsynced too.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from auto_round.logger import logger


class InUseError(RuntimeError):
    """Another run writes to the same place; the message says where and what to do."""


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on the disk (where the system can: Windows cannot)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Put everything in a folder on the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each of which a power cut leaves in place."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def write_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all bytes at an offset; `path` is named in errors.

    Raises:
        OSError: the disk is full, or broken. A single system call may write less than it is given without an error.
    """
    while data:
        try:
            done = os.pwrite(handle, data, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        data, offset = data[done:], offset + done


def read_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from an offset on; `path` is named in errors.

    Raises:
        OSError: the file ends before.
    """
    while data:
        done = os.preadv(handle, [data], offset)
        if not done:
            raise OSError(errno.EIO, f"ends {len(data)} bytes too early: something else has cut it", str(path))
        data, offset = data[done:], offset + done


class Lock:
    """A file that one process at a time holds, until `close()` or its end. The file goes with the lock.

    Raises:
        InUseError: another process holds it.
    """

    def __init__(self, file: Path, busy: str):
        import fcntl  # not on Windows, where the rest of this module may be imported

        self._file = file
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not file.exists() or not os.path.samestat(os.stat(file), os.fstat(self._handle))
        except BlockingIOError:
            gone = True
        except OSError as error:  # file systems without locks
            logger.warning("%s cannot be locked (%s): start no second run in that folder", file, error.strerror)
            gone = False
        if gone:  # or its holder removed the file between the two calls
            os.close(self._handle)
            raise InUseError(f"{busy} is in use by another run: wait for it, or choose another output")

    def close(self) -> None:
        if self._handle >= 0:
            self._file.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1
