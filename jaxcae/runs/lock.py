"""The lock of a run directory: held by the process at work, and gone with it.

Exclusion is by `flock`, as it always was. A question must not take a lock, by which it would make
another's open fail for a moment; so the holder also takes a lock of the kind that can be asked for
(F_OFD_GETLK, Linux), and where there is none, the opener is patient with questions.
"""

import contextlib
import fcntl
import os
import platform
import re
import struct
import time
from pathlib import Path
from typing import IO

from jaxcae.errors import InputError, RunError
from jaxcae.files import open_regular

LOCK = "run.lock"
_MAX_BYTES = 2**12
_PATIENCE = 0.2
_WHOLE_FILE = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's struct flock
_CAN_ASK = hasattr(fcntl, "F_OFD_GETLK")


def take_lock(path: Path) -> IO[str]:
    """Lock a directory for this process, or say who holds it.

    Raises:
        RunError: If another process does, or the file is not one of ours or cannot be written to.
    """
    name, patience = path / LOCK, 0.0 if _CAN_ASK else _PATIENCE
    until = time.monotonic() + patience
    while True:
        try:
            file = os.fdopen(open_regular(name, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except InputError as error:
            raise RunError(f"{error} Use another `run_dir`.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200).strip() or "another process"
            file.close()
            if time.monotonic() < until:
                time.sleep(0.01)
                continue
            raise RunError(
                f"{path}: in use by {holder}. Wait for it, or use another `run_dir`."
            ) from None
        except OSError as error:
            file.close()
            raise RunError(f"{path}: cannot be locked: {error.strerror}.") from None
        # The holder may have removed the directory between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(file.fileno())):
                break
        file.close()
    if not is_lock_text(os.pread(file.fileno(), _MAX_BYTES, 0)):
        file.close()
        raise RunError(f"{name}: was not written by jaxcae. Use another `run_dir`.")
    if _CAN_ASK:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WHOLE_FILE)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def is_in_use(path: Path) -> bool:
    """Tell whether a process holds the lock of a run directory; nothing is locked to find out."""
    try:
        with os.fdopen(open_regular(path / LOCK), "rb") as file:
            if _CAN_ASK:
                answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WHOLE_FILE)
                return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (InputError, OSError):
        return False
    return False


def is_lock_text(text: bytes) -> bool:
    """Tell whether a lock file holds what we write into one, or nothing."""
    return re.fullmatch(rb"(process \d+ on [^\n]{0,255}\n)?", text) is not None
