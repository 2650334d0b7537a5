"""What a private RabbitMQ node is made of: installation, account, ports, folder, environment.

The functions here block and start nothing. The processes of a node are in ``_node.py``, its end is
in ``_watchdog.py``, and the front of it all is :mod:`aioworkq.testing`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HOST = "127.0.0.1"
COOKIE = ".erlang.cookie"

PLACES = (
    "/usr/lib/rabbitmq/bin",  # the packages of Debian and of RabbitMQ: no wrapper for root there
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/opt/homebrew/sbin",
    "/opt/homebrew/bin",
)
"""Where programs are looked for after ``PATH``, which lacks ``sbin`` for plain users."""

DEFAULTS = {
    "distribution.listener.interface": HOST,
    "disk_free_limit.absolute": "50MB",
    "vm_memory_high_watermark.absolute": "1GB",
    "collect_statistics_interval": "1000",
    "log.console": "false",
}


class NodeError(RuntimeError):
    """A private node could not do what was asked of it.

    Attributes:
        what: What did not work.
        reason: Why, in RabbitMQ's own words where it gave any.
        advice: What to do about it.
        log: The tail of the node's log, or an empty text.
    """

    def __init__(self, what: str, *, reason: str, advice: str = "", log: str = "") -> None:
        self.what = what
        self.reason = reason
        self.advice = advice
        self.log = log
        super().__init__(what, reason)

    def __str__(self) -> str:
        sentence = f"{self.what}: {self.reason.rstrip('.')}. {self.advice}".rstrip()
        return f"{sentence}\nThe end of its log:\n{self.log}" if self.log else sentence


class NotInstalledError(NodeError):
    """There is no RabbitMQ server on this machine, or not the version that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One RabbitMQ server and the Erlang that runs it.

    Attributes:
        version: RabbitMQ's version.
        root: The root of the file system that it was installed into, ``None`` for this machine's.
        home: The folder that has ``sbin``, ``plugins`` and ``escript``.
        erl: The ``erl`` program.
        epmd: The ``epmd`` program.
        erl_call: The ``erl_call`` program, ``None`` where Erlang came without it.
    """

    version: str
    root: Path | None = None
    home: Path
    erl: Path
    epmd: Path
    erl_call: Path | None

    def seen_from_inside(self, path: Path) -> Path:
        """Return the path that a program which runs in our root has for a path of this machine."""
        if self.root is None or not path.is_relative_to(self.root):
            return path
        return Path("/") / path.relative_to(self.root)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The ports of one node, all of them on the loopback interface."""

    amqp: int
    tls: int
    distribution: int
    epmd: int

    def all_free(self, *, but_epmd: bool = False) -> bool:
        """Tell whether nobody listens on any of them, epmd's left out or not."""
        ports = [self.amqp, self.tls, self.distribution]
        return all(map(port_is_free, ports if but_epmd else [*ports, self.epmd]))


@dataclass(frozen=True, kw_only=True)
class Account:
    """The user that runs a node."""

    uid: int
    gid: int


def find_installation(version: str | None) -> Installation:
    """Find a RabbitMQ server on this machine: what is installed, then the roots in the cache.

    Args:
        version: The version it must have, or how it must begin (``4.3``); ``None`` takes what is
            installed.

    Raises:
        NotInstalledError: When it is missing, incomplete or of another version.
    """
    roots = () if version is None else installed_roots()
    found = [installation for root in (None, *roots) for installation in _installations(root)]
    for installation in found:
        if version is None or f"{installation.version}.".startswith(f"{version}."):
            return installation
    advice = f"Install it, or put its root file system into {roots_folder()}."
    if version is not None and found:
        raise NotInstalledError(
            f"RabbitMQ {version} cannot start",
            reason="what is installed is " + ", ".join(one.version for one in found),
            advice=f"{advice} version=None takes what is there.",
        )
    missing = "erl" if _find_program("rabbitmq-server", near="../plugins") else "rabbitmq-server"
    raise NotInstalledError(
        "a private RabbitMQ node cannot start",
        reason=f"{missing} is not installed",
        advice="Install RabbitMQ; on Debian: apt-get install rabbitmq-server.",
    )


def roots_folder() -> Path:
    """Say where root file systems with other versions of RabbitMQ are looked for."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "aioworkq" / "rabbitmq"


def installed_roots() -> list[Path]:
    """List the root file systems in :func:`roots_folder`. Hidden ones are not finished."""
    folder = roots_folder()
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if not entry.name.startswith("."))


def _installations(root: Path | None) -> Iterator[Installation]:
    """Find the servers of one root file system: one of each version."""
    server = _find_program("rabbitmq-server", near="../plugins", root=root)
    erl = _find_program("erl", root=root)
    if server is None or erl is None:
        return
    home = server.parent.parent
    for entry in home.glob("plugins/rabbit-[0-9]*"):
        yield Installation(
            version=entry.name.removeprefix("rabbit-").removesuffix(".ez"),
            root=root,
            home=home,
            erl=erl,
            epmd=_erlang_program("epmd", erl=erl) or Path("epmd"),
            erl_call=_erlang_program("erl_call", erl=erl),
        )


def _find_program(name: str, *, near: str = ".", root: Path | None = None) -> Path | None:
    """Find a program on ``PATH`` or in :data:`PLACES`; links are followed, wrappers passed by.

    In another root there is no ``PATH``.
    """
    places = (None, *PLACES) if root is None else tuple(f"{root}{place}" for place in PLACES)
    for folder in places:
        found = shutil.which(name, path=folder)
        if found is not None:
            program = Path(found).resolve()
            if program.name == name and (program.parent / near).exists():
                return program
    return None


def _erlang_program(name: str, *, erl: Path) -> Path | None:
    """Find a program that came with this Erlang."""
    return next(erl.parent.parent.glob(f"erts-*/bin/{name}"), None)


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on this port of the loopback interface now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Choose a free port below the ephemeral range.

    No outgoing connection can then take the port of a stopped node that wants it back, and
    nobody who polls the port can connect to itself.
    """
    for _ in range(1000):
        port = 20_000 + secrets.randbelow(12_000)
        if port_is_free(port):
            return port
    raise NodeError(
        "a private RabbitMQ node cannot start",
        reason="no free port was found between 20000 and 32000",
        advice="Stop some of the servers on this machine.",
    )


def choose_ports(*, epmd: int | None = None) -> Ports:
    """Choose the ports of a new node. They are not reserved: a race may still lose one.

    Args:
        epmd: The port of an epmd that is there already, ``None`` for one of the node's own.
    """
    ports = {name: free_port() for name in ("amqp", "tls", "distribution")}
    return Ports(**ports, epmd=epmd or free_port())


def account() -> Account:
    """Say as whom a node runs: as ourselves, unless we are root."""
    if os.geteuid() != 0:
        return Account(uid=os.geteuid(), gid=os.getegid())
    for name in ("rabbitmq", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return Account(uid=user.pw_uid, gid=user.pw_gid)
    return Account(uid=65534, gid=65534)


def new_folder_path(account: Account) -> Path:
    """Choose the path of a new folder, one that the account reaches. Nothing is created yet."""
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 - a new name
        path = Path(base).resolve()
        # RabbitMQ's shell scripts do not quote paths.
        if re.fullmatch(r"[\w./+-]+", str(path)) and _is_reachable(path, account=account):
            return path / f"aioworkq-{secrets.token_hex(6)}"
    raise NodeError(
        "a private RabbitMQ node cannot start",
        reason=f"the user that runs it cannot reach {tempfile.gettempdir()}",
        advice="Set TMPDIR to a folder that everybody may enter, without spaces in its path.",
    )


def _is_reachable(path: Path, *, account: Account) -> bool:
    """Tell whether we may write to this folder and the account may walk down to it."""
    steps = (path, *path.parents)
    is_ours = account.uid == os.geteuid()
    return os.access(path, os.W_OK | os.X_OK) and (
        is_ours or all(step.stat().st_mode & stat.S_IXOTH for step in steps)
    )


def build_folder(
    path: Path,
    *,
    installation: Installation,
    account: Account,
    ports: Ports,
    config: Mapping[str, str],
    plugins: Sequence[str],
    tls_files: Mapping[str, str | os.PathLike[str]],
    cookie: str,
) -> None:
    """Create a node's folder: cookie, configuration, data, and a slim home to boot from.

    Booting RabbitMQ is mostly loading code that lies on its path: a ``plugins`` folder with only
    what is needed halves the time (3.10.8 on two cores: 5.3 to 2.7 s).

    Args:
        path: The folder; it must not exist.
        installation: The server to run.
        account: Who is to own the folder.
        ports: Where to listen.
        config: Lines of ``rabbitmq.conf`` that win over ours.
        plugins: The plugins to enable.
        tls_files: PEM files by the last part of their key, ``ssl_options.<key>``.
        cookie: What nodes and tools that may speak to each other have in common.
    """
    path.mkdir(mode=0o700)
    slim, inside = path / "home", installation.seen_from_inside
    for folder in ("data", "home", "home/plugins"):
        (path / folder).mkdir()
    for folder in ("sbin", "escript"):
        (slim / folder).symlink_to(inside(installation.home / folder))
    for plugin in _needed_plugins(installation.home / "plugins", wanted=plugins):
        (slim / "plugins" / plugin.name).symlink_to(inside(plugin))
    lines = DEFAULTS | {"listeners.tcp.1": f"{HOST}:{ports.amqp}"}
    if tls_files:
        lines |= {"listeners.ssl.1": f"{HOST}:{ports.tls}", "ssl_options.verify": "verify_none"}
    for key, file in tls_files.items():
        copy = path / f"{key}.pem"
        copy.write_bytes(Path(file).read_bytes())
        lines[f"ssl_options.{key}"] = str(copy)
    (path / COOKIE).write_text(cookie)
    (path / "rabbitmq.conf").write_text(
        "".join(f"{key} = {value}\n" for key, value in (lines | dict(config)).items())
    )
    (path / "rabbitmq-env.conf").touch()
    (path / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
    for entry in (path, *path.rglob("*")):
        os.lchown(entry, account.uid, account.gid)
        if not entry.is_symlink() and entry.is_file():
            entry.chmod(0o400)


def joining(founder: str, name: str) -> dict[str, str]:
    """Return the lines of configuration by which a new node joins the cluster of another one.

    Args:
        founder: The name of a node that runs.
        name: The new node's name: RabbitMQ 4 wants to find itself among those that it discovers.
    """
    key = "cluster_formation.classic_config.nodes"
    return {
        "cluster_formation.peer_discovery_backend": "classic_config",
        f"{key}.1": f"{founder}@localhost",
        f"{key}.2": f"{name}@localhost",
    }


def _needed_plugins(folder: Path, *, wanted: Sequence[str]) -> Iterator[Path]:
    """Walk the ``applications`` lists from RabbitMQ and the wanted plugins down."""
    available = {entry.name.split("-")[0]: entry for entry in folder.iterdir()}
    if missing := [name for name in wanted if name not in available]:
        raise NodeError(
            "a private RabbitMQ node cannot start",
            reason=f"there is no plugin {', '.join(missing)} in {folder}",
            advice="Correct plugins=, or install the plugin.",
        )
    waiting, seen = ["rabbit", "rabbitmq_prelaunch", *wanted], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in available:  # what is not here belongs to Erlang
            continue
        seen.add(name)
        yield available[name]
        try:
            text = (available[name] / "ebin" / f"{name}.app").read_text()
        except OSError:  # packed into one file: it cannot be read so simply, so take everything
            waiting.extend(available)
            continue
        for applications in re.findall(r"applications\s*,\s*\[([^\]]*)\]", text):
            waiting.extend(re.findall(r"\w+", applications))


def environment(
    path: Path, *, installation: Installation, ports: Ports, name: str
) -> dict[str, str]:
    """Build the whole environment of a node and of its tools: nothing is inherited."""
    programs = dict.fromkeys(
        (str(installation.seen_from_inside(installation.erl.parent)), *PLACES[1:])
    )
    return {
        "PATH": ":".join(programs),
        "HOME": str(path),
        "LANG": "C.UTF-8",
        "ERL_EPMD_PORT": str(ports.epmd),
        "ERL_EPMD_ADDRESS": HOST,
        "ERL_CRASH_DUMP": str(path / "erl_crash.dump"),
        "RABBITMQ_SCRIPTS_DIR": str(path / "home" / "sbin"),
        "RABBITMQ_NODENAME": f"{name}@localhost",
        "RABBITMQ_NODE_PORT": str(ports.amqp),
        "RABBITMQ_NODE_IP_ADDRESS": HOST,
        "RABBITMQ_DIST_PORT": str(ports.distribution),
        "RABBITMQ_MNESIA_BASE": str(path / "data"),
        "RABBITMQ_MNESIA_DIR": str(path / "data" / "node"),
        "RABBITMQ_LOG_BASE": str(path),
        "RABBITMQ_LOGS": str(path / "node.log"),
        "RABBITMQ_CONFIG_FILE": str(path / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(path / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(path / "rabbitmq-env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(path / "enabled_plugins"),
        "RABBITMQ_PLUGINS_EXPAND_DIR": str(path / "expanded"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(path / "generated"),
        "RABBITMQ_FEATURE_FLAGS_FILE": str(path / "feature_flags"),
        "RABBITMQ_PID_FILE": str(path / "node.pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
        # The script then execs Erlang instead of staying its parent: the pid is the node's.
        "RUNNING_UNDER_SYSTEMD": "true",
    }
