"""Fixtures for pytest: a memory broker, and a private RabbitMQ where it is installed.

=================== ======== =======================================================================
fixture             scope    what it is
=================== ======== =======================================================================
``memory_broker``   test     a `aioworkq.MemoryBroker` whose time is virtual
``rabbitmq``        session  a private node, an `aioworkq.testing.RabbitMQ`; the test is skipped
                             where RabbitMQ is not installed
``rabbitmq_url``    test     the URL of an empty virtual host on it, deleted after the test
=================== ======== =======================================================================

They are synchronous, so that they serve tests of AnyIO's plugin, of pytest-asyncio, and
synchronous ones. Define a fixture of the same name to have it otherwise.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from aioworkq.memory import MemoryBroker
from aioworkq.testing import NotInstalledError, RabbitMQ

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def memory_broker() -> MemoryBroker:
    """RabbitMQ in memory, with virtual time."""
    return MemoryBroker(clock="virtual")


@pytest.fixture(scope="session")
def _aioworkq_portal() -> Iterator[BlockingPortal]:
    """An event loop in a background thread, for the node."""
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def rabbitmq(_aioworkq_portal: BlockingPortal) -> Iterator[RabbitMQ]:
    """A private RabbitMQ node that all tests share; skips where RabbitMQ is not installed."""
    with contextlib.ExitStack() as stack:
        try:
            manager = _aioworkq_portal.wrap_async_context_manager(RabbitMQ())
            node = stack.enter_context(manager)
        except NotInstalledError as exc:
            pytest.skip(f"needs a RabbitMQ server: {exc}")
        yield node


@pytest.fixture
def rabbitmq_url(rabbitmq: RabbitMQ, _aioworkq_portal: BlockingPortal) -> Iterator[str]:
    """The URL of an empty virtual host of this test."""
    name = f"test-{uuid.uuid4().hex}"
    yield _aioworkq_portal.call(rabbitmq.add_vhost, name)
    _aioworkq_portal.call(rabbitmq.delete_vhost, name)
