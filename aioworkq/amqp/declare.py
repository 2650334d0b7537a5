"""Declarations on a channel, and what the broker's refusals of them mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiormq import exceptions as aiormq_errors
from pamqp import commands as spec

from aioworkq.amqp.features import missing_names
from aioworkq.amqp.translate import guarded, refusal
from aioworkq.topology import Binding, Declaration, ExchangeDeclaration, QueueDeclaration

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiormq.abc import AbstractChannel
    from pamqp.base import Frame

T = TypeVar("T")

ACCESS_REFUSED: Final = 403
NOT_FOUND: Final = 404
_MAX_SENTENCE: Final = 255


class _QueueDeclare(spec.Queue.Declare):
    """Without pamqp's own idea of what a queue may be called: RabbitMQ takes any text."""

    def validate(self) -> None:
        """Leave it to RabbitMQ."""


class _QueueBind(spec.Queue.Bind):
    """The same for a binding."""

    def validate(self) -> None:
        """Leave it to RabbitMQ."""


def rpc(channel: AbstractChannel, frame: Frame) -> Coroutine[Any, Any, Any]:
    """Send a frame on a channel; awaiting it returns the broker's answer."""
    call: Coroutine[Any, Any, Any] = getattr(channel, "rpc")(frame)  # noqa: B009 - not in the ABC
    return call


def may_be_looked_for(channel: AbstractChannel, queue: str) -> bool:
    """Say whether RabbitMQ can answer that a queue does not exist.

    It cuts the sentence at 255 characters, where AMQP has room for as many bytes. From 4.0 on it
    closes the connection over one that is longer in bytes; before, a character may be cut in two.
    """
    vhost = getattr(channel.connection, "vhost", "/")
    sentence = f"NOT_FOUND - no queue '{queue}' in vhost '{vhost}'"
    return sentence.isascii() or len(sentence.encode()) <= _MAX_SENTENCE


async def look_for(channel: AbstractChannel, queue: str, *, timeout: float) -> int:
    """Find out whether a queue exists, and how many messages in it are ready.

    Raises:
        TopologyError: It does not (code 404), or may not be looked for; the channel is closed.
        ConnectionLostError: The channel ended, or no answer came in time.
    """
    call: Coroutine[Any, Any, spec.Queue.DeclareOk]
    if missing_names(channel):
        call = channel.queue_declare(queue, passive=True)
    else:
        call = rpc(channel, _QueueDeclare(queue=queue, passive=True))
    what = f"looking for queue {queue!r}"
    answer: spec.Queue.DeclareOk = await _declared(channel, call, queue, {}, what, timeout=timeout)
    return answer.message_count or 0


async def delete(channel: AbstractChannel, queue: str, *, timeout: float) -> None:
    """Delete a queue, if it exists.

    Raises:
        TopologyError: It may not be deleted; the channel is closed.
        ConnectionLostError: The channel ended, or no answer came in time.
    """
    call = channel.queue_delete(queue)
    await _declared(channel, call, queue, {}, f"deleting queue {queue!r}", timeout=timeout)


async def declare_on(
    channel: AbstractChannel,
    declaration: Declaration,
    *,
    timeout: float,
) -> None:
    """Declare one thing, durable.

    Raises:
        TopologyError: The broker refuses; the channel is closed.
        ConnectionLostError: The channel ended, or no answer came in time.
        ValueError: An argument cannot be encoded.
        TypeError: The same.
    """
    asked: dict[str, Any] = {}
    call: Coroutine[Any, Any, object]
    match declaration:
        case QueueDeclaration(name=name, arguments=arguments) if missing_names(channel):
            asked = dict(arguments)
            call = channel.queue_declare(name, durable=True, arguments=asked)
        case QueueDeclaration(name=name, arguments=arguments):
            asked = dict(arguments)
            call = rpc(channel, _QueueDeclare(queue=name, durable=True, arguments=asked))
        case ExchangeDeclaration(name=name, type=kind, arguments=arguments):
            asked = dict(arguments)
            call = channel.exchange_declare(
                name,
                exchange_type=kind,
                durable=True,
                arguments=asked,
            )
        case Binding(name, "queue", source, key) if missing_names(channel):
            call = channel.queue_bind(name, source, key)
        case Binding(name, "queue", source, key):
            call = rpc(channel, _QueueBind(queue=name, exchange=source, routing_key=key))
        case Binding(name, _, source, key):
            call = channel.exchange_bind(destination=name, source=source, routing_key=key)
    await _declared(channel, call, name, asked, f"declaring {name!r}", timeout=timeout)


async def _declared(
    channel: AbstractChannel,
    call: Coroutine[Any, Any, T],
    name: str,
    asked: dict[str, Any],
    what: str,
    *,
    timeout: float,
) -> T:
    try:
        return await guarded(call, channel, timeout=timeout, what=what)
    except aiormq_errors.ChannelClosed as exc:
        raise refusal(exc, name, what=what, asked=asked) from exc
