"""What the tests of private nodes share: their traces, their ends, and nodes with other habits."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread
import pika

from aioworkq import _node_parts
from aioworkq.testing import RabbitMQ

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncGenerator, Callable, Iterable

INTERRUPTED = textwrap.dedent(
    """
    import sys, anyio
    from aioworkq import testing
    from tests.nodes import traces

    async def main():
        subject = getattr(testing, sys.argv[1])()
        nodes = getattr(subject, "nodes", (subject,))
        async with anyio.create_task_group() as tasks:
            async def say():
                while not all(node.is_running for node in nodes):
                    await anyio.sleep(0.005)
                folders, processes = traces(nodes)
                print(len(folders), *folders, *processes, flush=True)
            if sys.argv[2] == "booting":
                tasks.start_soon(say)
            async with subject:
                if sys.argv[2] == "running":
                    await say()
                await anyio.sleep_forever()

    anyio.run(main)
    """
)


def wait_until(fact: Callable[[], bool], *, timeout: float = 20.0) -> None:
    """Poll a fact until it holds, or fail."""
    deadline = time.monotonic() + timeout
    while not fact():
        assert time.monotonic() < deadline, f"{fact} does not hold after {timeout} s"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs. A zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> set[int]:
    """Walk the process tree down; every user may."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = set[int](), [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting.extend(new)
    return found


def processes_of(node: RabbitMQ) -> set[int]:
    """List the processes of a node and their descendants."""
    inner = node._node
    assert inner is not None
    roots = {p.pid for p in (inner.server, inner.epmd, inner.watchdog) if p is not None}
    return roots.union(*map(descendants, roots))


def folder_of(node: RabbitMQ) -> Path:
    """Return a node's folder."""
    assert node._node is not None
    return node._node.path


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that blocks."""
    return await anyio.to_thread.run_sync(functools.partial(function, *args))


def publish(url: str, queue: str, body: bytes, queue_type: str = "classic") -> None:
    """Publish one persistent message to a durable queue, confirmed."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": queue_type})
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))


def get(url: str, queue: str) -> bytes | None:
    """Take one message from a queue."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        body: bytes | None = connection.channel().basic_get(queue, auto_ack=True)[2]
        return body


async def write_down(node: RabbitMQ) -> None:
    """Have a node write to disk which queues it has; it would do so within two seconds.

    Killed before, it forgets what is brand new, or finds nothing in it: `RabbitMQ.kill` says more.
    No client can help that, so tests of anything else call this before they kill a node.
    """
    # The decisions of Mnesia's transactions, and where quorum queues have their logs.
    await node.eval(
        "begin _ = (catch sys:get_state(mnesia_recover)), _ = (catch disk_log:sync(latest_log)), "
        "[ok = dets:sync(Table) || Table <- dets:all()] end"
    )


def other_versions() -> list[str]:
    """List the versions that live in root file systems of their own."""
    roots = _node_parts.installed_roots()
    return [one.version for root in roots for one in _node_parts._installations(root)]


def traces(nodes: Iterable[RabbitMQ]) -> tuple[list[Path], set[int]]:
    """List the folders and the processes of nodes; those that were never started have none."""
    started = [node for node in nodes if node._node is not None]
    return [folder_of(node) for node in started], set[int]().union(*map(processes_of, started))


def are_gone(folders: list[Path], processes: set[int]) -> bool:
    """Tell whether nothing of it is left."""
    return not any(folder.exists() for folder in folders) and not any(map(is_alive, processes))


def interrupted(subject: str, phase: str, number: signal.Signals) -> tuple[list[Path], set[int]]:
    """Send a signal to a process that starts nodes, and return what must go with it.

    Args:
        subject: A class of ``aioworkq.testing``: what the process starts.
        phase: When the signal comes: ``"booting"`` or ``"running"``.
        number: The signal.
    """
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, subject, phase],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert run.stdout is not None
    with run.stdout as stdout:
        count, *words = stdout.readline().split()
        folders = [Path(path) for path in words[: int(count)]]
        assert all(folder.exists() for folder in folders)
        processes = {int(word) for word in words[int(count) :]} | descendants(run.pid)
        run.send_signal(number)
        assert run.wait(30) != 0
    return folders, processes


@contextlib.asynccontextmanager
async def node_with_quick_delays(version: str | None) -> AsyncGenerator[RabbitMQ]:
    """Start a node which takes up after a second what a crash interrupts between two delay queues.

    By default that takes three minutes (dead_letter_worker_publisher_confirm_timeout).
    """
    async with RabbitMQ(version=version) as node:
        assert node._node is not None
        env = cast("dict[str, str]", node._node.env)
        env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] += (
            " -rabbit dead_letter_worker_publisher_confirm_timeout 1000"
        )
        await node.stop()
        await node.start()
        yield node
