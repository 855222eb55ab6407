"""One run a folder: a lock that names its holder, and that ends with the holder's process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TextIO

from ml_collections import ConfigDict

from flow_grpo.parallel.engine import Ranks

FILE = "run.lock"
FOLDERS = ("checkpoints", "evaluations", "images")  # of a run, which it writes to
FILES = ("metrics.jsonl", "config.json", "run.json", "launches.json", "gate.json")
TRIES, PAUSE_S = 5, 0.2  # a holder may not have written its name yet
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Held:
    """A folder that is closed to others until release(), or this process' death.

    The lock is one of POSIX: network file systems know it, and children do not inherit it.
    """

    def __init__(self) -> None:
        self._lock: TextIO | None = None
        self._made: list[Path] = []

    def release(self) -> None:
        """Give the folder up, and delete it if nothing was written there."""
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        with suppress(OSError):  # it is not empty
            while self._made:
                self._made.pop(0).rmdir()

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = missing + self._made


class Results(Held):
    """A new folder for results of one process; or with `goes_on` one that has some."""

    def __init__(self, folder: Path, key: str, goes_on: bool = False):
        """key: what named it. Raises ValueError if it is not empty, in use or can't be used."""
        super().__init__()
        try:
            self._make(folder)
            self._lock = _locked(folder)
            rest = [path for path in folder.iterdir() if path.name != FILE]
        except OSError as error:
            raise ValueError(
                f"{key}={folder}: it can't be written to ({error}). Name a folder that can."
            ) from None
        if self._lock is None:
            raise ValueError(f"{key}={folder}: in use by {holder(folder)}. Name another folder.")
        if rest and not goes_on:
            self.release()
            raise ValueError(f"{key}={folder} is not empty. Name a new folder, or delete it.")


class Claim(Held):
    """A run's folder."""

    def __init__(self, config: ConfigDict, name: str, ranks: Ranks):
        """Every rank must call it. name: of the config. Raises ValueError on all ranks."""
        super().__init__()
        try:
            self.folder: Path = ranks.on_main(lambda: self._take(config, name))
        except ValueError:
            self.release()
            raise

    def _take(self, config: ConfigDict, name: str) -> Path:
        logdir = Path(config.logdir)
        try:
            self._make(logdir)
            if config.run_name:
                folder = logdir / config.run_name
                self._make(folder)
            else:
                folder = _new_folder(logdir, f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
                self._made.insert(0, folder)
            self._lock = _locked(folder)
            _check_writable(folder)
        except OSError as error:
            raise ValueError(
                f"config.logdir={str(logdir)!r}, config.run_name={config.run_name!r}: it "
                f"can't be written to ({error}). Set --config.logdir to a folder that can."
            ) from None
        if self._lock is None:
            raise ValueError(
                f"config.run_name={config.run_name!r}: {in_use(folder) or 'it was in use'}"
            )
        return folder


def holder(folder: Path) -> str:
    """Say which process holds a folder, as "host a, pid 1"; "" if none does."""
    try:
        with (folder / FILE).open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return (folder / FILE).read_text().strip() or "host and pid unknown"
    except OSError:  # no such file, or no locks
        pass
    return ""


def in_use(folder: Path) -> str:
    """Say which process a folder's run has, and what to do; "" if it has none."""
    if not (found := holder(folder)):
        return ""
    return (
        f"{folder} is in use by a run ({found}). Give this one another --config.run_name; or "
        f"stop that one there by `kill {found.split()[-1]}`, wait until it has saved, and "
        f"start this one with --config.resume_from=latest."
    )


def _new_folder(logdir: Path, name: str) -> Path:
    for number in count(1):
        folder = logdir / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def _locked(folder: Path) -> TextIO | None:
    """Return the folder's lock, held; None if another process holds it."""
    for _ in range(TRIES):
        file = (folder / FILE).open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"{folder}: no locks here; nothing keeps a second run out.", flush=True)
                return file
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.close()
            time.sleep(PAUSE_S)
            continue
        if _is_at(file, folder / FILE):  # else its holder has deleted it meanwhile
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
            file.flush()
            return file
        file.close()
    return None


def _is_at(file: TextIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _check_writable(folder: Path) -> None:
    """Raise OSError for what a run before has left, and this one can't write to."""
    for path in (folder / name for name in (*FOLDERS, *FILES)):
        if path.exists() and path.is_dir() != (path.name in FOLDERS):
            raise FileExistsError(
                errno.EEXIST, "a file in a folder's place, or one in a file's", path
            )
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
