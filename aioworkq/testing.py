"""A private RabbitMQ for tests: started in seconds, broken at will, gone without a trace.

Here lives :class:`RabbitMQ`, one throw-away node of the RabbitMQ server that is installed on this
machine. What a node is made of is in ``_node.py``, how it ends in ``_watchdog.py``. Nothing here
speaks AMQP beyond the first frame of a handshake: connect with whatever client you test. Fixtures
for pytest are not here but in :mod:`aioworkq.pytest_plugin`.

Linux only, like RabbitMQ's packages that it runs.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

import anyio
import anyio.to_thread

from aioworkq import _node, _watchdog
from aioworkq._node import NodeError, NotInstalledError
from aioworkq.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

__all__ = ["NodeError", "NotInstalledError", "RabbitMQ", "TLSFiles"]

_POLL = 0.01
_BOOTS = 4  # a port that was free when it was chosen may be lost in a race: then again


@dataclass(frozen=True, kw_only=True)
class TLSFiles:
    """The PEM files of a node's TLS listener. They are copied: only we need to read them.

    Attributes:
        certfile: The node's certificate chain. Clients see the host ``127.0.0.1``.
        keyfile: Its private key.
        cafile: The authorities that clients' certificates are checked against, ``None`` for
            none. Whether a client must show one is ``ssl_options.verify = verify_peer`` and
            ``ssl_options.fail_if_no_peer_cert = true`` in ``config``.
    """

    certfile: str | os.PathLike[str]
    keyfile: str | os.PathLike[str]
    cafile: str | os.PathLike[str] | None = None


class RabbitMQ:
    """A private RabbitMQ node on loopback ports, in a folder of its own that goes with it.

    ::

        async with RabbitMQ() as node:
            connection = await aio_pika.connect(node.url)
            await node.kill()     # SIGKILL: what a power cut does
            await node.start()    # the same ports, the same data

    Nothing is shared with a RabbitMQ of the system, and nothing stays behind: a watchdog process
    kills the node and removes its folder even when this process is killed. Started as root, the
    node runs as an unprivileged user.

    The object belongs to no event loop: fixtures may start it in one loop and tests use it in
    another. Use it from one task at a time.

    Args:
        version: The version that must run, ``None`` for whatever is installed.
        config: Lines of ``rabbitmq.conf``, which win over ours.
        plugins: Plugins to enable. Each costs boot time, and one with a listener needs a free
            port in ``config``.
        tls: Files of a TLS listener beside the plain one, ``None`` for none.
        startup_timeout: Seconds until a start that does not serve AMQP fails. It takes 2 to 6
            on an idle machine, several times that on a busy one.

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
        for line in (f"{key} = {value}" for key, value in (config or {}).items()):
            if "\n" in line:
                raise ValueError(f"config has a line break in {line!r}: write one key per line.")
        for plugin in plugins:
            if not re.fullmatch(r"\w+", plugin):
                raise ValueError(f"plugins has {plugin!r}: that is no name of a plugin.")
        self._wanted_version = version
        self._config = dict(config or {})
        self._plugins = tuple(plugins)
        self._tls = tls
        self._startup_timeout = startup_timeout
        self._name = f"t{secrets.token_hex(4)}"
        self._place: _Place | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._last_log = ""
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self.is_running else "stopped"
        where = f" on port {self._place.ports.amqp}" if self._place else ""
        return f"<RabbitMQ {self._name}: {state}{where}>"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # What it is

    @property
    def version(self) -> str:
        """RabbitMQ's version."""
        return self._started("the version").installation.version

    @property
    def port(self) -> int:
        """The port for plain AMQP, the same after every start."""
        return self._started("the port").ports.amqp

    @property
    def tls_port(self) -> int:
        """The port for AMQP over TLS; nobody listens there without ``tls=``."""
        place = self._started("the TLS port")
        if self._tls is None:
            raise StateError(
                "the node has no TLS port", reason="tls= was not given", advice="Give it files."
            )
        return place.ports.tls

    @property
    def url(self) -> str:
        """The URL of the virtual host ``/`` for the user ``guest``, who may do everything."""
        return f"amqp://guest:guest@{_node.HOST}:{self.port}/"

    @property
    def tls_url(self) -> str:
        """The URL for TLS. Which authority to trust is for the client to say."""
        return f"amqps://guest:guest@{_node.HOST}:{self.tls_port}/"

    @property
    def pid(self) -> int | None:
        """The process id of the node, ``None`` when it does not run."""
        return self._server.pid if self._server is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the node's process lives. A paused node lives."""
        return self._server is not None and self._server.poll() is None

    @property
    def log(self) -> str:
        """The tail of what the node wrote: its output, then its log."""
        if self._place is None:
            return self._last_log
        tails = (_tail(self._place.path / name) for name in ("output.log", "node.log"))
        return "\n".join(tail for tail in tails if tail)

    # What becomes of it

    async def start(self) -> None:
        """Start the node, the first time or again, and wait until it answers AMQP.

        A node that was stopped or killed comes back on its ports with its data. When the start
        fails or is cancelled, no node runs; :meth:`aclose` is due in any case, as is
        ``async with``, which calls it.

        Raises:
            NotInstalledError: The server is not installed, or not in that version.
            NodeError: It died or did not serve in time; the error has the tail of its log.
            StateError: It runs already, or it is closed.
        """
        if self._closed or self.is_running:
            raise StateError(
                "the node cannot start",
                reason="it is closed" if self._closed else "it runs already",
                advice="Make a new RabbitMQ()." if self._closed else "Call stop() or kill() first.",
            )
        for boots_left in reversed(range(_BOOTS)):
            is_new = self._place is None
            place = self._place or await self._create_place()
            try:
                return await self._boot(place)
            except NodeError:
                # Ours are dead. A port that is in use still is somebody else's: we lost a race.
                if not is_new or not boots_left or place.ports.all_free():
                    raise
            await self._destroy_place(place)
        return None

    async def stop(self, *, timeout: float = 15.0) -> None:
        """Stop the node in order (SIGTERM), or by SIGKILL after ``timeout`` seconds.

        Its data stays for the next :meth:`start`. Nothing happens when it does not run. A paused
        node is continued first. When cancelled, the node may still be stopping.
        """
        if self._server is not None and self.is_running:
            self._server.send_signal(signal.SIGCONT)
            self._server.terminate()
            if not await _exits(self._server, timeout=timeout):
                await self.kill()

    async def kill(self) -> None:
        """Kill the node with SIGKILL, as a crash of the machine would, and wait until it is gone.

        Its data stays for the next :meth:`start`. Nothing happens when it does not run.
        """
        if self._server is not None and self.is_running:
            os.killpg(self._server.pid, signal.SIGKILL)
            await _exits(self._server, timeout=15)

    def pause(self) -> None:
        """Stop the node's process (SIGSTOP): its sockets stay open and nobody answers.

        Returns when it stands still.

        Raises:
            StateError: It does not run.
        """
        server = self._running("pause")
        server.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused node go on (SIGCONT). Nothing happens when it is not paused.

        Raises:
            StateError: It does not run.
        """
        self._running("resume").send_signal(signal.SIGCONT)

    async def aclose(self) -> None:
        """Kill the node and remove its folder. It cannot be started again.

        Runs to its end even when cancelled, and may be called in any state, also again.

        Raises:
            NodeError: Something could not be removed.
        """
        self._closed = True
        if self._place is not None:
            await self._destroy_place(self._place)

    # What it does for tests

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
        place = self._started("rabbitmqctl")
        what = f"rabbitmqctl {' '.join(arguments)} failed"
        program = place.path / "home" / "sbin" / "rabbitmqctl"
        done = await place.run([program, *arguments], what=what, timeout=timeout)
        if done.returncode:
            reason = _text(done.stderr) or _text(done.stdout) or f"status {done.returncode}"
            raise NodeError(what, reason=reason, advice="See rabbitmqctl help.")
        return done.stdout.decode(errors="replace")

    async def eval(self, expression: str, *, timeout: float = 60.0) -> str:
        """Evaluate Erlang in the node and return the value as Erlang writes it.

        This is ``rabbitmqctl eval`` in a hundredth of its time::

            await node.eval('vm_memory_monitor:set_vm_memory_high_watermark(0.0001)')

        Args:
            expression: One or more expressions, separated by commas.
            timeout: Seconds until we stop waiting. A paused node never answers.

        Raises:
            NodeError: The expression is wrong or raised.
            StateError: The node was never started, or is closed.
        """
        place = self._started("eval")
        expression = expression.strip().rstrip(".")
        if place.installation.erl_call is None:
            return (await self.rabbitmqctl("eval", f"{expression}.", timeout=timeout)).strip()
        program = f'io:put_chars(io_lib:format("~0tp", [begin {_escaped(expression)} end])).\n'
        done = await place.run(
            [
                place.installation.erl_call,
                *("-r", "-e", "-fetch_stdout", "-address"),
                f"{_node.HOST}:{place.ports.distribution}",
            ],
            what=f"eval of {expression!r} failed",
            timeout=timeout,
            stdin=program.encode(),
        )
        output = done.stdout.decode(errors="replace")
        if not output.endswith("{ok, ok}"):
            raise NodeError(
                f"eval of {expression!r} failed",
                reason=output or _text(done.stderr) or f"status {done.returncode}",
                advice="Correct the expression, or start the node if it does not run.",
            )
        return output.removesuffix("{ok, ok}")

    async def add_vhost(self, name: str, *, user: str = "guest") -> str:
        """Create a virtual host that ``user`` may use fully, in about 20 ms.

        Returns:
            Its URL for the user ``guest``.

        Raises:
            NodeError: It could not be created.
            StateError: The node was never started, or is closed.
        """
        vhost, everything = _binary(name), _binary(".*")
        await self.eval(
            f'ok = rabbit_vhost:add({vhost}, <<"test">>), '
            f"ok = rabbit_auth_backend_internal:set_permissions({_binary(user)}, {vhost}, "
            f'{everything}, {everything}, {everything}, <<"test">>)'
        )
        return self.url + quote(name, safe="")

    async def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with its queues and close its connections.

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
        await self.eval(
            f"ok = rabbit_auth_backend_internal:add_user({_binary(name)}, {_binary(password)}, "
            '<<"test">>)'
        )

    # How it is done

    def _started(self, what: str) -> _Place:
        if self._place is None:
            raise StateError(
                f"{what} of the node is not known",
                reason="it is closed" if self._closed else "it was never started",
                advice="Use it inside of `async with RabbitMQ() as node`.",
            )
        return self._place

    def _running(self, what: str) -> subprocess.Popen[bytes]:
        if self._server is None or not self.is_running:
            raise StateError(
                f"{what}() of the node is not possible",
                reason="it does not run",
                advice="Call start() first.",
            )
        return self._server

    async def _create_place(self) -> _Place:
        """Choose ports, start the watchdog and only then create the folder that it watches."""
        installation = await anyio.to_thread.run_sync(_node.find_installation, self._wanted_version)
        account = _node.unprivileged_account()
        path = _node.new_folder_path(account)
        ports = _node.choose_ports()
        config = _node.DEFAULTS | {"listeners.tcp.1": f"{_node.HOST}:{ports.amqp}"}
        files: dict[str, bytes] = {}
        if self._tls is not None:
            files = await anyio.to_thread.run_sync(_read_tls_files, self._tls)
            config |= {
                "listeners.ssl.1": f"{_node.HOST}:{ports.tls}",
                "ssl_options.verify": "verify_none",
                **{f"ssl_options.{name.removesuffix('.pem')}": str(path / name) for name in files},
            }
        self._place = _Place(
            path=path,
            installation=installation,
            account=account,
            ports=ports,
            watchdog=_watchdog.spawn(path),
            env=_node.environment(
                path, installation=installation, ports=ports, name=f"{self._name}@localhost"
            ),
        )
        await anyio.to_thread.run_sync(
            lambda: _node.build_folder(
                path,
                installation=installation,
                account=account,
                config=config | self._config,
                plugins=self._plugins,
                files=files,
            )
        )
        return self._place
