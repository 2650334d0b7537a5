"""The ledger: whatever fails, is dropped, stopped and delayed, nothing confirmed is gone.

Random programs of publications, handler results, faults, stops and time run on the memory broker
with the production code above it. In the end every confirmed message was handled or is dead.
Without a fault that may duplicate, it is exactly one of both, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aioworkq import (
    ConnectionLostError,
    Delivery,
    MemoryBroker,
    NotConfirmedError,
    OutcomeUnknownError,
    Producer,
    Queue,
    Reject,
    RetryLater,
    RetryPolicy,
    UnroutableError,
    Worker,
)
from aioworkq.memory.version import SEMANTICS

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aioworkq.memory.connection import Owner
    from aioworkq.memory.version import Version

RESULTS = ["ok", "fail", "later", "later uncounted", "reject", "block"]
PLANS = st.lists(st.lists(st.sampled_from(RESULTS), max_size=4), min_size=1, max_size=3)
"""What the handler does at the starts of some messages; afterwards it succeeds."""
ATTEMPTS = 3
PATIENCE = 60.0


class _Complaints(logging.Handler):
    """Collects what the library reports as its own defect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "please report" in text or record.name == "asyncio":
            self.found.append(text)


class Ledger(RuleBasedStateMachine):
    """One broker, one queue, a producer, and up to two workers."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.complaints = _Complaints()
        for name in ("aioworkq", "asyncio"):
            logging.getLogger(name).addHandler(self.complaints)
        self.tasks: dict[int, asyncio.Task[str]] = {}
        self.plans: dict[int, list[str]] = {}
        self.starts: Counter[int] = Counter()
        self.successes: Counter[int] = Counter()
        self.workers: list[tuple[Worker, asyncio.Task[None]]] = []
        self.faults = contextlib.ExitStack()
        self.has_fault = self.may_duplicate = False
        self.is_released = False
        self.blocked: set[asyncio.Event] = set()

    def go(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    @initialize(
        version=st.sampled_from(sorted(SEMANTICS)),
        kind=st.sampled_from(["quorum", "classic"]),
        retry=st.sampled_from([None, RetryPolicy(attempts=ATTEMPTS, first=10)]),
        prefetch=st.sampled_from([0, 1, 10]),
    )
    def begin(
        self,
        version: str,
        kind: Literal["quorum", "classic"],
        retry: RetryPolicy | None,
        prefetch: int,
    ) -> None:
        self.broker = MemoryBroker(version=cast("Version", version), clock="virtual")
        self.queue = Queue("q", int, type=kind)
        self.retry = retry
        self.producer = Producer(self.broker, timeout=3600)
        self.go(self.producer.start())
        if prefetch:
            self.start_worker(prefetch)

    # What happens

    @rule(plans=PLANS, delay=st.sampled_from([None, None, 1.0, 60.0]))
    def publish(self, plans: list[list[str]], delay: float | None) -> None:
        for plan in plans:
            number = len(self.plans)
            self.plans[number] = plan
            work = self.producer.publish(self.queue, number, delay=delay)
            self.tasks[number] = self.loop.create_task(work)
        self.go(self.broker.settle())

    @precondition(lambda self: len(self.workers) < 2)
    @rule(prefetch=st.sampled_from([1, 3, 10]))
    def start_worker(self, prefetch: int) -> None:
        worker = Worker(self.broker, timeout=3600)
        worker.handler(
            self.queue,
            concurrency=2,
            prefetch_count=prefetch,
            attempts=ATTEMPTS,
            retry=self.retry,
        )(self.handle)
        self.workers.append((worker, self.loop.create_task(worker.run())))
        self.go(self.broker.settle())

    async def handle(self, number: int, delivery: Delivery) -> None:
        plan, start = self.plans[number], self.starts[number]
        self.starts[number] += 1
        result = plan[start] if start < len(plan) else "ok"
        if result == "block" and not self.is_released:
            event = asyncio.Event()
            self.blocked.add(event)
            await event.wait()
        match result:
            case "fail":
                raise LookupError
            case "later":
                raise RetryLater(30)
            case "later uncounted":
                raise RetryLater(30, counts=False)
            case "reject":
                raise Reject("planned")
            case _:
                self.successes[number] += 1

    @precondition(lambda self: self.workers and not self.has_fault)
    @rule(grace=st.sampled_from([0.0, 3600.0]))
    def stop_worker(self, grace: float) -> None:
        was_released = self.is_released
        if grace:
            self.is_released = True  # what the grace period is for must be able to end
            self.release()
        worker, running = self.workers.pop(0)
        worker.stop(grace=grace)
        self.go(self.wait_for({running}))
        running.result()
        self.is_released = was_released

    async def wait_for(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Wait for tasks, and let the pauses that they are in pass."""
        while left := {task for task in tasks if not task.done()}:
            await self.broker.settle()
            pause = self.broker.clock.next_pause()
            if pause is not None:
                await self.broker.advance(max(0.0, pause - self.broker.clock.time()))
            else:
                await asyncio.wait(left, timeout=0.01)

    @rule(seconds=st.sampled_from([0.1, 5.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.go(self.broker.advance(seconds))

    @rule()
    def release(self) -> None:
        for event in self.blocked:
            event.set()
        self.blocked.clear()
        self.go(self.broker.settle())

    @rule(owner=st.sampled_from([None, "producer", "worker"]))
    def drop_connections(self, owner: Owner | None) -> None:
        self.may_duplicate = True
        self.broker.drop_connections(owner)

    @rule(fault=st.sampled_from(["lose confirm", "lose ack"]))
    def lose_next(self, fault: Literal["lose confirm", "lose ack"]) -> None:
        self.may_duplicate = True
        self.broker.fail_next(fault)

    @rule(queue=st.sampled_from(["q", "q.dead"]), times=st.integers(1, 3))
    def refuse_next(self, queue: str, times: int) -> None:
        self.broker.fail_next("refuse publish", queue=queue, times=times)

    @precondition(lambda self: "q" in self.broker.node.queues)
    @rule()
    def cancel_consumers(self) -> None:
        if self.broker.node.queues["q"].takers:
            self.may_duplicate = True
            self.broker.cancel_consumers(self.queue)

    @precondition(lambda self: not self.has_fault)
    @rule(fault=st.sampled_from(["alarm", "outage"]))
    def begin_fault(self, fault: str) -> None:
        self.has_fault = True
        if fault == "outage":
            self.may_duplicate = True
            self.faults.enter_context(self.broker.outage())
        else:
            self.faults.enter_context(self.broker.alarm())

    @precondition(lambda self: self.has_fault)
    @rule()
    def end_fault(self) -> None:
        self.has_fault = False
        self.faults.close()
        self.go(self.broker.settle())

    @rule(data=st.data())
    def cancel_a_publication(self, data: st.DataObject) -> None:
        pending = sorted(number for number, task in self.tasks.items() if not task.done())
        if pending:
            self.tasks[data.draw(st.sampled_from(pending))].cancel()
            self.go(self.broker.settle())

    # What must be true in the end

    def teardown(self) -> None:
        try:
            if hasattr(self, "broker"):
                self.finish()
                self.check()
        finally:
            for name in ("aioworkq", "asyncio"):
                logging.getLogger(name).removeHandler(self.complaints)
            self.go(self.retrieve())
            self.loop.close()

    async def retrieve(self) -> None:
        """Look at every outcome, so that asyncio does not report it as never seen."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    def finish(self) -> None:
        """End what lasts, and work until nothing is left. Planned faults still happen."""
        self.faults.close()
        self.has_fault = False
        self.is_released = True
        self.release()
        self.start_worker(10) if not self.workers else None
        for _ in range(50):
            self.go(self.broker.advance(200))
            if all(task.done() for task in self.tasks.values()) and not self.left():
                break
        self.go(self.wait_for(set(self.tasks.values())))
        while self.workers:
            self.stop_worker(0.0)
        self.go(self.producer.close())

    def left(self) -> dict[str, int]:
        """Return the queues that have messages, but for the dead-letter queue."""
        queues = self.broker.node.queues.values()
        counts = {queue.name: len(queue) + queue.unacked for queue in queues}
        return {name: count for name, count in counts.items() if count and name != "q.dead"}

    def check(self) -> None:
        assert self.complaints.found == []
        assert self.left() == {}
        dead = Counter(self.broker.dead(self.queue))
        for number, task in self.tasks.items():
            places = (self.successes[number] > 0) + (dead[number] > 0)
            try:
                task.result()
            except (NotConfirmedError, UnroutableError, ConnectionLostError):
                assert not places
                assert not self.starts[number]
            except (OutcomeUnknownError, asyncio.CancelledError):
                pass
            else:
                assert places, f"message {number} is lost"
                if not self.may_duplicate:
                    assert self.successes[number] + dead[number] == 1


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_the_copy_of_a_replaced_message_is_not_taken_for_done() -> None:
    """A suspect was replaced by a copy for a trial, on a connection that was then lost.

    The copy was handed to another worker, which gave it back: here it was acked, and lost.
    """
    ledger = Ledger()
    ledger.begin("3.10", "quorum", RetryPolicy(attempts=ATTEMPTS, first=10), 1)
    ledger.start_worker(3)
    ledger.refuse_next("q.dead", 1)
    ledger.publish([[]], None)
    ledger.publish([["fail"] * 4, ["reject", "fail", "block"]], 1.0)
    ledger.pass_time(5.0)
    ledger.lose_next("lose confirm")
    ledger.refuse_next("q.dead", 2)
    ledger.pass_time(100.0)
    ledger.cancel_consumers()
    ledger.teardown()
