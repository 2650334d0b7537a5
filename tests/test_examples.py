"""Every example runs as a user runs it, as a script, and prints what it is there to show."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

EXAMPLES = Path(__file__).parent.parent / "examples"
TIMEOUT = 90.0

OUTPUT = {
    "quickstart.py": "To ada@example.org: Hello\n",
    "fair_dispatch.py": """\
8 messages are confirmed.
One worker handled 1 message, the other one 7.
""",
    "killed_worker.py": """\
Ann works on 'a report', attempt 1.
Ann was killed by signal 9.
Bob works on 'a report', attempt 2.
Bob is done.
Bob exited with status 0.
""",
    "fastapi_app.py": """\
GET /ready: 200
POST /names/Ada: 202
Hello Ada!
""",
    "beside_other_tasks.py": """\
The worker is ready: True
Handled 'a report'. The clock ticked meanwhile: True
The worker and the clock have ended.
""",
    "thread_handler.py": """\
6051f76ea51a40fe, derived in a thread
852f6147d48a974e, derived in a thread
9eea97ab5a0dcb48, derived in a thread
""",
    "confirms.py": """\
1 message is confirmed.
999 messages are confirmed, 0 failed.
Returned: 312 NO_ROUTE
1000 messages are handled.
""",
    "handle_errors.py": """\
Ada is paid at attempt 1.
Bob is paid at attempt 2.
Dead: {"to":"Sam","amount":-1}: a negative amount
Dead: {"to":"Eve","amount":30}: gave up after 3 attempts
Dead: {"to":"nobody"}: the body is not a valid Payment: Object missing required field `amount`. \
Publish with the same Queue that the handler is registered for.
""",
    "batches.py": """\
Stored 5 of 5.
Stored 4 of 5.
Stored 2 of 2.
11 rows
Dead: {"sensor":"roof","celsius":-300.0}: -300.0 degrees cannot be
""",
    "dead_letters.py": """\
Ada was given up after 1 attempt: failed: NotImplementedError
Replayed: 1
Hello Ada!
""",
    "delay.py": """\
the first one
the second one
the last one
""",
    "stop.py": """\
The first worker stops.
0.2 s of work are done, attempt 1.
3.0 s of work are cancelled, attempt 1.
The second worker stops.
3.0 s of work are done, attempt 1.
""",
    "several_hosts.py": """\
Handled 'a report'
The producer is connected: True
The worker is ready: True
""",
}

OUTPUT_WITH_OWN_NODE = {
    "broker_restart.py": """\
3 messages are confirmed.
RabbitMQ is down.
RabbitMQ is up.
1 message more is confirmed.
Handled: [0, 1, 2, 3]
""",
    "tls.py": """\
Handled 'a secret'
Without the authority: the server's certificate was refused: unable to get local issuer certificate
""",
}

TESTS = {"test_handlers.py": 8, "test_app.py": 1}
"""Examples that are tests, and how many pass."""

TOLD_ELSEWHERE = {"_broker.py", "demo.py", "new_task.py", "worker.py", *TESTS}


def environment(url: str | None) -> dict[str, str]:
    """Our environment, with AMQP_URL set or unset."""
    env = {name: value for name, value in os.environ.items() if name != "AMQP_URL"}
    return env if url is None else env | {"AMQP_URL": url}


def run(*arguments: str | Path, url: str | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(url),
        cwd=cwd,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def started(*arguments: str | Path, url: str | None) -> Generator[subprocess.Popen[str]]:
    """Start Python with these arguments, its output and errors in one pipe."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(url),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)


def read_until(pipe: IO[str] | None, pattern: str) -> re.Match[str]:
    """Read lines until one matches."""
    lines: list[str] = []
    for line in pipe or ():
        lines.append(line)
        found = re.search(pattern, line)
        if found is not None:
            return found
    pytest.fail(f"nothing matched {pattern!r} in {lines}")


def test_every_example_is_run_here() -> None:
    """There is no example without a test."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == (
        OUTPUT.keys() | OUTPUT_WITH_OWN_NODE.keys() | TOLD_ELSEWHERE
    )


@pytest.mark.parametrize("name", OUTPUT)
def test_an_example_prints_the_same_each_time(name: str, url: str, tmp_path: Path) -> None:
    """An example prints what it shows, the first time and again on the same broker."""
    for _ in range(2):
        done = run(EXAMPLES / name, url=url, cwd=tmp_path)
        assert (done.stdout, done.returncode) == (OUTPUT[name], 0), done.stderr


@pytest.mark.rabbitmq
@pytest.mark.parametrize("name", OUTPUT_WITH_OWN_NODE)
def test_an_example_that_starts_its_own_node(name: str, tmp_path: Path) -> None:
    """An example that does things to its broker prints what it shows."""
    done = run(EXAMPLES / name, url=None, cwd=tmp_path)
    assert (done.stdout, done.returncode) == (OUTPUT_WITH_OWN_NODE[name], 0), done.stderr


@pytest.mark.rabbitmq
def test_an_example_runs_without_amqp_url(tmp_path: Path) -> None:
    """An example starts a private node when AMQP_URL is not set."""
    done = run(EXAMPLES / "quickstart.py", url=None, cwd=tmp_path)
    assert (done.stdout, done.returncode) == (OUTPUT["quickstart.py"], 0), done.stderr


def test_worker_and_new_task_talk_to_each_other(url: str, tmp_path: Path) -> None:
    """What new_task.py publishes in one terminal, worker.py handles in another one."""
    with started(EXAMPLES / "worker.py", url=url) as worker:
        read_until(worker.stdout, r"\[\*\] Waiting for messages")
        for text, arguments in {"Hello.": ["Hello."], "Hello World!": []}.items():
            new_task = run(EXAMPLES / "new_task.py", *arguments, url=url, cwd=tmp_path)
            assert (new_task.stdout, new_task.returncode) == (f" [x] Published {text!r}\n", 0)
            read_until(worker.stdout, re.escape(f" [x] Received {text!r}"))
            read_until(worker.stdout, r" \[x\] Done")
        worker.send_signal(signal.SIGINT)
        assert worker.wait(TIMEOUT) == 0


@pytest.mark.rabbitmq
def test_worker_says_where_its_private_node_is(tmp_path: Path) -> None:
    """Without AMQP_URL, worker.py prints the command for the other terminal, and cleans up."""
    with started(EXAMPLES / "worker.py", url=None) as worker:
        command = read_until(worker.stdout, r"AMQP_URL=(amqp://\S+:(\d+)/) python \S+/new_task.py")
        new_task = run(EXAMPLES / "new_task.py", "Hello", url=command[1], cwd=tmp_path)
        assert new_task.returncode == 0, new_task.stderr
        read_until(worker.stdout, r" \[x\] Done")
        worker.send_signal(signal.SIGINT)
        assert worker.wait(TIMEOUT) == 0
    wait_until_closed(int(command[2]))


def wait_until_closed(port: int) -> None:
    """Wait until nobody listens at this port."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        except OSError:
            pass
    pytest.fail(f"somebody listens at port {port} still")


def test_the_fastapi_application_is_served(url: str) -> None:
    """The FastAPI application runs under uvicorn, and its worker ends with it."""
    arguments = ("-m", "uvicorn", "--app-dir", EXAMPLES, "--port", "0", "fastapi_app:app")
    with started(*arguments, url=url) as server:
        address = read_until(server.stdout, r"running on (http://\S+)")[1]
        assert httpx.get(f"{address}/ready", timeout=30).status_code == httpx.codes.OK
        assert httpx.post(f"{address}/names/Ada", timeout=30).status_code == httpx.codes.ACCEPTED
        server.send_signal(signal.SIGTERM)
        read_until(server.stdout, "Application shutdown complete")


@pytest.mark.rabbitmq
@pytest.mark.parametrize("name", TESTS)
def test_the_tests_of_an_example_pass(name: str, tmp_path: Path) -> None:
    """The tests of handlers pass in a project that has no configuration of its own."""
    shutil.copy(EXAMPLES / name, tmp_path)
    arguments = ("-m", "pytest", "-q", "--rootdir", tmp_path, "-c", os.devnull)
    done = run(*arguments, url=None, cwd=tmp_path)
    assert f"{TESTS[name]} passed" in done.stdout, done.stdout + done.stderr


def check_demo(output: str) -> None:
    """Check what the demonstration shows in the end, and that there was something to show."""
    digits = "".join(re.findall(r"^  ([1-3]+)$", output, re.MULTILINE))
    assert {*digits} == {"1", "2", "3"}
    assert re.search(r"SIGKILL to worker 2 \(process \d+\) amid \d+", output)
    assert re.search(r"message \d+ was finished by worker [13] at attempt 2", output)
    assert "finished by nobody" not in output
    duplicates = len(digits) - 180
    assert output.endswith(
        f"""
published   180 confirmed
handled     180 distinct
lost          0
duplicates {duplicates:4}
""",
    )


@pytest.mark.rabbitmq
def test_the_demonstration_loses_nothing(tmp_path: Path) -> None:
    """The demonstration kills a worker, and everything is handled all the same."""
    done = run(EXAMPLES / "demo.py", url=None, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_demo(done.stdout)


def test_the_demonstration_runs_on_any_broker(url: str, tmp_path: Path) -> None:
    """The demonstration runs on the broker at AMQP_URL, the first time and again."""
    for _ in range(2):
        done = run(EXAMPLES / "demo.py", url=url, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        check_demo(done.stdout)
