"""What a client may be given in place of a URL."""

from __future__ import annotations

import ssl

import pytest

from aioworkq import DeadLetters, MemoryBroker, Producer, Queue, Worker


async def test_a_url_names_a_broker_of_the_process() -> None:
    """memory://name is one broker, wherever it is written."""
    queue = Queue("q", int)
    async with Producer("memory://one-of-the-process") as producer:
        await producer.publish(queue, 1)
    broker = MemoryBroker.named("one-of-the-process")
    assert broker.published(queue) == [1]
    assert MemoryBroker.named("another").counts(queue) == (0, 0)


async def test_a_named_broker_is_made_with_options() -> None:
    """A broker that is made with a name is what the URL means from then on."""
    broker = MemoryBroker(name="with options", version="3.10")
    async with Producer("memory://with options") as producer:
        await producer.publish("q", 1)
        assert broker.counts("q").ready == 1
        with pytest.raises(ValueError, match="'with options' in use: take another name"):
            MemoryBroker(name="with options")
    assert MemoryBroker(name="with options").counts("q").ready == 0


@pytest.mark.parametrize(
    "url", ["memory://", "memory:name", "memory://name/vhost", "memory://name?clock=virtual"]
)
def test_a_url_is_a_name_and_nothing_else(url: str) -> None:
    """A memory URL that says more, or less, than a name is refused."""
    with pytest.raises(ValueError, match="not memory://name, a name and nothing else"):
        Producer(url)


def test_a_list_of_hosts_has_no_memory_in_it() -> None:
    """A memory broker is no host of a cluster."""
    with pytest.raises(ValueError, match="give that one alone"):
        Worker(["amqp://localhost/", "memory://name"])


def test_a_memory_broker_has_no_tls() -> None:
    """ssl_context with a memory broker is refused."""
    context = ssl.create_default_context()
    with pytest.raises(ValueError, match="has no TLS"):
        Producer(MemoryBroker(), ssl_context=context)
    with pytest.raises(ValueError, match="has no TLS"):
        DeadLetters("memory://name", "q", ssl_context=context)


def test_versions_and_clocks_are_known() -> None:
    """A version or a clock that does not exist is refused."""
    with pytest.raises(ValueError, match=r"'5.0': the memory broker can be '3.10', '4.0', '4.3'"):
        MemoryBroker(version="5.0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it is 'real' or 'virtual'"):
        MemoryBroker(clock="stopped")  # type: ignore[arg-type]
    assert repr(MemoryBroker(version="4.0")) == "<MemoryBroker as RabbitMQ 4.0>"
