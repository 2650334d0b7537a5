"""A user's function as a handler: its signature, its call.

A coroutine function is awaited; a plain function runs in a thread. Parameters are bound by
annotation: one takes the body, one annotated `Delivery`, if there is one, the delivery. A batch
handler takes lists of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import threading
import types
import typing
from collections.abc import Collection, Iterable, MutableSequence, Reversible, Sequence
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin

import anyio
from msgspec import Struct

from aioworkq.codec import Codec, codec_for
from aioworkq.message import Delivery

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.options import Options
    from aioworkq.topology import Queue

_EXAMPLE: Final = "Write it as `async def handle(body: Email, delivery: Delivery) -> None`"
_BATCH_EXAMPLE: Final = (
    "Write it as `async def handle(bodies: list[Email], deliveries: list[Delivery]) -> None`"
)
_LISTS: Final = frozenset({list, Sequence, MutableSequence, Collection, Iterable, Reversible})
"""What a parameter that gets a list may be annotated with."""


class ThreadCall:
    """One call in a thread, which goes on even when nobody waits for it any more.

    Attributes:
        has_ended: Set when the function is through, or when it is sure that it never begins.
    """

    def __init__(self) -> None:
        self.has_ended = anyio.Event()
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Decide between the thread that is to begin and the caller that gives up: once True."""
        return self._claim.acquire(blocking=False)


class Handler(Struct, frozen=True, eq=False):
    """A function, the queue it handles, and how it is called."""

    queue: Queue[Any]
    function: Callable[..., Any]
    is_async: bool
    body_parameter: str
    delivery_parameter: str | None
    codec: Codec
    options: Options
    concurrency: int
    prefetch_count: int
    name: str

    def decode(self, delivery: Delivery) -> Any:
        """Decode a delivery's body.

        Raises:
            DecodeError: It is not what the queue's body type says.
        """
        return self.codec.decode(delivery.message.body, delivery.message.content_type)

    async def call(self, body: Any, delivery: Delivery | list[Delivery]) -> None:
        """Await a coroutine function. Raises whatever it raises."""
        await self.function(**self._arguments(body, delivery))

    async def call_in_thread(
        self,
        body: Any,
        delivery: Delivery | list[Delivery],
        call: ThreadCall,
    ) -> None:
        """Run a plain function in a thread, and wait for it.

        Cancelling this leaves the thread alone, as threads cannot be stopped; ``call.has_ended``
        tells when it is through.
        """
        from anyio import to_thread  # noqa: PLC0415 - most workers have coroutine functions only

        loop = asyncio.get_running_loop()
        bound = functools.partial(self.function, **self._arguments(body, delivery))

        def run() -> Any:
            if not call.claim():
                return None
            try:
                return bound()
            finally:
                # A closed loop refuses: then nobody waits any more.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(call.has_ended.set)

        limiter = anyio.CapacityLimiter(1)
        try:
            result = await to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)
        finally:
            if call.claim():
                call.has_ended.set()
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(
                f"handler {self.name} is a plain function that returned an awaitable: it was never "
                "awaited. Define it with `async def`.",
            )

    def _arguments(self, body: Any, delivery: Delivery | list[Delivery]) -> dict[str, Any]:
        if self.delivery_parameter is None:
            return {self.body_parameter: body}
        return {self.body_parameter: body, self.delivery_parameter: delivery}


def make_handler(queue: Queue[Any], function: Callable[..., Any], options: Options) -> Handler:
    """Check a function, and make a handler of it.

    Raises:
        TypeError: The function does not take what a handler is given.
    """
    name = getattr(function, "__qualname__", None) or repr(function)
    if not callable(function):
        raise TypeError(f"a handler is a function, not {function!r}.")
    if _is_generator(function):
        raise TypeError(f"handler {name} is a generator function: it must return, not yield.")
    is_async, is_batch = _is_async(function), options.batching is not None
    body, delivery, annotation = _bind(function, name, is_batch=is_batch)
    body_type = queue.body_type
    if isinstance(annotation, str):
        if body_type is Any:
            raise TypeError(
                f"handler {name} takes {annotation}, a name that cannot be read where the handler "
                "is defined: it is there for type checkers only, or inside of a function. Import "
                f"it for good, or give the queue its type: Queue({queue.name!r}, {annotation}).",
            )
        annotation = Any
    if body_type is Any:
        body_type = annotation
    elif not _accepts(annotation, body_type):
        article = "a list of " if is_batch else ""
        raise TypeError(
            f"handler {name} takes {article}{_show(annotation)}, but the bodies of queue "
            f"{queue.name!r} are {_show(body_type)}: annotate the parameter with {article}that "
            "type.",
        )
    return Handler(
        queue=queue,
        function=function,
        is_async=is_async,
        body_parameter=body,
        delivery_parameter=delivery,
        codec=codec_for(body_type),
        name=name,
        options=options,
        concurrency=options.concurrency_of(is_async=is_async),
        prefetch_count=options.prefetch_count_of(is_async=is_async),
    )


def _unwrap(function: Any) -> Any:
    while isinstance(function, functools.partial | staticmethod):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if not inspect.isroutine(function) and not inspect.isclass(function):
        return getattr(function, "__call__", function)  # noqa: B004 - the method itself is wanted
    return function


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(_unwrap(function))


def _is_generator(function: Any) -> bool:
    inner = _unwrap(function)
    return inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner)


def _bind(
    function: Callable[..., Any],
    name: str,
    *,
    is_batch: bool,
) -> tuple[str, str | None, Any]:
    """Return the names of the body's and the delivery's parameter, and the body's annotation."""
    example = _BATCH_EXAMPLE if is_batch else _EXAMPLE
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as exc:
        raise TypeError(f"handler {name} has no signature that can be read: {exc}.") from exc
    hints = _hints(function)
    required: list[tuple[str, Any]] = []
    optional: list[tuple[str, Any]] = []
    deliveries: list[str] = []
    for parameter in parameters:
        kind = parameter.kind
        if kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            continue
        if kind is parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"handler {name} has the positional-only parameter {parameter.name!r}. {example}.",
            )
        annotation = hints.get(parameter.name, parameter.annotation)
        if is_batch and _is_delivery(annotation):
            raise TypeError(f"handler {name} gets many deliveries at a time. {example}.")
        if _is_delivery_list(annotation) if is_batch else _is_delivery(annotation):
            deliveries.append(parameter.name)
        else:
            has_default = parameter.default is not parameter.empty
            (optional if has_default else required).append((parameter.name, annotation))
    bodies = required or optional[:1]
    if len(bodies) != 1:
        found = ", ".join(repr(body) for body, _ in bodies) or "none"
        raise TypeError(
            f"handler {name} must take the {'bodies' if is_batch else 'body'} in exactly one "
            f"parameter; it has {found}. {example}; give others a default.",
        )
    if len(deliveries) > 1:
        asked = "deliveries" if is_batch else "delivery"
        raise TypeError(f"handler {name} asks for the {asked} twice. {example}.")
    body, annotation = bodies[0]
    if annotation is inspect.Parameter.empty:
        annotation = Any
    elif is_batch and not isinstance(annotation, str):
        annotation = _item_type(annotation, name)
    return body, deliveries[0] if deliveries else None, annotation


def _hints(function: Any) -> dict[str, Any]:
    """Evaluate the annotations, as far as that is possible where the function is defined."""
    inner = _unwrap(function)
    with contextlib.suppress(Exception):
        return typing.get_type_hints(inner)
    # One of them has a name that exists for type checkers only, or inside another function.
    hints: dict[str, Any] = {}
    names = getattr(inspect.unwrap(inner), "__globals__", {})
    for parameter, annotation in inspect.get_annotations(inner).items():
        one = types.SimpleNamespace(__annotations__={parameter: annotation})
        with contextlib.suppress(Exception):
            hints |= typing.get_type_hints(one, names)
    return hints


def _is_delivery(annotation: Any) -> bool:
    if isinstance(annotation, str):
        members = annotation.strip("'\"").removeprefix("Optional[").removesuffix("]").split("|")
        return any(one.strip().rpartition(".")[2] == "Delivery" for one in members)
    if get_origin(annotation) in {Union, types.UnionType}:
        return Delivery in get_args(annotation)
    return annotation is Delivery


def _is_delivery_list(annotation: Any) -> bool:
    if isinstance(annotation, str):
        members = annotation.strip("'\"").removeprefix("Optional[").split("|")
        return any(re.fullmatch(r"[\w.]+\[([\w.]+\.)?Delivery\]+", one.strip()) for one in members)
    if get_origin(annotation) in {Union, types.UnionType}:
        return any(_is_delivery_list(one) for one in get_args(annotation))
    return get_origin(annotation) in _LISTS and get_args(annotation) == (Delivery,)


def _item_type(annotation: Any, name: str) -> Any:
    """Return what is in the list that the bodies' parameter is annotated with."""
    if annotation in (Any, object) or isinstance(annotation, typing.TypeVar):
        return Any
    if annotation in _LISTS:
        return Any
    if get_origin(annotation) in _LISTS:
        return get_args(annotation)[0]
    raise TypeError(
        f"handler {name} takes {_show(annotation)}, but a batch handler takes a list of bodies. "
        f"{_BATCH_EXAMPLE}.",
    )


def _accepts(annotation: Any, body_type: Any) -> bool:
    """Say whether a parameter of this annotation may be given a body of this type."""
    if annotation in (Any, object) or annotation == body_type:
        return True
    if get_origin(annotation) in {Union, types.UnionType}:
        members = get_args(annotation)
        if get_origin(body_type) in {Union, types.UnionType}:
            return all(_accepts(annotation, member) for member in get_args(body_type))
        return any(_accepts(member, body_type) for member in members)
    wide, narrow = get_origin(annotation) or annotation, get_origin(body_type) or body_type
    if not (isinstance(wide, type) and isinstance(narrow, type)):
        return True  # a TypeVar, a Protocol, an alias: the type checker knows better
    if get_args(annotation) and get_args(body_type) and get_args(annotation) != get_args(body_type):
        return wide is not narrow and issubclass(narrow, wide)
    try:
        return issubclass(narrow, wide)
    except TypeError:
        return True


def _show(annotation: Any) -> str:
    return getattr(annotation, "__qualname__", None) or str(annotation)
