"""Share work among processes, kill one in the middle of it, and count: nothing is lost.

This is what ``make demo`` runs: on a private RabbitMQ, or on the one at AMQP_URL. The exit status
is 1 when a message was lost. The worker processes are this script too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import aioworkq
from aioworkq import Delivery, Producer, Queue, Worker
from aioworkq.testing import NotInstalledError, RabbitMQ

MESSAGES = 180
WORKERS = 3
VICTIM = 2
DEADLINE = 30.0
ROW = 60


@dataclass
class Piece:
    """One piece of work; another run on the same broker has other pieces."""

    run: str
    number: int


pieces = Queue("demo", Piece)


def be_a_worker(url: str, run: str) -> None:
    """Handle pieces until SIGTERM, and tell the parent of each on standard output."""
    logging.disable(logging.WARNING)
    worker = Worker(url, name=f"demo worker {os.getpid()}")

    @worker.handler(pieces, concurrency=4)
    async def work(piece: Piece, delivery: Delivery) -> None:
        if piece.run == run:
            print("begin", piece.number, delivery.attempt, flush=True)
            await asyncio.sleep(random.uniform(0.1, 0.3))  # the work
            print("end", piece.number, delivery.attempt, flush=True)

    aioworkq.run(worker)


@dataclass
class Member:
    """One worker process, as its parent sees it."""

    number: int
    process: asyncio.subprocess.Process
    running: set[int] = field(default_factory=set[int])


@dataclass
class Tally:
    """What the workers told."""

    ends: Counter[int] = field(default_factory=Counter[int])
    killed_with: set[int] = field(default_factory=set[int])
    late: dict[int, str] = field(default_factory=dict[int, str])
    all_ended: asyncio.Event = field(default_factory=asyncio.Event)
    column: int = 0

    def note(self, member: Member, number: int, attempt: str) -> None:
        """Count the end of a handler, and show it."""
        self.ends[number] += 1
        if self.column == ROW:
            print()
            self.column = 0
        print(member.number if self.column else f"  {member.number}", end="", flush=True)
        self.column += 1
        if attempt != "1":
            self.late[number] = f"worker {member.number} at attempt {attempt}"
        if len(self.ends) == MESSAGES:
            self.all_ended.set()

    def note_kill(self, member: Member) -> None:
        """Show which messages a killed worker leaves unfinished."""
        self.killed_with = member.running
        pid, numbers = member.process.pid, ", ".join(map(str, sorted(member.running)))
        print(f"\n\n  SIGKILL to worker {member.number} (process {pid}) amid {numbers}\n")
        self.column = 0

    def sum_up(self, confirmed: int) -> bool:
        """Show the result, and return whether nothing was lost."""
        print("\n")
        for number in sorted(self.killed_with):
            print(f"  message {number} was finished by {self.late.get(number, 'nobody')}")
        lost = confirmed - len(self.ends)
        print()
        print(f"published  {confirmed:4} confirmed")
        print(f"handled    {len(self.ends):4} distinct")
        print(f"lost       {lost:4}")
        print(f"duplicates {self.ends.total() - len(self.ends):4}")
        return lost == 0


async def watch(member: Member, tally: Tally) -> None:
    """Follow what one worker tells, to its end; kill the victim after a third of the work."""
    was_killed = False
    async for line in cast("asyncio.StreamReader", member.process.stdout):
        what, number, attempt = line.decode().split()
        if what == "begin":
            member.running.add(int(number))
        else:
            member.running.remove(int(number))
            tally.note(member, int(number), attempt)
        is_time = len(tally.ends) >= MESSAGES // 3
        if member.number == VICTIM and is_time and member.running and not was_killed:
            member.process.kill()
            was_killed = True
    if was_killed:
        tally.note_kill(member)
    await member.process.wait()


async def show(url: str) -> bool:
    """Show it all, and return whether nothing was lost."""
    run, tally = os.urandom(8).hex(), Tally()
    async with Producer(url) as producer:
        report = await producer.publish_many(
            pieces, (Piece(run, number) for number in range(MESSAGES))
        )
    print(f"{report.confirmed} messages are published and confirmed.")
    print(f"{WORKERS} worker processes share them. Each digit is a message done, by that worker:\n")
    members: list[Member] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(1, WORKERS + 1):
                arguments = (sys.executable, __file__, url, run)
                pipe = asyncio.subprocess.PIPE
                process = await asyncio.create_subprocess_exec(*arguments, stdout=pipe)
                members.append(Member(number, process))
                tasks.create_task(watch(members[-1], tally))
            with suppress(TimeoutError):
                await asyncio.wait_for(tally.all_ended.wait(), DEADLINE)
            for member in members:
                if member.process.returncode is None:
                    member.process.terminate()  # it drains, then exits
    finally:
        for member in members:
            if member.process.returncode is None:
                member.process.kill()
    return tally.sum_up(report.confirmed)


async def main() -> bool:
    began = time.monotonic()
    url = os.environ.get("AMQP_URL")
    if url:
        return await show(url)
    print("A private RabbitMQ starts.", flush=True)
    async with RabbitMQ() as node:
        print(f"RabbitMQ {node.version} runs, after {time.monotonic() - began:.1f} s.")
        return await show(node.url)


if __name__ == "__main__":
    if sys.argv[1:]:
        be_a_worker(*sys.argv[1:])
    else:
        try:
            sys.exit(0 if asyncio.run(main()) else 1)
        except NotInstalledError as exc:
            sys.exit(str(exc))
