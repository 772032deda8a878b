"""Hold a folder for one process at a time, and recognize locks and files of dead processes."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prfl_fast.utils.checks import check

LOCK = "run.lock"
# Folders that this process holds: descriptor and number of nested holds by thread. A forked child
# has another process id, so it inherits no hold.
_HELD: dict[tuple[int, int, str], list[int]] = {}


def _drop_inherited() -> None:
    # A descriptor that a child keeps open would hold the lock after its parent was killed.
    for descriptor, _ in _HELD.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_drop_inherited)


class FolderInUseError(ValueError):
    """Error for a folder in which another process works."""


def process_start(pid: int) -> float | None:
    """Return when process ``pid`` of this host began, in seconds since the epoch.

    Returns None if there is no such process, and 0.0 if the system does not tell the time.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # it exists and belongs to another user
    try:
        # The name of the process, in parentheses, may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in ("Z", "X"):  # a zombie holds nothing and writes nothing
            return None
        lines = Path("/proc/stat").read_text().splitlines()
        booted = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        return booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return 0.0


def is_writing(pid: int, written: float) -> bool:
    """Return True if process ``pid`` is alive and may have written a file at time ``written``."""
    start = process_start(pid)
    # A process that began later has only inherited the number. The clock of a file system may
    # differ by seconds.
    return start is not None and start <= written + 5


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _in_use(folder: Path, owner: dict[str, Any]) -> FolderInUseError:
    who = f"process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')}"
    return FolderInUseError(
        f"{folder} is in use by {who}, expected a folder in which no run works. "
        "Wait for that run to end, or choose another folder"
    )


def _owner_lives(path: Path, owner: dict[str, Any]) -> bool:
    """Decide by the content of a lock whether its owner lives, where the system cannot tell."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    return owner.get("host") != socket.gethostname() or is_writing(pid, path.stat().st_mtime)


def _is_file(path: Path, descriptor: int) -> bool:
    """Return True if ``descriptor`` is of the file that is at ``path`` now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _lock(folder: Path) -> int:
    """Lock the folder and return the descriptor of its lock file."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                for _ in range(10):  # the owner writes its name a moment after it locked
                    if owner := _read(path):
                        break
                    time.sleep(0.02)
                # Some network file systems have no locks: then the content decides.
                locked = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
                if locked or _owner_lives(path, owner):
                    raise _in_use(folder, owner) from error
            # The previous owner may have removed the file between open and lock.
            if _is_file(path, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    content = {"pid": os.getpid(), "host": socket.gethostname()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
    return descriptor


@contextlib.contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``folder``, which is created, against all other processes and threads.

    The thread that holds a folder may hold it again. The system drops the lock of a process that
    dies, so a killed run leaves a ``run.lock`` that the next run takes over.

    Raises:
        FolderInUseError: if another process or thread holds the folder, or has begun in a new
            folder of this name since this one was moved.
        ValueError: if ``folder`` is a file.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    check(not folder.is_file(), "folder", str(folder), "a folder, not a file")
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    key = (os.getpid(), threading.get_ident(), str(folder.resolve()))
    if key not in _HELD:
        _HELD[key] = [_lock(folder), 0]
    elif (folder / LOCK).exists() and not _is_file(folder / LOCK, _HELD[key][0]):
        # The folder was moved away, and another run began in a new one.
        raise _in_use(folder, _read(folder / LOCK))
    _HELD[key][1] += 1
    try:
        yield
    finally:
        held = _HELD.get(key)
        if held is not None:  # None in a forked child, which does not hold the folder
            held[1] -= 1
            if held[1] == 0:
                del _HELD[key]
                # Before the lock is dropped, so that no process removes the file of another.
                if _is_file(folder / LOCK, held[0]):
                    (folder / LOCK).unlink(missing_ok=True)
                # A child between fork and exec may still have a copy of the descriptor.
                with contextlib.suppress(OSError):
                    fcntl.flock(held[0], fcntl.LOCK_UN)
                os.close(held[0])
                with contextlib.suppress(OSError):  # a run that wrote nothing leaves no folder
                    for path in created:
                        path.rmdir()
