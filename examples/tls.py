"""Connect by TLS, with an authority of your own, to a private RabbitMQ that this script starts."""

import asyncio
import ssl
from pathlib import Path
from tempfile import TemporaryDirectory

import trustme

from aioworkq import ConnectionLostError, Producer, Queue, Worker
from aioworkq.testing import RabbitMQ, TLSFiles

texts = Queue("tls", str)


async def talk(url: str, ssl_context: ssl.SSLContext) -> None:
    worker = Worker(url, ssl_context=ssl_context)
    handled = asyncio.Event()

    @worker.handler(texts)
    async def work(text: str) -> None:
        print(f"Handled {text!r}")
        handled.set()

    async with worker, Producer(url, ssl_context=ssl_context) as producer:
        await producer.publish(texts, "a secret")
        await handled.wait()


async def main() -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    with TemporaryDirectory() as folder:
        ca, cert, key = (Path(folder) / name for name in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(ca)
        certificate.cert_chain_pems[0].write_to_path(cert)
        certificate.private_key_pem.write_to_path(key)

        async with RabbitMQ(tls=TLSFiles(certfile=cert, keyfile=key)) as node:
            await talk(node.tls_url, ssl.create_default_context(cafile=ca))
            try:
                await talk(node.tls_url, ssl.create_default_context())
            except ConnectionLostError as exc:
                print(f"Without the authority: {exc.reason}")


if __name__ == "__main__":
    asyncio.run(main())
