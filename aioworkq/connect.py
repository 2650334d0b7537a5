"""Which broker a client talks to: RabbitMQ at a URL, or a `MemoryBroker`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from aioworkq.amqp import AmqpConnection

if TYPE_CHECKING:
    import ssl

    from typing_extensions import TypeIs

    from aioworkq.broker import Connection
    from aioworkq.memory import MemoryBroker
    from aioworkq.memory.connection import Owner

_MEMORY: Final = "memory:"


def connection_to(
    url: str | Sequence[str] | MemoryBroker,
    *,
    owner: Owner,
    name: str,
    heartbeat: int,
    connect_timeout: float,
    ssl_context: ssl.SSLContext | None,
    max_message_size: int,
) -> Connection:
    """Return a connection, not started, to what a client was given as its URL.

    Raises:
        ValueError: It is no URL, or an option makes no sense for it.
        TypeError: It is neither a URL, nor a list of them, nor a broker.
    """
    if isinstance(url, str):
        url = _named(url) if url.startswith(_MEMORY) else url
    elif isinstance(url, Sequence) and any(str(one).startswith(_MEMORY) for one in url):
        raise ValueError("a list of hosts has a memory:// URL: give that one alone.")
    if not _is_memory_broker(url):
        return AmqpConnection(
            url,
            name=name,
            heartbeat=heartbeat,
            connect_timeout=connect_timeout,
            ssl_context=ssl_context,
            max_message_size=max_message_size,
        )
    if ssl_context is not None:
        raise ValueError("ssl_context is given, but a memory broker has no TLS: leave it out.")
    return url.connection(name=name, owner=owner, max_message_size=max_message_size)


def _is_memory_broker(url: str | Sequence[str] | MemoryBroker) -> TypeIs[MemoryBroker]:
    # Who has one has imported it; who has none shall not wait for it.
    memory = sys.modules.get("aioworkq.memory")
    return memory is not None and isinstance(url, memory.MemoryBroker)


def _named(url: str) -> MemoryBroker:
    """Return the memory broker that a URL names."""
    from aioworkq.memory import MemoryBroker  # noqa: PLC0415 - for tests, and slow to import

    parts = urlsplit(url)
    if (
        not parts.netloc
        or "@" in parts.netloc
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
    ):
        raise ValueError(
            "the memory broker's URL is not memory://name, a name and nothing else. "
            "For options make the broker first: MemoryBroker(name='name', clock='virtual').",
        )
    return MemoryBroker.named(parts.netloc)
