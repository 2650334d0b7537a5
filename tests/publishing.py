"""What the tests of the publishing half share: no complaints in the logs, alarms, secrets."""

from __future__ import annotations

import contextlib
import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworkq.outbox import Outbox
from tests.consuming import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from aioworkq import MemoryBroker, Message, Producer
    from aioworkq.testing import RabbitMQ


async def publish_as_another_client(broker: MemoryBroker, message: Message) -> None:
    """Publish a message with all the headers that it has, which no `Producer` does."""
    connection = broker.connection(name="other", owner="producer", max_message_size=1000)
    outbox = Outbox(connection, window=10, window_bytes=1000)
    try:
        await outbox.wait_connected(timeout=5)
        wire = connection.prepare(message)
        await outbox.publish(message, wire, deadline=outbox.loop.time() + 5)
    finally:
        await outbox.aclose(timeout=5)


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test if asyncio tells of an error that nobody looked at, or we of a defect."""
    gc.freeze()  # only what the test itself leaves behind need be looked through
    yield
    gc.collect()
    gc.unfreeze()
    records = [record for when in ("setup", "call") for record in caplog.get_records(when)]
    complaints = [
        record.getMessage()
        for record in records
        if record.name in {"asyncio", "aioworkq"} and record.levelno >= logging.ERROR
    ]
    assert not complaints


@contextlib.asynccontextmanager
async def memory_alarm(node: RabbitMQ) -> AsyncGenerator[None]:
    """Let a node believe that its memory is used up, and no longer at the end."""
    monitor = "vm_memory_monitor:set_vm_memory_high_watermark"
    await node.eval(f"{monitor}(0.00001)")
    try:
        # The connections are told after the call has returned.
        await eventually(_is_alarmed, node)
        yield
    finally:
        await node.eval(f"{monitor}({{absolute, 1000000000}})")


async def _is_alarmed(node: RabbitMQ) -> bool:
    return "memory" in await node.eval("rabbit_alarm:get_alarms()")


def is_cut_off(producer: Producer) -> bool:
    """Whether a producer has noticed that its connection is lost: nothing is sent from now on."""
    outbox = producer._outbox
    return outbox is not None and outbox._channel is None


def open_files() -> int:
    """Return how many file descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))
