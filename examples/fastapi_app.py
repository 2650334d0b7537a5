"""A worker and a producer inside a FastAPI application.

Serve it with ``uvicorn --app-dir examples fastapi_app:app``. Run as a script, it calls itself.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
from _broker import broker_url
from fastapi import FastAPI, Request, Response

from aioworkq import Producer, Queue, Worker

names = Queue("names", str)
url = broker_url()
worker = Worker(url)
greetings: asyncio.Queue[str] = asyncio.Queue()


@worker.handler(names)
async def greet(name: str) -> None:
    greetings.put_nowait(f"Hello {name}!")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with worker, Producer(url) as producer:
        app.state.producer = producer
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/names/{name}", status_code=202)
async def publish(name: str, request: Request) -> str:
    producer: Producer = request.app.state.producer
    return await producer.publish(names, name)


@app.get("/ready")
async def ready(response: Response) -> bool:
    response.status_code = 200 if worker.is_ready else 503
    return worker.is_ready


async def call_it() -> None:
    server = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=server, base_url="http://app") as client,
    ):
        print(f"GET /ready: {(await client.get('/ready')).status_code}")
        print(f"POST /names/Ada: {(await client.post('/names/Ada')).status_code}")
        print(await greetings.get())


if __name__ == "__main__":
    asyncio.run(call_it())
