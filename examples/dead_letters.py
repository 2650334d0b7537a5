"""Look at messages that were given up, and publish them again once the mistake is corrected."""

import asyncio
from collections.abc import Awaitable, Callable

from _broker import broker_url

from aioworkq import DeadLetters, DeadMessage, Producer, Queue, Worker

names = Queue("dead_letters", str)


async def not_yet(_name: str) -> None:
    raise NotImplementedError("greeting is not written yet")


async def greet(name: str) -> None:
    print(f"Hello {name}!")


async def handle_one(url: str, function: Callable[[str], Awaitable[None]]) -> None:
    worker = Worker(url)
    started = asyncio.Event()

    @worker.handler(names, on_error="dead-letter")
    async def handle(name: str) -> None:
        started.set()
        await function(name)

    async with worker:
        await started.wait()


async def main(url: str) -> None:
    async with Producer(url) as producer:
        await producer.publish(names, "Ada")
    await handle_one(url, not_yet)

    def is_for_lack_of_code(letter: DeadMessage[str]) -> bool:
        print(f"{letter.body()} was given up after {letter.attempts} attempt: {letter.reason}")
        return letter.exception_type == "NotImplementedError"

    async with DeadLetters(url, names) as dead:
        print(f"Replayed: {await dead.replay(is_for_lack_of_code)}")
    await handle_one(url, greet)


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
