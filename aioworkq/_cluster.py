"""A cluster of private nodes, all of them on this machine.

Each is a :class:`aioworkq.testing.RabbitMQ` of its own, with its own folder and watchdog. They have
a cookie and an epmd in common: those of the first one, which founds the cluster. What a node needs
to know of its founder is in ``_node.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from aioworkq._lifetime import Lifetime
from aioworkq._node_parts import NodeError
from aioworkq.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from aioworkq.testing import RabbitMQ

# The name of the function that lists the nodes which run is another one since RabbitMQ 3.11.
_COUNT_RUNNING = """
    length(case erlang:function_exported(rabbit_nodes, list_running, 0) of
        true -> apply(rabbit_nodes, list_running, []);
        false -> apply(rabbit_nodes, all_running, [])
    end)
"""


class RabbitMQCluster(Lifetime):
    """A cluster of private RabbitMQ nodes on loopback ports, which goes as a whole.

    ::

        async with RabbitMQCluster() as cluster:
            async with Producer(cluster.urls) as producer:
                ...
                await cluster.nodes[0].kill()     # its clients go on at another host
                await cluster.nodes[0].start()    # it joins the others again, with its data

    Every node is one as :class:`RabbitMQ` describes it, and may be stopped, killed, paused and
    started by itself. Like a single node, nothing of a cluster stays behind, and it belongs to no
    event loop. Do not close its nodes: they end with the cluster.

    Virtual hosts and users are those of the whole cluster: add them through any node.

    Args:
        size: The number of nodes. A quorum queue has a copy on three of them, and lives on while
            it has two.
        version: The version that must run, as for a single node.
        config: Lines of ``rabbitmq.conf`` of every node.
        startup_timeout: Seconds for the start of each node. The first one starts alone, then the
            others together: three take two to three times as long as a single one.

    Raises:
        ValueError: An argument is not what it must be.
    """

    def __init__(
        self,
        size: int = 3,
        *,
        version: str | None = None,
        config: Mapping[str, str] | None = None,
        startup_timeout: float = 60.0,
    ) -> None:
        from aioworkq.testing import RabbitMQ  # noqa: PLC0415 - which names this class in turn

        if size < 1:
            raise ValueError(f"size is {size}: a cluster has at least 1 node.")
        self._nodes = tuple(
            RabbitMQ(version=version, config=config, startup_timeout=startup_timeout)
            for _ in range(size)
        )
        for node in self._nodes[1:]:
            node._founder = self._nodes[0]  # noqa: SLF001 - made for this
        self._is_started = self._is_closed = False

    def __repr__(self) -> str:
        running = sum(node.is_running for node in self._nodes)
        return f"<RabbitMQCluster: {running} of {len(self._nodes)} nodes running>"

    @property
    def nodes(self) -> tuple[RabbitMQ, ...]:
        """The nodes, always in the same order."""
        return self._nodes

    @property
    def urls(self) -> list[str]:
        """The URLs of all nodes, those that do not run included: what a client is given.

        They are those of the virtual host ``/``, as ``url`` of a node is.

        Raises:
            StateError: A node was never started, or is closed.
        """
        return [node.url for node in self._nodes]

    async def start(self) -> None:
        """Start all nodes, once, and wait until they are one cluster.

        When it fails or is cancelled, some may run: without ``async with``, :meth:`aclose` is due
        in any case. Nodes that are down later are started one by one, by ``node.start()``.

        Raises:
            NotInstalledError: The server is not installed, or not in that version.
            NodeError: A node died, or did not serve in time, or did not join the others.
            StateError: It was started before, or is closed.
        """
        if self._is_started or self._is_closed:
            raise StateError(
                "RabbitMQCluster.start() is not possible",
                reason="it is closed" if self._is_closed else "it was started before",
                advice="Start its nodes one by one, or make a new RabbitMQCluster().",
            )
        self._is_started = True
        founder, *others = self._nodes
        await founder.start()
        await _together(node.start for node in others)
        for node in self._nodes:
            running = await node.eval(_COUNT_RUNNING)
            if running != str(len(self._nodes)):
                raise NodeError(
                    "a private RabbitMQ cluster did not start",
                    reason=f"{node!r} knows {running} running nodes of {len(self._nodes)}",
                    advice="Correct config=.",
                    log=node.log,
                )

    async def aclose(self) -> None:
        """Kill all nodes and remove their folders. The cluster cannot be started again.

        Runs to its end even when cancelled. May be called in any state, also again.

        Raises:
            NodeError: Something could not be removed.
        """
        self._is_closed = True
        with anyio.CancelScope(shield=True):
            await _together(node.aclose for node in self._nodes)


async def _together(calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Await all calls; when some fail, raise the first error after all have ended."""
    errors: list[Exception] = []

    async def attempt(call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except Exception as exc:
            errors.append(exc)

    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(attempt, call)
    if errors:
        raise errors[0]
