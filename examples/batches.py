"""Write readings into a database, many in one statement, and give up single ones."""

import asyncio
import queue
import sqlite3
from dataclasses import dataclass

from _broker import broker_url

from aioworkq import BatchError, DeadLetters, Outcome, Producer, Queue, Reject, Worker


@dataclass
class Reading:
    """What the queue carries."""

    sensor: str
    celsius: float


readings = Queue("readings", Reading)
ABSOLUTE_ZERO = -273.15


async def main(url: str) -> None:
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("CREATE TABLE reading (sensor TEXT, celsius REAL)")
    worker = Worker(url)
    batches: queue.SimpleQueue[int] = queue.SimpleQueue()

    @worker.batch_handler(readings, max_size=5, max_wait=0.5)
    def store(batch: list[Reading]) -> None:
        good = [one for one in batch if one.celsius >= ABSOLUTE_ZERO]
        with database:
            rows = [(one.sensor, one.celsius) for one in good]
            database.executemany("INSERT INTO reading VALUES (?, ?)", rows)
        print(f"Stored {len(good)} of {len(batch)}.")
        batches.put(len(batch))
        failures: dict[int, Outcome | Exception] = {
            position: Reject(f"{one.celsius} degrees cannot be")
            for position, one in enumerate(batch)
            if one not in good
        }
        if failures:
            raise BatchError(failures)

    celsius = [20.5, 21.0, 21.5, 22.0, 22.5, 23.0, -300.0, 23.5, 24.0, 24.5, 25.0, 25.5]
    async with Producer(url) as producer:
        await producer.publish_many(readings, [Reading("roof", one) for one in celsius])
    async with worker:
        left = len(celsius)
        while left:
            left -= await asyncio.to_thread(batches.get)
    print(database.execute("SELECT count(*) FROM reading").fetchone()[0], "rows")
    database.close()

    async with DeadLetters(url, readings) as dead:
        for letter in await dead.peek():
            print(f"Dead: {letter.message.body.decode()}: {letter.reason}")
        await dead.purge()


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
