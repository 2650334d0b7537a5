"""Which broker a client talks to: RabbitMQ at a URL, or a `MemoryBroker`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from aioworkq.amqp import AmqpConnection
from aioworkq.memory import MemoryBroker

if TYPE_CHECKING:
    import ssl

    from aioworkq.broker import Connection
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
    if not isinstance(url, MemoryBroker):
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


def _named(url: str) -> MemoryBroker:
    """Return the memory broker that a URL names."""
    parts = urlsplit(url)
    if not parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(
            f"the broker's URL {url!r} is not memory://name, a name and nothing else. "
            "For options make the broker first: MemoryBroker(name='name', clock='virtual').",
        )
    return MemoryBroker.named(parts.netloc)
