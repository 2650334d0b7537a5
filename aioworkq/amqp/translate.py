"""What aio-pika, aiormq and the network raise, as the errors of aioworkq.

No exception of theirs crosses the door. A lost heartbeat and a local close reach us as a
`CancelledError` that nobody sent; here it becomes what it means.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiormq import exceptions as aiormq_errors

from aioworkq.errors import ConnectionLostError, TopologyError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from aiormq.abc import AbstractChannel, AbstractConnection

T = TypeVar("T")

_INEQUIVALENT: Final = (
    r"inequivalent arg '(?P<field>[^']*)' for \w+ '.*' in vhost '.*': "
    r"received (?:the value )?(?P<ours>.*?) but current is (?:the value )?(?P<theirs>.*)$"
)
_QUOTED: Final = r"'[^']*'"
_UNAVAILABLE: Final = (
    r"is down or inaccessible|due to timeout|process is stopped|failed to restart"
    r"|may be stopping or being demoted|no_quorum"
)
"""What RabbitMQ says of a queue that exists and cannot be reached now (rabbit_amqqueue.erl)."""
_LATE: Final = r"delivery acknowledgement on channel \d+ timed out"
"""What it says where a ``consumer_timeout`` is over (rabbit_channel.erl): no fault of a queue."""

CLOSING_REASON: Final = "the connection was closed, or heartbeats stopped coming"


def describe(exc: BaseException | None) -> str:
    """Say in words what ended a connection or a channel."""
    if exc is None or isinstance(exc, asyncio.CancelledError):
        return CLOSING_REASON
    if isinstance(exc, TimeoutError) and not exc.args:
        return "no answer in time"
    cause = exc.__cause__
    if isinstance(exc, aiormq_errors.AMQPConnectionError) and isinstance(cause, OSError):
        exc = cause
    if isinstance(exc, ssl.SSLCertVerificationError):
        detail = getattr(exc, "verify_message", "") or exc
        return f"the server's certificate was refused: {detail}"
    if isinstance(exc, OSError) and exc.strerror and not isinstance(exc, aiormq_errors.AMQPError):
        return exc.strerror
    texts = [str(arg) for arg in exc.args if arg is not None and arg != ""]
    return " ".join(texts).rstrip(".") or type(exc).__name__


def closing_exception(future: asyncio.Future[Any]) -> BaseException | None:
    """Return what a finished ``closing`` future says, whichever way it says it."""
    if future.cancelled():
        return None
    return future.exception() or None


async def guarded(
    call: Coroutine[Any, Any, T],
    resource: AbstractChannel | AbstractConnection,
    *,
    timeout: float,
    what: str,
) -> T:
    """Await a call on a channel or connection, bounded, and raced against the resource's end.

    Cancelling it cancels the call, and aiormq then closes the call's channel: never use it bare on
    a channel that others need.

    Raises:
        ConnectionLostError: The resource ended, or no answer came within ``timeout`` seconds.
        ChannelClosed: The broker closed the channel in answer to this call.
        ValueError: An argument cannot be encoded; nothing was sent.
        TypeError: The same.
    """
    task = asyncio.ensure_future(call)
    closing = resource.closing
    try:
        await asyncio.wait({task, closing}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is None or isinstance(error, ValueError | TypeError | ConnectionLostError):
                return task.result()
            if isinstance(error, aiormq_errors.ChannelInvalidStateError) and closing.done():
                error = closing_exception(closing)  # it says why the channel is closed
        elif closing.done():
            error = closing_exception(closing)
        elif task.cancelled():
            error = None
        else:
            raise ConnectionLostError(what, reason=f"RabbitMQ did not answer within {timeout:g} s")
        if isinstance(error, aiormq_errors.ChannelClosed) and error.args[0] is not None:
            raise error
        raise ConnectionLostError(what, reason=describe(error)) from error
    finally:
        if not closing.done():
            closing.cancel()
        if not task.done():
            task.cancel()
        task.add_done_callback(retrieve)


def retrieve(task: asyncio.Future[Any]) -> None:
    """Look at an abandoned call's error, so that asyncio does not report it as never seen."""
    if not task.cancelled():
        task.exception()


def refusal(
    exc: aiormq_errors.ChannelClosed,
    name: str,
    *,
    what: str,
    asked: Mapping[str, object] | None = None,
) -> TopologyError | ConnectionLostError:
    """Turn the broker's reason for closing a channel into the error that a caller should see.

    Args:
        exc: What aiormq raised.
        name: The queue.
        what: What was being done, as the start of a sentence.
        asked: The arguments of our declaration, to name both sides of a difference.
    """
    text = describe(exc)
    unquoted = re.sub(_QUOTED, "''", text)  # a queue's name may say anything
    if re.search(f"{_UNAVAILABLE}|{_LATE}", unquoted):
        return ConnectionLostError(what, reason=text)
    if isinstance(exc, aiormq_errors.ChannelPreconditionFailed):
        found = re.search(_INEQUIVALENT, text, re.DOTALL)
        if found is not None:
            field = found["field"]
            ours = (asked or {}).get(field, _plain(found["ours"]))
            return TopologyError(
                name,
                reason=text,
                expected={field: ours},
                actual={field: _plain(found["theirs"])},
                code=406,
                advice=(
                    f"Give the Queue the broker's {field}, or delete the queue and let it be "
                    "declared again, or pass declare=False to use it as it is."
                ),
            )
        return TopologyError(name, reason=text, code=406)
    if isinstance(exc, aiormq_errors.ChannelAccessRefused):
        return TopologyError(
            name,
            reason=text,
            code=403,
            advice="Give the user the permission that is missing (rabbitmqctl set_permissions).",
        )
    if isinstance(exc, aiormq_errors.ChannelNotFoundEntity):
        return TopologyError(
            name,
            reason=text,
            code=404,
            advice="Declare it, or leave declare=True on the Queue.",
        )
    if isinstance(exc, aiormq_errors.ChannelLockedResource):
        return TopologyError(
            name,
            reason=text,
            code=405,
            advice="Another connection holds it exclusively: end that one, or use another queue.",
        )
    return ConnectionLostError(what, reason=text)


def _plain(value: str) -> str:
    """Take the quotes and the type off, as in ``'quorum' of type 'longstr'``."""
    return value.partition("' of type")[0].strip("'")
