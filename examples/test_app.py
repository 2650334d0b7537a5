"""Test a FastAPI application whose worker runs on a broker in memory.

Run it with ``pytest examples/test_app.py``.
"""
# ruff: noqa: S101 - assert is how tests speak

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI, Request

from aioworkq import MemoryBroker, Producer, Queue, Worker

pytestmark = pytest.mark.anyio

names = Queue("names", str)


def make_app(broker: str | MemoryBroker) -> FastAPI:
    worker = Worker(broker)
    greetings: list[str] = []

    @worker.handler(names)
    async def greet(name: str) -> None:
        greetings.append(f"Hello {name}!")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with worker, Producer(broker) as producer:
            app.state.producer = producer
            yield

    app = FastAPI(lifespan=lifespan)
    app.state.greetings = greetings

    @app.post("/names/{name}", status_code=202)
    async def publish(name: str, request: Request) -> str:
        producer: Producer = request.app.state.producer
        return await producer.publish(names, name, delay=60)

    return app


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_everybody_is_greeted_a_minute_later(memory_broker: MemoryBroker) -> None:
    app = make_app(memory_broker)
    server = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=server, base_url="http://app") as client,
    ):
        assert (await client.post("/names/Ada")).status_code == httpx.codes.ACCEPTED
        assert memory_broker.published(names) == ["Ada"]
        await memory_broker.advance(65)
        assert app.state.greetings == ["Hello Ada!"]
