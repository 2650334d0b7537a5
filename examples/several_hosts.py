"""Give several hosts of one cluster: when one is down, the next one is tried."""

import asyncio

from _broker import broker_url

from aioworkq import Producer, Queue, Worker

reports = Queue("several_hosts", str)


async def main(url: str) -> None:
    hosts = ["amqp://guest:guest@127.0.0.1:1/", url]  # nobody listens at the first one
    worker = Worker(hosts)
    handled = asyncio.Event()

    @worker.handler(reports)
    async def work(text: str) -> None:
        print(f"Handled {text!r}")
        handled.set()

    async with worker, Producer(hosts) as producer:
        await producer.publish(reports, "a report")
        await handled.wait()
        print(f"The producer is connected: {producer.statistics().is_connected}")
        print(f"The worker is ready: {worker.is_ready}")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
