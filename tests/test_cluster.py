"""The private cluster: three nodes that are one RabbitMQ, and that leave nothing behind."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import anyio
import pytest
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker, NackError

from aioworkq.errors import StateError
from aioworkq.testing import NodeError, RabbitMQ, RabbitMQCluster
from tests.nodes import (
    are_gone,
    get,
    in_thread,
    interrupted,
    is_alive,
    other_versions,
    publish,
    traces,
    wait_until,
    write_down,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anyio.from_thread import BlockingPortal

pytestmark = [pytest.mark.rabbitmq, pytest.mark.one_version]


@pytest.fixture(scope="module")
def cluster(portal: BlockingPortal) -> Iterator[RabbitMQCluster]:
    """A cluster whose nodes the tests of this module kill; each leaves them running."""
    with portal.wrap_async_context_manager(RabbitMQCluster()) as cluster:
        yield cluster


async def publish_to_survivor(url: str, queue: str, body: bytes) -> None:
    """Publish to a queue that may have lost its leader a moment ago."""
    with anyio.fail_after(20):
        while True:
            try:
                await in_thread(publish, url, queue, body, "quorum")
            except (NackError, ChannelClosedByBroker, ConnectionClosedByBroker):
                await anyio.sleep(0.1)
            else:
                return


def test_a_cluster_without_nodes_is_refused() -> None:
    """A wrong size is a ValueError that says what is wrong with it, as are a node's arguments."""
    with pytest.raises(ValueError, match="size is 0: a cluster has at least 1 node"):
        RabbitMQCluster(0)
    with pytest.raises(ValueError, match="startup_timeout is 0"):
        RabbitMQCluster(startup_timeout=0)


async def test_nothing_is_known_before_the_start_and_after_the_end() -> None:
    """A cluster without a life refuses everything with a StateError, and may be closed twice."""
    cluster = RabbitMQCluster()
    assert repr(cluster) == "<RabbitMQCluster: 0 of 3 nodes running>"
    with pytest.raises(StateError, match="it was never started"):
        _ = cluster.urls
    await cluster.aclose()
    await cluster.aclose()
    with pytest.raises(StateError, match="it is closed"):
        _ = cluster.urls
    with pytest.raises(StateError, match="it is closed"):
        await cluster.start()


async def test_a_cluster_starts_once(cluster: RabbitMQCluster) -> None:
    """Starting twice is a mistake: its nodes come back one by one."""
    with pytest.raises(StateError, match="Start its nodes one by one"):
        await cluster.start()
    assert repr(cluster) == "<RabbitMQCluster: 3 of 3 nodes running>"


async def test_nodes_share_what_is_published(cluster: RabbitMQCluster, queue_name: str) -> None:
    """A quorum queue has a copy on each node, and a message goes in here and comes out there."""
    first, second, third = cluster.nodes
    assert cluster.urls == [first.url, second.url, third.url]
    await in_thread(publish, first.url, queue_name, b"shared", "quorum")
    members = await second.eval(
        f'Name = rabbit_misc:r(<<"/">>, queue, <<"{queue_name}">>), '
        "{ok, Queue} = rabbit_amqqueue:lookup(Name), "
        "length(maps:get(nodes, amqqueue:get_type_state(Queue)))"
    )
    assert members == "3"
    assert await in_thread(get, third.url, queue_name) == b"shared"


@pytest.mark.parametrize("number", [0, 1])
async def test_a_killed_node_joins_the_others_again(
    cluster: RabbitMQCluster, queue_name: str, number: int
) -> None:
    """The founder or another node is killed, the others go on, and it comes back with its data."""
    node, other = cluster.nodes[number], cluster.nodes[number + 1]
    await in_thread(publish, node.url, queue_name, b"1", "quorum")
    await write_down(node)
    await node.kill()
    await publish_to_survivor(other.url, queue_name, b"2")
    await node.start()
    assert await in_thread(get, node.url, queue_name) == b"1"
    assert await in_thread(get, other.url, queue_name) == b"2"


@pytest.mark.parametrize("version", ["4.0", "4.3"])
async def test_a_cluster_of_another_version(version: str) -> None:
    """Versions that live in root file systems make clusters too, with a configuration for all."""
    if not any(f"{other}.".startswith(f"{version}.") for other in other_versions()):
        pytest.skip(f"RabbitMQ {version} is not installed: call make rabbitmq-{version}")
    config = {"heartbeat": "17", "cluster_name": "mine"}
    async with RabbitMQCluster(2, version=version, config=config) as cluster:
        for node in cluster.nodes:
            assert f"{node.version}.".startswith(f"{version}.")
            assert await node.eval("application:get_env(rabbit, heartbeat)") == "{ok,17}"
        await in_thread(publish, cluster.urls[0], "work", b"1")
        assert await in_thread(get, cluster.urls[1], "work") == b"1"
        folders, processes = traces(cluster.nodes)
    assert are_gone(folders, processes)


async def test_the_end_leaves_no_process_and_no_file() -> None:
    """Everything that the nodes started is gone, the epmd that they share included."""
    async with RabbitMQCluster() as cluster:
        folders, processes = traces(cluster.nodes)
        assert len(folders) == 3
        assert all(map(is_alive, processes))
        epmds = [node._node.epmd for node in cluster.nodes if node._node is not None]
        assert sum(epmd is not None for epmd in epmds) == 1
    wait_until(lambda: are_gone(folders, processes))


async def test_a_node_that_does_not_start_ends_all() -> None:
    """The error is that of the node, and the nodes that run already are gone."""
    cluster = RabbitMQCluster(2)
    cluster.nodes[1]._config["no.such.key"] = "1"
    seen: list[tuple[list[Path], set[int]]] = []

    async def look() -> None:
        while not all(node.is_running for node in cluster.nodes):
            await anyio.sleep(0.005)
        seen.append(traces(cluster.nodes))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        with pytest.raises(NodeError, match=r"did not start: its boot failed\."):
            await cluster.__aenter__()
        tasks.cancel_scope.cancel()
    [(folders, processes)] = seen
    assert len(folders) == 2
    wait_until(lambda: are_gone(folders, processes))


async def test_a_node_that_stays_alone_is_an_error() -> None:
    """Nodes that run and are no cluster are not taken for one."""
    cluster = RabbitMQCluster(2)
    cluster.nodes[1]._founder = None
    with pytest.raises(NodeError, match="knows 1 running nodes of 2"):
        async with cluster:
            pass
    assert not any(node.is_running for node in cluster.nodes)


@pytest.mark.parametrize("running", [1, 3])
async def test_a_cancelled_start_leaves_nothing(running: int) -> None:
    """Cancelling async with waits until everything is gone, whichever node boots."""
    cluster = RabbitMQCluster()
    seen: list[tuple[list[Path], set[int]]] = []

    async def cancel_soon(scope: anyio.CancelScope) -> None:
        while sum(node.is_running for node in cluster.nodes) < running:
            await anyio.sleep(0.005)
        seen.append(traces(cluster.nodes))
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_soon, tasks.cancel_scope)
        await cluster.__aenter__()
    [(folders, processes)] = seen
    assert len(folders) == running
    wait_until(lambda: are_gone(folders, processes))


@pytest.mark.parametrize(
    ("phase", "number"),
    [("booting", signal.SIGKILL), ("running", signal.SIGKILL), ("running", signal.SIGINT)],
)
def test_an_interrupted_run_leaves_nothing(phase: str, number: signal.Signals) -> None:
    """However the process ends that started a cluster, nodes and folders end with it."""
    folders, processes = interrupted("RabbitMQCluster", phase, number)
    assert len(folders) == 3
    wait_until(lambda: are_gone(folders, processes))


def test_a_cluster_belongs_to_no_event_loop(portal: BlockingPortal) -> None:
    """A cluster that one loop started serves another one, and is closed in a third."""
    cluster = RabbitMQCluster(2)
    anyio.run(cluster.start)
    first, second = cluster.nodes
    assert isinstance(second, RabbitMQ)
    assert portal.call(first.eval, "length(nodes())") == "1"
    anyio.run(cluster.aclose)
    assert not first.is_running
