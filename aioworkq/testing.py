"""A private RabbitMQ for tests: started in seconds, broken at will, gone without a trace.

Here lives :class:`RabbitMQ`, one throw-away node of a RabbitMQ server that is installed on this
machine: what users are promised, and what tests do to it. How it is done is in ``_node.py``, and
several nodes make a :class:`RabbitMQCluster` in ``_cluster.py``.
Nothing here speaks AMQP beyond the first frame of a handshake: connect with whatever client you
test. Fixtures for pytest are not here either.

Linux only.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from aioworkq._cluster import RabbitMQCluster
from aioworkq._lifetime import Lifetime
from aioworkq._node import Node
from aioworkq._node_parts import HOST, NodeError, NotInstalledError
from aioworkq._testing_kit import Drained, deliver, drain
from aioworkq.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Drained",
    "NodeError",
    "NotInstalledError",
    "RabbitMQ",
    "RabbitMQCluster",
    "TLSFiles",
    "deliver",
    "drain",
]

_BOOTS = 4  # a port that was free when it was chosen may be lost in a race: then again
_evals = itertools.count(1)  # a name of its own for each, in this process


@dataclass(frozen=True, kw_only=True)
class TLSFiles:
    """The PEM files of a node's TLS listener. The node gets copies: only we need to read them.

    Attributes:
        certfile: The node's certificate chain. Its clients connect to ``127.0.0.1``.
        keyfile: Its private key.
        cafile: The authorities that clients' certificates are checked against, ``None`` for
            none. Whether clients must show one is said by ``ssl_options.verify`` and
            ``ssl_options.fail_if_no_peer_cert`` in ``config``.
    """

    certfile: str | os.PathLike[str]
    keyfile: str | os.PathLike[str]
    cafile: str | os.PathLike[str] | None = None


class RabbitMQ(Lifetime):
    """A private RabbitMQ node on loopback ports, in a folder of its own that goes with it.

    ::

        async with RabbitMQ() as node:
            connection = await aio_pika.connect(node.url)
            await node.kill()     # SIGKILL: what a crash does
            await node.start()    # the same ports, the same data

    Nothing is shared with a RabbitMQ of the system, and nothing stays behind: a watchdog process
    kills the node and removes its folder even when this process is killed. Started by root, the
    node runs as an unprivileged user.

    The object belongs to no event loop: a fixture may start it in one loop and a test use it in
    another. Use it from one task at a time.

    Args:
        version: The version that must run, or how it begins (``"4.3"``), ``None`` for whatever is
            installed. Other versions than that are taken from root file systems in
            ``aioworkq/rabbitmq/`` of the user's cache folder (``XDG_CACHE_HOME``, or
            ``~/.cache``), as ``debootstrap --include=rabbitmq-server`` makes them. Only root may
            run these.
        config: Lines of ``rabbitmq.conf``, which win over ours.
        plugins: Plugins to enable. Each costs boot time, and one with a listener needs a free
            port in ``config``.
        tls: Files of a TLS listener beside the plain one, ``None`` for none.
        startup_timeout: Seconds until a start that does not serve AMQP fails. A start takes 2 to
            6 on an idle machine, several times that on a busy one.

    Raises:
        ValueError: An argument is not what it must be.
    """

    def __init__(
        self,
        *,
        version: str | None = None,
        config: Mapping[str, str] | None = None,
        plugins: Sequence[str] = (),
        tls: TLSFiles | None = None,
        startup_timeout: float = 60.0,
    ) -> None:
        if not startup_timeout > 0:
            raise ValueError(f"startup_timeout is {startup_timeout!r}: it must be above 0 seconds.")
        for key, value in (config or {}).items():
            if "\n" in key + value:
                raise ValueError(f"config has a line break in {key!r}: give every line a key.")
        for plugin in plugins:
            if not re.fullmatch(r"\w+", plugin):
                raise ValueError(f"plugins has {plugin!r}: that is no name of a plugin.")
        self._version = version
        self._config = dict(config or {})
        self._plugins = tuple(plugins)
        self._tls_files = {} if tls is None else _tls_options(tls)
        self._startup_timeout = startup_timeout
        self._node: Node | None = None
        self._founder: RabbitMQ | None = None  # set by a cluster
        self._last_log = ""
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "running" if self.is_running else "stopped"
        where = f"on port {self._node.ports.amqp}" if self._node else "without a port"
        return f"<RabbitMQ {where}: {state}>"

    @property
    def version(self) -> str:
        """RabbitMQ's version."""
        return self._require_node("version").installation.version

    @property
    def port(self) -> int:
        """The port for plain AMQP, the same after every start."""
        return self._require_node("port").ports.amqp

    @property
    def url(self) -> str:
        """The URL of the virtual host ``/`` for the user ``guest``, who may do everything."""
        return f"amqp://guest:guest@{HOST}:{self.port}/"

    @property
    def tls_port(self) -> int:
        """The port for AMQP over TLS."""
        if not self._tls_files:
            raise StateError(
                "RabbitMQ.tls_port is not known",
                reason="there is no TLS listener",
                advice="Give RabbitMQ() a tls=.",
            )
        return self._require_node("tls_port").ports.tls

    @property
    def tls_url(self) -> str:
        """The URL for TLS. Which authority to trust is for the client to say."""
        return f"amqps://guest:guest@{HOST}:{self.tls_port}/"

    @property
    def is_running(self) -> bool:
        """Whether the node's process lives. A paused node lives."""
        return self._node is not None and self._node.is_alive

    @property
    def log(self) -> str:
        """The tail of what the node wrote: its log, then its output. Kept when it is closed.

        RabbitMQ writes its log with a delay: a node that was killed wrote less than it did.
        """
        return self._last_log if self._node is None else self._node.log()

    async def start(self) -> None:
        """Start the node, the first time or again, and wait until it answers AMQP.

        A node that was stopped or killed comes back on its ports with its data. When the start
        fails or is cancelled, no node runs. Without ``async with``, :meth:`aclose` is due in
        any case.

        Raises:
            NotInstalledError: The server is not installed, or not in that version.
            NodeError: It died or did not serve in time; the error has the tail of its log.
            StateError: It runs already, or it is closed.
        """
        if self._is_closed:
            raise StateError(
                "RabbitMQ.start() is not possible",
                reason="it is closed",
                advice="Make a new RabbitMQ().",
            )
        if self.is_running:
            raise StateError(
                "RabbitMQ.start() is not possible",
                reason="it runs already",
                advice="Call stop() or kill() before.",
            )
        for boots_left in reversed(range(_BOOTS)):
            is_new = self._node is None
            node = self._node = self._node or await self._create()
            try:
                await node.boot(timeout=self._startup_timeout)
            except NodeError:
                # Ours are dead. A port that is still taken is somebody else's: we lost a race.
                if not is_new or not boots_left or node.ports_are_free:
                    raise
                await self._destroy()
            else:
                break

    async def _create(self) -> Node:
        return await Node.create(
            version=self._version,
            config=self._config,
            plugins=self._plugins,
            tls_files=self._tls_files,
            founder=self._founder._node if self._founder else None,  # noqa: SLF001 - one of us
        )

    async def stop(self, *, timeout: float = 15.0) -> None:
        """Stop the node in order (SIGTERM), or with SIGKILL after ``timeout`` seconds.

        Its data stays for the next :meth:`start`. A paused node is continued first. Nothing
        happens when it does not run. When cancelled, it may still be stopping.
        """
        if self._node is not None:
            await self._node.terminate(timeout=timeout)

    async def kill(self) -> None:
        """Kill the node with SIGKILL and wait until it is gone.

        Its data stays for the next :meth:`start`: what a crash of the process leaves. Nothing
        happens when it does not run.

        RabbitMQ writes down late that there is a new queue. Killed within a second of its
        declaration it comes back with a quorum queue that is empty, and before 4.3 never
        answers; killed within two seconds, RabbitMQ 3.10 and 4.0 may have forgotten a classic
        queue. A test that means another crash than that first evaluates::

            begin _ = (catch sys:get_state(mnesia_recover)),
                  _ = (catch disk_log:sync(latest_log)),
                  [ok = dets:sync(Table) || Table <- dets:all()] end
        """
        if self._node is not None:
            await self._node.kill()

    def pause(self) -> None:
        """Stop the node's process (SIGSTOP): its sockets stay open and nobody answers.

        It stands still on return.

        Raises:
            StateError: It does not run.
        """
        pid = self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused node go on (SIGCONT). Nothing happens when it is not paused.

        Raises:
            StateError: It does not run.
        """
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> int:
        if self._node is None or self._node.server is None or not self.is_running:
            raise StateError(
                "RabbitMQ.pause() and resume() are not possible",
                reason="it does not run",
                advice="Call start() before.",
            )
        self._node.server.send_signal(number)
        return self._node.server.pid

    async def aclose(self) -> None:
        """Kill the node and remove its folder. It cannot be started again.

        Runs to its end even when cancelled. May be called in any state, also again.

        Raises:
            NodeError: Something could not be removed.
        """
        self._is_closed = True
        await self._destroy()

    async def _destroy(self) -> None:
        node = self._node
        if node is not None:
            self._last_log = node.log()
            await node.destroy()
            self._node = None

    async def rabbitmqctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run ``rabbitmqctl`` on this node and return what it printed.

        Every call starts an Erlang VM, which takes about half a second: :meth:`eval` takes
        milliseconds. When cancelled, the program is killed; what it did stays done.

        Args:
            *arguments: The command and its arguments.
            timeout: Seconds until the program is killed. A paused node never answers.

        Raises:
            NodeError: The command failed; the error has what it printed.
            StateError: The node was never started, or is closed.
        """
        node = self._require_node("rabbitmqctl()")
        program = node.path / "home" / "sbin" / "rabbitmqctl"
        what = f"rabbitmqctl {' '.join(arguments)} failed"
        done = await node.run([program, *arguments], what=what, timeout=timeout)
        if done.returncode:
            printed = (done.stderr + done.stdout).decode(errors="replace").strip()
            raise NodeError(what, reason=printed or f"its status is {done.returncode}")
        return done.stdout.decode(errors="replace")

    async def eval(self, expression: str, *, timeout: float = 60.0) -> str:
        """Evaluate Erlang in the node and return the value as Erlang writes it.

        This is ``rabbitmqctl eval`` in a hundredth of its time, for faults above all::

            await node.eval('rabbit_networking:close_all_connections("maintenance")')

        Args:
            expression: One or more expressions, separated by commas.
            timeout: Seconds until we stop waiting. A paused node never answers.

        Raises:
            NodeError: The expression is wrong or raised, or the node does not run.
            StateError: The node was never started, or is closed.
        """
        node = self._require_node("eval()")
        erl_call, what = node.installation.erl_call, f"eval of {expression!r} failed"
        expression = expression.strip().removesuffix(".")
        if erl_call is None:  # this Erlang came without it
            return (await self.rabbitmqctl("eval", f"{expression}.", timeout=timeout)).strip()
        # Its own random name is one per second, and a node refuses a name that is connected.
        name = f"eval{os.getpid()}_{next(_evals)}"
        # erl_call reads Latin-1.
        escaped = "".join(c if c.isascii() else f"\\x{{{ord(c):x}}}" for c in expression)
        program = f'io:put_chars(io_lib:format("~0tp", [begin {escaped} end])).\n'
        address = f"{HOST}:{node.ports.distribution}"
        done = await node.run(
            [erl_call, "-h", name, "-e", "-fetch_stdout", "-address", address],
            what=what,
            timeout=timeout,
            stdin=program.encode(),
        )
        printed = (done.stdout + done.stderr).decode(errors="replace").strip()
        if not printed.endswith("{ok, ok}"):
            raise NodeError(what, reason=printed or f"its status is {done.returncode}")
        return printed.removesuffix("{ok, ok}")

    async def add_vhost(self, name: str) -> str:
        """Create a virtual host that ``guest`` may use, in about 20 ms, and return its URL.

        Raises:
            NodeError: It could not be created.
            StateError: The node was never started, or is closed.
        """
        everything = _permit("guest", vhost=name, configure=".*", write=".*", read=".*")
        await self.eval(f'ok = rabbit_vhost:add({_binary(name)}, <<"test">>), {everything}')
        return self.url + quote(name, safe="")

    async def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it, and close its connections.

        Raises:
            NodeError: It does not exist.
            StateError: The node was never started, or is closed.
        """
        await self.eval(f'ok = rabbit_vhost:delete({_binary(name)}, <<"test">>)')

    async def add_user(self, name: str, password: str) -> None:
        """Create a user, who may use no virtual host yet.

        Raises:
            NodeError: It could not be created; it may exist already.
            StateError: The node was never started, or is closed.
        """
        arguments = f'{_binary(name)}, {_binary(password)}, <<"test">>'
        await self.eval(f"ok = rabbit_auth_backend_internal:add_user({arguments})")

    async def set_permissions(
        self,
        user: str,
        *,
        vhost: str = "/",
        configure: str = ".*",
        write: str = ".*",
        read: str = ".*",
    ) -> None:
        """Say what a user may do in a virtual host, as ``rabbitmqctl set_permissions`` does.

        Raises:
            NodeError: There is no such user or virtual host.
            StateError: The node was never started, or is closed.
        """
        await self.eval(_permit(user, vhost=vhost, configure=configure, write=write, read=read))

    def _require_node(self, what: str) -> Node:
        if self._node is None:
            raise StateError(
                f"RabbitMQ.{what} is not known",
                reason="it is closed" if self._is_closed else "it was never started",
                advice="Use it inside of `async with RabbitMQ() as node`.",
            )
        return self._node


def _tls_options(tls: TLSFiles) -> dict[str, str | os.PathLike[str]]:
    """Name the files as RabbitMQ's ``ssl_options`` do."""
    files = {"certfile": tls.certfile, "keyfile": tls.keyfile}
    return files if tls.cafile is None else files | {"cacertfile": tls.cafile}


def _permit(user: str, *, vhost: str, configure: str, write: str, read: str) -> str:
    """Write ``rabbitmqctl set_permissions`` in Erlang."""
    arguments = ", ".join(map(_binary, (user, vhost, configure, write, read, "test")))
    return f"ok = rabbit_auth_backend_internal:set_permissions({arguments})"


def _binary(text: str) -> str:
    """Write a text as an Erlang binary, whatever is in it."""
    return f"<<{','.join(map(str, text.encode()))}>>"
