"""Channels without a broker behind them: what is sent is kept, and nobody answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pamqp.frame

from aioworkq.amqp.reader import FrameReader
from aioworkq.amqp.transport import Link, SocketProtocol

if TYPE_CHECKING:
    from pamqp.base import Frame

NUMBER = 7


class Unwired:
    """A channel of aiormq, as far as ours ask it, and the link of a connection to nowhere.

    Attributes:
        channel: What stands for aiormq's channel; its number is 7.
        link: Reader and protocol are the real ones.
        written: Each write to the socket.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.written: list[bytes] = []
        socket = SimpleNamespace(write=self.written.append, is_closing=lambda: False)
        self.reader = FrameReader(limit=2**16, loop=loop)
        protocol = SocketProtocol(self.reader, loop=loop)
        self.link = Link(self.reader, cast("Any", socket), protocol)
        self.channel: Any = SimpleNamespace(
            number=NUMBER, closing=loop.create_future(), on_consumer_cancel_callbacks=set()
        )

    def receive(self, *frames: Frame) -> None:
        """Have frames come from the socket, in one piece."""
        self.reader.feed_data(b"".join(pamqp.frame.marshal(frame, NUMBER) for frame in frames))
