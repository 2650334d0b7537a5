"""The broker of the examples: the one at AMQP_URL, or a private node for this script."""

from __future__ import annotations

import asyncio
import os
import sys

from aioworkq.testing import RabbitMQ

_nodes: list[RabbitMQ] = []


def broker_url() -> str:
    """Return AMQP_URL; unset, start a private RabbitMQ that ends when this process does."""
    url = os.environ.get("AMQP_URL")
    if url:
        return url
    print("AMQP_URL is not set: a private RabbitMQ starts for this script.", file=sys.stderr)
    node = RabbitMQ()
    asyncio.run(node.start())
    _nodes.append(node)  # it ends when nothing refers to it, at the latest with this process
    return node.url
