"""What all tests share: one private RabbitMQ, a virtual host for each test, a proxy, no leaks.

=============== ======== ==================================================================
fixture         scope    what it is
=============== ======== ==================================================================
``rabbitmq``    session  a private node that all tests share: never stop, kill or pause it
``url``         test     the URL of an empty virtual host on it, deleted after the test
``proxy``       test     a :class:`tests.proxy.Proxy` in front of it (async tests only)
``proxy_url``   test     ``url`` through ``proxy``
``broker``      test     a :class:`tests.consuming.Broker`: a plain connection beside what is tested
``producer``    test     a producer of ``url`` (async tests only)
``own_node``    test     a private node for this test alone, to stop, kill and pause
``version``     session  the version of RabbitMQ that all nodes have: ``--rabbitmq 4.3``
``is_long``     session  whether the full numbers are asked for, which take minutes: ``--long``
``queue_name``  test     a name that no other test uses
=============== ======== ==================================================================

A test that uses one of the first seven is marked ``rabbitmq``. The node of a test with other needs
is ``async with RabbitMQ(...)`` in the test, which then marks itself.

With ``--documented-calls`` the library runs as on an aiormq that lacks a name of its fast paths,
here and in the programs that tests start.

Every async test runs in an event loop of its own; the synchronous fixtures run their coroutines
in the loop of a background thread, so that they serve synchronous tests too. A test fails when it
leaves asyncio tasks or threads behind: override ``no_task_leaks`` or ``no_thread_leaks`` in a
module where that is on purpose.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import re
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from aioworkq import Producer
    from aioworkq.testing import RabbitMQ
    from tests.consuming import Broker
    from tests.proxy import Proxy

# Fixtures import what they need themselves: pytest-xdist's controller reads this file, and has no
# use for the library.

NEED_RABBITMQ = {"rabbitmq", "url", "proxy", "proxy_url", "own_node"}

_LEAK_GRACE = 10.0  # seconds in which what is ending already may end, on a busy machine too


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests run with another RabbitMQ, and with the fallback of the fast paths."""
    parser.addoption("--rabbitmq", metavar="VERSION", help="the version of RabbitMQ to test with")
    parser.addoption("--long", action="store_true", help="the full numbers, which take minutes")
    parser.addoption(
        "--documented-calls",
        action="store_true",
        help="run the library as on an aiormq that lacks a name which its fast paths use",
    )


def pytest_configure() -> None:
    """Let programs be interrupted that tests start: a shell's background jobs ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def documented_calls(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the fast paths are switched off."""
    wanted = bool(request.config.getoption("--documented-calls"))
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            from aioworkq.amqp import features  # noqa: PLC0415 - see above

            patch.setattr(features, "CHANNEL_NAMES", (*features.CHANNEL_NAMES, "no_such_name"))
            # For programs that tests start, with this environment or with this path.
            folder = str(Path(__file__).parent / "documented_calls")
            patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
            patch.setattr("sys.path", [folder, *sys.path])
        yield wanted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need RabbitMQ, and watch the tasks of the async ones."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        mark = item.get_closest_marker("fast_path")
        if mark is not None and item.config.getoption("--documented-calls"):
            item.add_marker(pytest.mark.skip(reason=f"documented calls: {mark.args[0]}"))
        if NEED_RABBITMQ.intersection(item.fixturenames):
            item.add_marker(pytest.mark.rabbitmq)
        if inspect.iscoroutinefunction(item.function):
            # First in, last out: all but the thread check, which sees the closed event loop.
            item.fixturenames.insert(
                item.fixturenames.index("no_thread_leaks") + 1, "no_task_leaks"
            )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while tests are collected: what is made then stays, and is much."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let captured logs with lone surrogates through: some tests log them on purpose."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """aio-pika knows asyncio only."""
    return "asyncio"


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """An event loop in a background thread, for fixtures that are not async."""
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def version(pytestconfig: pytest.Config) -> str | None:
    """The version of RabbitMQ that is tested with; None for what is installed."""
    version: str | None = pytestconfig.getoption("--rabbitmq")
    return version


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether the full numbers are asked for, which take minutes."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(scope="session")
def rabbitmq(portal: BlockingPortal, version: str | None) -> Iterator[RabbitMQ]:
    """A node that all tests share."""
    from aioworkq.testing import RabbitMQ  # noqa: PLC0415 - see above

    with portal.wrap_async_context_manager(RabbitMQ(version=version)) as node:
        yield node


@pytest.fixture
def url(rabbitmq: RabbitMQ, portal: BlockingPortal, queue_name: str) -> Iterator[str]:
    """The URL of an empty virtual host of this test, on the shared node."""
    yield portal.call(rabbitmq.add_vhost, queue_name)
    portal.call(rabbitmq.delete_vhost, queue_name)


@pytest.fixture
async def proxy(rabbitmq: RabbitMQ) -> AsyncIterator[Proxy]:
    """A proxy of this test in front of the shared node."""
    from tests.proxy import Proxy  # noqa: PLC0415 - see above

    async with Proxy(rabbitmq.port) as proxy:
        yield proxy


@pytest.fixture
def proxy_url(proxy: Proxy, url: str) -> str:
    """The URL of the test's virtual host through its proxy."""
    return proxy.url(url)


@pytest.fixture
async def broker(url: str) -> AsyncIterator[Broker]:
    """A plain connection to the test's virtual host."""
    from tests.consuming import Broker  # noqa: PLC0415 - see above

    async with Broker(url) as broker:
        yield broker


@pytest.fixture
async def producer(url: str) -> AsyncIterator[Producer]:
    """A producer of the test's virtual host."""
    from aioworkq import Producer  # noqa: PLC0415 - see above

    async with Producer(url, timeout=20) as producer:
        yield producer


@pytest.fixture
def own_node(portal: BlockingPortal, version: str | None) -> Iterator[RabbitMQ]:
    """A node of this test alone."""
    from aioworkq.testing import RabbitMQ  # noqa: PLC0415 - see above

    with portal.wrap_async_context_manager(RabbitMQ(version=version)) as node:
        yield node


@pytest.fixture
def queue_name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    test = re.sub(r"\W+", "_", request.node.name)[:60]
    return f"{test}.{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def no_task_leaks() -> AsyncIterator[None]:
    """Fail an async test that leaves tasks in its event loop, after all its fixtures ended."""
    before = _tasks_of_tests()
    yield
    deadline = time.monotonic() + _LEAK_GRACE
    while (left := _tasks_of_tests() - before) and time.monotonic() < deadline:
        await asyncio.wait(left, timeout=0.01)
    if left:
        pytest.fail(f"the test left tasks behind: {sorted(map(repr, left))}")


def _tasks_of_tests() -> set[asyncio.Task[object]]:
    """Return all tasks but the one in which AnyIO's runner waits for this very fixture."""
    return {
        task
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "__qualname__", "") != "TestRunner._call_in_runner_task"
    }


@pytest.fixture(autouse=True)
def no_thread_leaks() -> Iterator[None]:
    """Fail a test that leaves threads behind.

    Daemon threads end with the process, and AnyIO's idle workers with their event loop.
    """
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _LEAK_GRACE
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon and thread.name != "AnyIO worker thread":
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                pytest.fail(f"the test left a thread behind: {thread}")
