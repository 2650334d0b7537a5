"""The processes of one private RabbitMQ node: its epmd, its server, its tools, its watchdog.

The asynchronous part of a node, bound to no event loop: the long-lived processes are plain
:class:`subprocess.Popen` objects, and waiting for them is polling. What they run on is in
``_node_parts.py``, their end in ``_watchdog.py``; the promises to users are made in
:mod:`aioworkq.testing`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import anyio
import anyio.to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from aioworkq import _node_parts, _watchdog
from aioworkq._node_parts import HOST, NodeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_POLL = 0.02
_LOG_TAIL = 8_192
_CONNECTION_START = b"\x00\x0a\x00\x0a"

# Runs a program in another root file system, in mounts that nobody else sees. Every step replaces
# the process before it: the pid stays the one that we know.
_ENTER = """
set -e
root=$1 path=$2 ids=$3
shift 3
mount -t proc proc "$root/proc"
mkdir -p "$root${path%/*}"
mount -t tmpfs tmpfs "$root${path%/*}"
mkdir "$root$path"
mount --bind "$path" "$root$path"
exec chroot --userspec="$ids" --groups= "$root" env --chdir="$path" "$@"
"""


@dataclass(kw_only=True, eq=False)
class Node:
    """One node: a folder, ports, and the processes that live on them."""

    path: Path
    name: str
    installation: _node_parts.Installation
    account: _node_parts.Account
    ports: _node_parts.Ports
    watchdog: subprocess.Popen[bytes]
    env: Mapping[str, str]
    cluster_name: str
    founder: Node | None = None
    server: subprocess.Popen[bytes] | None = field(default=None, init=False)
    epmd: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @classmethod
    async def create(
        cls,
        *,
        version: str | None,
        config: Mapping[str, str],
        plugins: Sequence[str],
        tls_files: Mapping[str, str | os.PathLike[str]],
        founder: Node | None = None,
    ) -> Self:
        """Choose ports, start the watchdog and only then create the folder that it watches.

        With a ``founder``, which runs, the node joins its cluster when it first boots: they have
        one cookie and one epmd, which is the founder's.
        """
        installation = await anyio.to_thread.run_sync(_node_parts.find_installation, version)
        if installation.root is not None and os.geteuid() != 0:
            raise NodeError(
                f"RabbitMQ {installation.version} cannot start",
                reason=f"it lives in a root file system of its own, {installation.root}, "
                "which only root may enter",
                advice="Run it as root, or take the version that is installed.",
            )
        account = _node_parts.account()
        path = _node_parts.new_folder_path(account)
        ports = _node_parts.choose_ports(epmd=founder.ports.epmd if founder else None)
        name = path.name.replace("-", "")
        cookie = secrets.token_hex(16)
        if founder is not None:
            cookie = (founder.path / _node_parts.COOKIE).read_text()
            config = {**_node_parts.joining(founder.name, name), **config}
        node = cls(
            path=path,
            name=name,
            installation=installation,
            account=account,
            ports=ports,
            watchdog=_watchdog.spawn(path, uid=account.uid, gid=account.gid),
            env=_node_parts.environment(path, installation=installation, ports=ports, name=name),
            # Unless it is configured it begins with the name of the node.
            cluster_name=config.get("cluster_name", f"{name}@"),
            founder=founder,
        )
        try:
            await anyio.to_thread.run_sync(
                lambda: _node_parts.build_folder(
                    path,
                    installation=installation,
                    account=account,
                    ports=ports,
                    config=config,
                    plugins=plugins,
                    tls_files=tls_files,
                    cookie=cookie,
                )
            )
        except BaseException:
            await node.destroy()
            raise
        return node

    @property
    def ports_are_free(self) -> bool:
        """Whether nobody listens on its ports. A founder's epmd may do so."""
        return self.ports.all_free(but_epmd=self.founder is not None)

    @property
    def is_alive(self) -> bool:
        """Whether the server's process lives, paused or not."""
        return self.server is not None and self.server.poll() is None

    def log(self) -> str:
        """Return the tail of what the node wrote: its log, then its output."""
        return f"{self._tail('node.log')}\n{self._tail('output.log')}".strip()

    def _tail(self, name: str) -> str:
        with contextlib.suppress(OSError), (self.path / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL))
            return file.read().decode(errors="replace").strip()
        return ""

    async def boot(self, *, timeout: float) -> None:
        """Start the server and wait until it answers AMQP. Whatever prevents it kills it."""
        try:
            # The log of an earlier life would stand in the error of this one.
            with (self.path / "output.log").open("ab") as output:
                output.truncate(0)
                (self.founder or self).start_epmd(output)
                program = self.path / "home" / "sbin" / "rabbitmq-server"
                self.server = self._spawn([program], output=output)
            try:
                with anyio.fail_after(timeout):
                    await self._serve()
            except TimeoutError:
                reason = f"it did not answer on port {self.ports.amqp} within {timeout:g} seconds"
                raise self._not_started(reason) from None
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.kill()
            raise

    def start_epmd(self, output: IO[bytes]) -> None:
        """Start epmd unless it runs."""
        if self.epmd is None or self.epmd.poll() is not None:
            listen = ("-port", str(self.ports.epmd), "-address", HOST)
            self.epmd = self._spawn([self.installation.epmd, *listen], output=output)

    async def _serve(self) -> None:
        # RabbitMQ 4 answers before its boot is over; stopped then, it would call that a failure.
        while not ("completed with" in self._tail("output.log") and await self._answers()):
            if "BOOT FAILED" in self._tail("output.log"):  # it takes seconds to draw conclusions
                raise self._not_started("its boot failed")
            for process in ((self.founder or self).epmd, self.server):
                if process is not None and process.poll() is not None:
                    who = "the node" if process is self.server else "its epmd"
                    raise self._not_started(f"{who} exited with status {process.returncode}")
            await anyio.sleep(_POLL)

    async def _answers(self) -> bool:
        """Tell whether it is our node that answers on our port, with Connection.Start."""
        try:
            with anyio.fail_after(5):
                async with await anyio.connect_tcp(HOST, self.ports.amqp) as stream:
                    await stream.send(b"AMQP\x00\x00\x09\x01")
                    received = BufferedByteReceiveStream(stream)
                    header = await received.receive_exactly(7)
                    payload = await received.receive_exactly(int.from_bytes(header[3:]))
        except (OSError, anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
            return False
        # Somebody else's broker on this port would have another name.
        return payload.startswith(_CONNECTION_START) and self.cluster_name.encode() in payload

    def _not_started(self, reason: str) -> NodeError:
        return NodeError(
            f"RabbitMQ {self.installation.version} did not start",
            reason=reason,
            advice="Correct config= or plugins=, or allow a longer startup_timeout.",
            log=self.log(),
        )

    async def terminate(self, *, timeout: float) -> None:
        """Stop the server in order, or kill it after ``timeout`` seconds."""
        if self.server is not None and self.is_alive:
            self.server.send_signal(signal.SIGCONT)
            self.server.terminate()
            if not await _exits(self.server, timeout=timeout):
                await self.kill()

    async def kill(self) -> None:
        """Kill the server and wait until it is gone."""
        if self.server is not None and self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            await _exits(self.server, timeout=15)

    async def run(
        self, arguments: Sequence[str | Path], *, what: str, timeout: float, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a tool as the node's user in the node's environment; kill it when cancelled."""
        pipe = subprocess.PIPE
        process = self._spawn(arguments, input_=pipe, output=pipe, errors=pipe)
        try:
            with anyio.fail_after(timeout):
                stdout, stderr = await anyio.to_thread.run_sync(
                    process.communicate, stdin, abandon_on_cancel=True
                )
        except TimeoutError:
            raise NodeError(
                what,
                reason=f"no answer in {timeout:g} seconds",
                advice="Call resume() if the node is paused, or allow a longer timeout.",
            ) from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    async def destroy(self) -> None:
        """Kill everything and remove the folder, even when cancelled."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._destroy)

    def _destroy(self) -> None:
        watchdog = self.watchdog
        if _dismiss(watchdog) != 0:  # somebody killed it: a new one does the work
            watchdog = _watchdog.spawn(self.path, uid=self.account.uid, gid=self.account.gid)
            _dismiss(watchdog)
        for process in (self.server, self.epmd):
            if process is not None:
                process.wait(timeout=15)
        if self.path.exists():
            raise NodeError(
                "a private RabbitMQ node left something behind",
                reason=f"{self.path} could not be removed",
                advice="Remove it by hand.",
            )

    def _spawn(
        self,
        arguments: Sequence[str | Path],
        *,
        input_: int = subprocess.DEVNULL,
        output: int | IO[bytes],
        errors: int = subprocess.STDOUT,
    ) -> subprocess.Popen[bytes]:
        """Start a program as the node's user, in a session of its own, with nothing inherited."""
        is_root = os.geteuid() == 0
        root, account = self.installation.root, self.account
        inside = self.installation.seen_from_inside
        command = [str(inside(a) if isinstance(a, Path) else a) for a in arguments]
        if root is not None:
            command = [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh"),
                *(str(root), str(self.path), f"{account.uid}:{account.gid}"),
                *command,
            ]
            is_root = False  # only root may enter; who it is inside is said there
        return subprocess.Popen(  # noqa: S603 - our own arguments
            command,
            stdin=input_,
            stdout=output,
            stderr=errors,
            env=dict(self.env),
            cwd=self.path,
            start_new_session=True,
            user=account.uid if is_root else None,
            group=account.gid if is_root else None,
            extra_groups=[] if is_root else None,
        )


async def _exits(process: subprocess.Popen[bytes], *, timeout: float) -> bool:
    """Wait until the process is gone, and say whether it is."""
    with anyio.move_on_after(timeout):
        while process.poll() is None:  # noqa: ASYNC110 - no event loop is told of its end
            await anyio.sleep(_POLL)
    return process.poll() is not None


def _dismiss(watchdog: subprocess.Popen[bytes]) -> int:
    """Tell a watchdog to do its work, wait until it did, and return its status."""
    if watchdog.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            watchdog.stdin.write(b"\n")
        watchdog.stdin.close()
    return watchdog.wait(timeout=60)
