"""The end of a private RabbitMQ node: who kills its processes and removes its folder, and when.

This file is a program too: a node starts it by its path, in an interpreter that sees no other
package, so it imports the standard library only. It outlives its parent by the milliseconds that
it takes to clean up behind it, even behind a SIGKILL. On the orderly way it is told to do the
same: there is one way to end, and every run tests it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator


def spawn(path: Path, *, uid: int, gid: int) -> subprocess.Popen[bytes]:
    """Start the watchdog of a folder, which need not exist yet.

    A byte on its standard input, or our death, makes it destroy the folder and exit with 0. It has
    a session of its own: a Ctrl-C in the terminal does not reach it.

    Args:
        path: The folder.
        uid: The user whose processes live in it.
        gid: The group of that user.
    """
    arguments = (str(path), str(uid), str(gid), str(os.getpid()))
    return subprocess.Popen(  # noqa: S603 - our own arguments
        [sys.executable, "-I", "-S", __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
        bufsize=0,
    )


def wait_for_end(*, parent: int, pipe: int) -> None:
    """Wait until the pipe has something to say, or the parent is dead.

    The pipe alone would do, were it not for children that the parent forked: they keep its other
    end open. The parent's pidfd alone would miss a parent that died before it was opened.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    # No such parent any more, or no such call in this kernel or Python: then the pipe tells.
    with contextlib.suppress(OSError, AttributeError):
        poll.register(os.pidfd_open(parent), select.POLLIN)
    poll.poll()


def destroy(path: Path, *, uid: int, gid: int) -> None:
    """Kill every process that was started for the folder, and remove the folder."""
    empty_scans = 0
    while empty_scans < 2:  # noqa: PLR2004 - the second finds what was forked during the first
        found = processes_of(path, uid=uid, gid=gid)
        empty_scans = 0 if found else empty_scans + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if found:
            time.sleep(0.005)
    # The last system call of a dying thread may still create a file.
    deadline = time.monotonic() + 5
    while path.exists() and time.monotonic() < deadline:
        shutil.rmtree(path, ignore_errors=True)


def processes_of(path: Path, *, uid: int, gid: int) -> list[int]:
    """List the processes that were started for the folder. A zombie is none.

    They are found by their environment (``HOME``), which all descendants of a node keep in
    whatever session or process group Erlang put them.
    """
    mark = f"\0HOME={path}\0".encode()
    found: list[int] = []
    # On its way into another root file system a program is still ours.
    for user in {(uid, gid), (os.geteuid(), os.getegid())}:
        with _seeing_as(*user):
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    with contextlib.suppress(OSError):
                        if mark in b"\0" + (entry / "environ").read_bytes():
                            found.append(int(entry.name))
    return found


@contextlib.contextmanager
def _seeing_as(uid: int, gid: int) -> Generator[None]:
    """Be another user for a moment.

    In a container root is not allowed to read the environment of other users' processes.
    """
    ours = os.geteuid(), os.getegid()
    if ours[0] != 0:
        yield
        return
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(ours[0])
        os.setegid(ours[1])


def main() -> None:
    """Watch over the folder, the user and the parent that the command line names."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    path, uid, gid, parent = sys.argv[1:]
    wait_for_end(parent=int(parent), pipe=sys.stdin.fileno())
    destroy(Path(path), uid=int(uid), gid=int(gid))


if __name__ == "__main__":
    main()
