"""Every conformance test runs on RabbitMQ, and on the memory broker as each version it can be.

The memory broker's clock is virtual: a test that needs time asks its subject to let it pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from aioworkq import MemoryBroker
from aioworkq.memory.version import SEMANTICS
from tests.conformance.subject import Subject

if TYPE_CHECKING:
    from aioworkq.memory.version import Version
    from aioworkq.testing import RabbitMQ

SUBJECTS = [
    *(pytest.param(version, id=f"memory-{version}") for version in SEMANTICS),
    pytest.param("rabbitmq", id="rabbitmq", marks=pytest.mark.rabbitmq),
]


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """The broker under test."""
    if request.param != "rabbitmq":
        version = cast("Version", request.param)
        return Subject(MemoryBroker(version=version, clock="virtual"), version, None)
    node: RabbitMQ = request.getfixturevalue("rabbitmq")
    return Subject(request.getfixturevalue("url"), node.version, node)
