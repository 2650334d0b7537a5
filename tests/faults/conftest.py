"""The nodes that fault tests break: ``node`` for a module, ``quick_node`` for a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aioworkq.testing import RabbitMQ
from tests.nodes import node_with_quick_delays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.from_thread import BlockingPortal


@pytest.fixture(scope="module")
def node(portal: BlockingPortal, version: str | None) -> Iterator[RabbitMQ]:
    """A node of a module's own, to be stopped, killed and alarmed; each test leaves it running."""
    with portal.wrap_async_context_manager(RabbitMQ(version=version)) as node:
        yield node


@pytest.fixture
def quick_node(portal: BlockingPortal, version: str | None) -> Iterator[RabbitMQ]:
    """A node of one test, to be killed, which soon takes up what a crash interrupts in delays."""
    with portal.wrap_async_context_manager(node_with_quick_delays(version)) as node:
        yield node
