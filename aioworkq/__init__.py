"""An asyncio work queue over RabbitMQ."""
