"""RabbitMQ through aio-pika: the only place that imports aio_pika, aiormq or pamqp."""

from aioworkq.amqp.connection import AmqpConnection

__all__ = ["AmqpConnection"]
