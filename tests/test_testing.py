"""The private RabbitMQ: what it survives, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import anyio
import pika
import pytest
import trustme
from anyio.from_thread import start_blocking_portal
from pika.exceptions import ChannelClosedByBroker, ProbableAccessDeniedError

from aioworkq import _node_parts, _watchdog
from aioworkq.errors import StateError
from aioworkq.testing import NodeError, NotInstalledError, RabbitMQ, TLSFiles
from tests.nodes import (
    are_gone,
    folder_of,
    get,
    in_thread,
    interrupted,
    is_alive,
    other_versions,
    processes_of,
    publish,
    wait_until,
    write_down,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.from_thread import BlockingPortal

pytestmark = [pytest.mark.rabbitmq, pytest.mark.one_version]


def answers(port: int, *, timeout: float) -> bool:
    """Tell whether somebody answers the AMQP handshake in time."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        try:
            return connection.recv(1) == b"\x01"
        except TimeoutError:
            return False


@pytest.fixture(scope="module")
def node(portal: BlockingPortal) -> Iterator[RabbitMQ]:
    """A node that the tests of this module break; each leaves it running."""
    with portal.wrap_async_context_manager(RabbitMQ()) as node:
        yield node


# Arguments and states


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"startup_timeout": 0}, "startup_timeout is 0: it must be above 0 seconds."),
        ({"startup_timeout": float("nan")}, "startup_timeout is nan: it must be"),
        ({"config": {"heartbeat": "1\n"}}, "config has a line break in 'heartbeat'"),
        ({"plugins": ["a-b"]}, "plugins has 'a-b': that is no name of a plugin."),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(
    options: dict[str, Any], sentence: str
) -> None:
    """A wrong argument is a ValueError that says what is wrong with it."""
    with pytest.raises(ValueError) as caught:
        RabbitMQ(**options)
    assert sentence in str(caught.value)


async def test_another_version_than_the_installed_one_is_not_there() -> None:
    """The error names the version that is installed."""
    with pytest.raises(NotInstalledError) as caught:
        async with RabbitMQ(version="0.1.2"):
            pass
    assert re.match(
        r"RabbitMQ 0\.1\.2 cannot start: what is installed is \d+\.\d+\.\d+", str(caught.value)
    )
    assert "version=None takes what is there." in str(caught.value)


@pytest.mark.parametrize("version", ["4.0", "4.3"])
async def test_another_version_from_a_root_file_system(version: str) -> None:
    """A version that is installed beside the system's runs, is killed and comes back as it does."""
    if not any(f"{other}.".startswith(f"{version}.") for other in other_versions()):
        pytest.skip(f"RabbitMQ {version} is not installed: call make rabbitmq-{version}")
    async with RabbitMQ(version=version) as node:
        assert f"{node.version}.".startswith(f"{version}.")
        assert await node.eval("1 + 1") == "2"
        assert "guest" in await node.rabbitmqctl("list_users")
        url = await node.add_vhost("kept")
        await in_thread(publish, url, "work", b"kept")
        before = processes_of(node)
        await write_down(node)
        await node.kill()
        await node.start()
        assert await in_thread(get, url, "work") == b"kept"
        folder, processes = folder_of(node), before | processes_of(node)
        await node.stop()
        assert not node.is_running
    assert not folder.exists()
    assert not any(map(is_alive, processes))


async def test_a_missing_server_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without rabbitmq-server on the PATH there is an instruction, not a traceback of Popen."""
    monkeypatch.setattr(_node_parts, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        await RabbitMQ().start()
    assert isinstance(caught.value, NotInstalledError)
    assert "rabbitmq-server is not installed" in str(caught.value)
    assert "apt-get install rabbitmq-server" in str(caught.value)


async def test_nothing_is_known_before_the_start_and_after_the_end() -> None:
    """A node without a life refuses everything with a StateError, and may be closed twice."""
    node = RabbitMQ()
    assert not node.is_running
    assert not node.log
    for use in ("port", "url", "tls_port", "tls_url", "version"):
        with pytest.raises(StateError):
            getattr(node, use)
    for signal_ in (node.pause, node.resume):
        with pytest.raises(StateError, match=r"it does not run\. Call start"):
            signal_()
    with pytest.raises(StateError, match="it was never started"):
        await node.eval("1")
    await node.stop()
    await node.kill()
    await node.aclose()
    await node.aclose()
    with pytest.raises(StateError, match=r"it is closed. Make a new RabbitMQ\(\)."):
        await node.start()
    assert repr(node) == "<RabbitMQ without a port: closed>"


async def test_a_running_node_cannot_be_started(rabbitmq: RabbitMQ) -> None:
    """Starting twice is a mistake."""
    with pytest.raises(StateError, match="it runs already"):
        await rabbitmq.start()
    assert repr(rabbitmq) == f"<RabbitMQ on port {rabbitmq.port}: running>"


# Tools


async def test_rabbitmqctl_speaks_to_this_node(rabbitmq: RabbitMQ) -> None:
    """What rabbitmqctl prints is returned."""
    assert "guest\t[administrator]" in await rabbitmq.rabbitmqctl("-q", "list_users")


async def test_a_failing_rabbitmqctl_raises_what_it_printed(rabbitmq: RabbitMQ) -> None:
    """The error has the command and its complaint."""
    with pytest.raises(NodeError) as caught:
        await rabbitmq.rabbitmqctl("delete_vhost", "no-such-host")
    assert "rabbitmqctl delete_vhost no-such-host failed" in str(caught.value)
    assert "Virtual host 'no-such-host' does not exist" in str(caught.value)


@pytest.mark.parametrize("has_erl_call", [True, False])
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 1", "2"),
        (" X = 1,\n X + 1. ", "2"),
        ('"é\\n"', '"é\\n"'),
        ("rabbit:is_running()", "true"),
    ],
)
async def test_eval_returns_erlang_terms(
    rabbitmq: RabbitMQ,
    monkeypatch: pytest.MonkeyPatch,
    expression: str,
    value: str,
    has_erl_call: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """The value comes as Erlang writes it, with or without erl_call."""
    if not has_erl_call:
        assert rabbitmq._node is not None
        slow = dataclasses.replace(rabbitmq._node.installation, erl_call=None)
        monkeypatch.setattr(rabbitmq._node, "installation", slow)
    assert await rabbitmq.eval(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"), [("1 +", "syntax error"), ("no:such()", "undef"), ("throw(x)", "x")]
)
async def test_a_failing_eval_raises(rabbitmq: RabbitMQ, expression: str, reason: str) -> None:
    """Errors of syntax and exceptions come as NodeError."""
    with pytest.raises(NodeError, match=reason):
        await rabbitmq.eval(expression)


async def test_evals_at_a_time_do_not_disturb_each_other(rabbitmq: RabbitMQ) -> None:
    """Each is a client with a name of its own: a node refuses a name that is connected."""
    values: dict[int, str] = {}

    async def evaluate(number: int) -> None:
        values[number] = await rabbitmq.eval(f"timer:sleep(100), {number}")

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(evaluate, number)
    assert values == {number: str(number) for number in range(8)}


async def test_virtual_hosts_come_and_go(rabbitmq: RabbitMQ, queue_name: str) -> None:
    """A virtual host may have any name; its URL works until it is deleted."""
    name = f'{queue_name}/ü %"'
    url = await rabbitmq.add_vhost(name)
    await in_thread(publish, url, "q", b"1")
    await rabbitmq.delete_vhost(name)
    assert await rabbitmq.add_vhost(name) == url
    with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
        await in_thread(get, url, "q")
    await rabbitmq.delete_vhost(name)
    with pytest.raises(NodeError, match="no_such_vhost"):
        await rabbitmq.delete_vhost(name)


async def test_users_may_do_what_they_are_permitted(
    rabbitmq: RabbitMQ, url: str, queue_name: str
) -> None:
    """A new user may do nothing, and then what was said."""
    user, vhost = f"user-{queue_name}", queue_name
    await rabbitmq.add_user(user, 'p"w')
    parameters = pika.URLParameters(url)
    parameters.credentials = pika.PlainCredentials(user, 'p"w')
    with pytest.raises(ProbableAccessDeniedError):
        await in_thread(pika.BlockingConnection, parameters)
    await rabbitmq.set_permissions(user, vhost=vhost, configure="", write="", read="")
    connection = await in_thread(pika.BlockingConnection, parameters)
    with pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
        await in_thread(connection.channel().queue_declare, "q")
    await in_thread(connection.close)


# Faults


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_persistent_message_survives_a_restart(
    node: RabbitMQ, queue_name: str, how: str
) -> None:
    """After SIGKILL or SIGTERM the node comes back with its data on its port."""
    url = node.url
    for queue_type in ("classic", "quorum"):
        await in_thread(publish, url, f"{queue_name}.{queue_type}", b"still here", queue_type)
    await write_down(node)
    processes = processes_of(node)
    await (node.kill() if how == "kill" else node.stop())
    assert not node.is_running
    with pytest.raises(ConnectionRefusedError):
        answers(node.port, timeout=1)
    await node.start()
    assert node.url == url
    for queue_type in ("classic", "quorum"):
        assert await in_thread(get, url, f"{queue_name}.{queue_type}") == b"still here"
    assert processes_of(node) != processes


async def test_a_paused_node_answers_when_it_is_resumed(node: RabbitMQ) -> None:
    """A paused node accepts connections in the kernel, and answers nobody."""
    node.pause()
    assert node.is_running
    assert not answers(node.port, timeout=0.2)
    with pytest.raises(NodeError, match=r"no answer in 0\.2 seconds\. Call resume"):
        await node.eval("1", timeout=0.2)
    node.resume()
    assert answers(node.port, timeout=20)
    assert await node.eval("1") == "1"


async def test_a_paused_node_can_be_stopped_in_order(node: RabbitMQ) -> None:
    """A stop continues a paused node, so that it can end by itself."""
    node.pause()
    await node.stop()
    assert not node.is_running
    assert node._node is not None
    assert node._node.server is not None
    assert node._node.server.returncode == 0
    await node.start()


async def test_a_stop_is_bounded(node: RabbitMQ) -> None:
    """A node that takes longer to stop than it may is killed."""
    await node.stop(timeout=0)
    assert not node.is_running
    await node.start()


async def test_a_port_that_was_taken_while_the_node_was_down_is_an_error(node: RabbitMQ) -> None:
    """The node must come back on its port: the error has the log that says why it cannot."""
    await node.kill()
    with socket.create_server(("127.0.0.1", node.port)), pytest.raises(NodeError) as caught:
        await node.start()
    assert "did not start: its boot failed." in str(caught.value)
    assert "eaddrinuse" in caught.value.log
    assert not node.is_running
    await node.start()


@pytest.mark.parametrize("port", ["amqp", "epmd"])
async def test_a_lost_race_for_a_port_is_run_again(
    monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    """A port that somebody took before the node could costs time, not the start."""
    with socket.create_server(("127.0.0.1", 0)) as thief:
        choose_ports = _node_parts.choose_ports
        lost = dataclasses.replace(choose_ports(), **{port: thief.getsockname()[1]})
        chosen = iter([lost])
        monkeypatch.setattr(
            _node_parts, "choose_ports", lambda **given: next(chosen, choose_ports(**given))
        )
        async with RabbitMQ() as node:
            assert node.port != lost.amqp
            assert answers(node.port, timeout=20)


# Starts that fail


async def test_a_failing_start_shows_the_log() -> None:
    """A mistake in the configuration is in the error, in the node's own words."""
    node = RabbitMQ(config={"no.such.key": "1"})
    with pytest.raises(NodeError) as caught:
        async with node:
            pass
    assert "did not start: its boot failed." in str(caught.value)
    assert "The end of its log:" in str(caught.value)
    assert "no.such.key" in caught.value.log
    assert "no.such.key" in node.log


async def test_a_start_that_takes_too_long_is_ended() -> None:
    """The start is bounded, and its node does not run on."""
    node = RabbitMQ(startup_timeout=0.2)
    with pytest.raises(NodeError, match=r"it did not answer on port \d+ within 0\.2 seconds"):
        await node.start()
    assert not node.is_running
    folder, processes = folder_of(node), processes_of(node)
    await node.aclose()
    assert not folder.exists()
    wait_until(lambda: not any(map(is_alive, processes)))


async def test_a_cancelled_start_leaves_nothing() -> None:
    """Cancelling async with waits until everything is gone."""
    node = RabbitMQ()
    seen: list[tuple[Path, set[int]]] = []

    async def cancel_soon(scope: anyio.CancelScope) -> None:
        while not node.is_running:
            await anyio.sleep(0.005)
        seen.append((folder_of(node), processes_of(node)))
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_soon, tasks.cancel_scope)
        await node.__aenter__()
    [(folder, processes)] = seen
    assert not folder.exists()
    wait_until(lambda: not any(map(is_alive, processes)))


async def test_an_unknown_plugin_is_refused() -> None:
    """A plugin that is not there is named, and no folder stays."""
    before = set(folders())
    with pytest.raises(NodeError, match="there is no plugin rabbitmq_nonsense in /"):
        await RabbitMQ(plugins=["rabbitmq_nonsense"]).start()
    assert set(folders()) <= before


def folders() -> Iterator[Path]:
    """List the folders of all nodes of all users on this machine."""
    return _node_parts.new_folder_path(_node_parts.account()).parent.glob("aioworkq-*")


# Configuration


async def test_tls_plugins_and_configuration(tmp_path: Path) -> None:
    """A node may have a TLS listener, plugins and any configuration."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    files = {name: tmp_path / f"{name}.pem" for name in ("certfile", "keyfile", "cafile")}
    certificate.cert_chain_pems[0].write_to_path(str(files["certfile"]))
    certificate.private_key_pem.write_to_path(str(files["keyfile"]))
    authority.cert_pem.write_to_path(str(files["cafile"]))
    async with RabbitMQ(
        tls=TLSFiles(**files),
        plugins=["rabbitmq_event_exchange"],
        config={"heartbeat": "17", "cluster_name": "mine"},
    ) as node:
        assert node.tls_url == f"amqps://guest:guest@127.0.0.1:{node.tls_port}/"
        parameters = pika.URLParameters(node.tls_url)
        context = ssl.create_default_context(cafile=str(files["cafile"]))
        parameters.ssl_options = pika.SSLOptions(context, "127.0.0.1")
        connection = await in_thread(pika.BlockingConnection, parameters)
        await in_thread(connection.close)
        assert await node.eval("rabbit_plugins:active()") == "[rabbitmq_event_exchange]"
        assert await node.eval("application:get_env(rabbit, heartbeat)") == "{ok,17}"


def test_a_node_belongs_to_no_event_loop(portal: BlockingPortal) -> None:
    """A node that uvloop started serves another loop, and is closed in a third."""
    node = RabbitMQ()
    with start_blocking_portal("asyncio", {"use_uvloop": True}) as uvloop_portal:
        uvloop_portal.call(node.start)
    assert portal.call(node.eval, "1") == "1"
    anyio.run(node.aclose)
    assert not node.is_running


# Traces


async def test_the_end_leaves_no_process_and_no_file() -> None:
    """Everything that a node started is gone, whatever Erlang put it into."""
    async with RabbitMQ() as node:
        folder, processes = folder_of(node), processes_of(node)
        assert len(processes) >= 5, "the watchdog, epmd, Erlang and its helpers"
        assert all(map(is_alive, processes))
    assert not folder.exists()
    wait_until(lambda: not any(map(is_alive, processes)))
    assert "[info]" in node.log  # its tail is kept


async def test_the_end_does_not_need_the_watchdog_that_was_there() -> None:
    """Somebody who killed the watchdog did not keep the node alive."""
    node = RabbitMQ(startup_timeout=0.2)
    with contextlib.suppress(NodeError):
        await node.start()
    assert node._node is not None
    node._node.watchdog.kill()
    folder, processes = folder_of(node), processes_of(node)
    await node.aclose()
    assert not folder.exists()
    wait_until(lambda: not any(map(is_alive, processes)))


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("booting", signal.SIGKILL),
        ("booting", signal.SIGINT),
        ("running", signal.SIGKILL),
        ("running", signal.SIGTERM),
        ("running", signal.SIGINT),
    ],
)
def test_an_interrupted_run_leaves_nothing(phase: str, number: signal.Signals) -> None:
    """However the process ends that started a node, the node and its folder end with it."""
    folders, processes = interrupted("RabbitMQ", phase, number)
    assert len(folders) == 1
    wait_until(lambda: are_gone(folders, processes))


def test_a_watchdog_kills_the_whole_household(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of the folder end, in whatever session they are, and nobody else's."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").touch()
    start = functools.partial(subprocess.Popen, ["sleep", "60"], start_new_session=True)
    members = [start(env={"HOME": str(home)}) for _ in range(3)]
    stranger = start(env={"HOME": str(home) + "2"})
    ids = {"uid": os.getuid(), "gid": os.getgid()}
    wait_until(lambda: len(_watchdog.processes_of(home, **ids)) == 3)  # they did exec
    reader, writer = os.pipe()
    os.close(writer)
    arguments = [str(home), str(ids["uid"]), str(ids["gid"]), str(os.getpid())]
    monkeypatch.setattr(sys, "argv", ["watchdog", *arguments])
    monkeypatch.setattr("signal.signal", Mock())
    with os.fdopen(reader) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        _watchdog.main()
    assert [member.wait(10) for member in members] == [-signal.SIGKILL] * 3
    assert stranger.poll() is None
    assert not home.exists()
    stranger.kill()
    stranger.wait()


# Parts


def test_a_folder_for_another_user_is_one_that_everybody_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TMPDIR is used where it can be, and passed by where the node's user could not enter it."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    other = _node_parts.Account(uid=os.geteuid() + 1, gid=os.getegid())
    ours = _node_parts.Account(uid=os.geteuid(), gid=os.getegid())
    assert _node_parts.new_folder_path(ours).parent == tmp_path.resolve()
    assert _node_parts.new_folder_path(other).parent in {Path("/tmp"), Path("/var/tmp")}  # noqa: S108
    monkeypatch.setattr(_node_parts, "_is_reachable", Mock(return_value=False))
    with pytest.raises(NodeError, match="Set TMPDIR to a folder"):
        _node_parts.new_folder_path(ours)


@pytest.mark.parametrize(
    ("euid", "users", "uid"),
    [(0, {"rabbitmq": 7, "nobody": 9}, 7), (0, {"nobody": 9}, 9), (0, {}, 65534), (5, {}, 5)],
)
def test_a_node_runs_unprivileged(
    monkeypatch: pytest.MonkeyPatch, euid: int, users: dict[str, int], uid: int
) -> None:
    """Root gives way to rabbitmq, then to nobody; anybody else runs it as himself."""

    def getpwnam(name: str) -> Any:
        return type("Entry", (), {"pw_uid": users[name], "pw_gid": users[name]})

    monkeypatch.setattr("os.geteuid", lambda: euid)
    monkeypatch.setattr("pwd.getpwnam", getpwnam)
    assert _node_parts.account().uid == uid


def test_ports_lie_below_the_ephemeral_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """No outgoing connection can take a port from a node that is down."""
    ports = _node_parts.choose_ports()
    assert all(20_000 <= port < 32_000 for port in dataclasses.astuple(ports))
    assert ports.all_free()
    monkeypatch.setattr(_node_parts, "port_is_free", Mock(return_value=False))
    assert not ports.all_free()
    with pytest.raises(NodeError, match="no free port was found"):
        _node_parts.choose_ports()


def test_packed_plugins_cannot_be_chosen_from(tmp_path: Path) -> None:
    """Where plugins are .ez archives all of them are taken: slower, and right."""
    for name in ("rabbit-3.9.0.ez", "ranch-2.0.0.ez"):
        (tmp_path / name).touch()
    plugins = _node_parts._needed_plugins(tmp_path, wanted=[])
    assert {plugin.name for plugin in plugins} == {"rabbit-3.9.0.ez", "ranch-2.0.0.ez"}
