"""Handle messages with a plain function: it runs in a thread, the event loop goes on."""

import asyncio
import hashlib
import threading

from _broker import broker_url

from aioworkq import Producer, Queue, Worker

passwords = Queue("thread_handler", str)


async def main(url: str) -> None:
    worker = Worker(url)
    loop = asyncio.get_running_loop()
    results: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()

    @worker.handler(passwords, concurrency=2)
    def derive_key(password: str) -> None:
        key = hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt", 500_000).hex()
        in_loop = threading.current_thread() is threading.main_thread()
        loop.call_soon_threadsafe(results.put_nowait, (key[:16], in_loop))

    async with worker, Producer(url) as producer:
        await producer.publish_many(passwords, ["one", "two", "three"])
        keys = [await results.get() for _ in range(3)]
    for key, in_loop in sorted(keys):
        print(f"{key}, derived in {'the event loop' if in_loop else 'a thread'}")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
