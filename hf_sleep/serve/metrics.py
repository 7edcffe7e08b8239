"""Metrics of a server, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from ..engine import SleepEvent

METHODS = ("GET", "POST", "PUT", "DELETE")


class Metrics:
    """Counters and gauges of one server.

    Args:
        queue_length: tells how many requests wait for the model.
    """

    def __init__(self, queue_length: Callable[[], int]):
        self.registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self._requests = Counter("hf_sleep_requests", "Requests answered.", labels, registry=self.registry)
        self._read = self._counter("tokens_read", "Tokens read, those of turns included.")
        self._generated = self._counter("tokens_generated", "Tokens of answers.")
        self._sleeps = self._counter("sleeps", "Sleeps, of every sequence.")
        self._asleep = self._counter("asleep_seconds", "Seconds of sleeping.")
        self._dropped = self._counter("dropped", "Requests dropped because their client was gone.")
        self._memories = self._gauge("memories_in_ram", "Memories in RAM.")
        self._bytes = self._gauge("memory_bytes", "Bytes of the memories in RAM.")
        self._gauge("queue_length", "Requests that wait for the model.").set_function(queue_length)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"hf_sleep_{name}", about, registry=self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"hf_sleep_{name}", about, registry=self.registry)

    def answered(self, method: str, path: str, status: int) -> None:
        """Count a request, by the path's pattern and not by what stands in it."""
        method = method if method in METHODS else "other"
        self._requests.labels(method, path, str(status)).inc()

    def used(self, read: int, generated: int) -> None:
        """Count tokens."""
        self._read.inc(read)
        self._generated.inc(generated)

    def slept(self, event: SleepEvent) -> None:
        """Count a sleep."""
        self._sleeps.inc()
        self._asleep.inc(event.seconds)

    def dropped(self) -> None:
        """Count a request whose client was gone."""
        self._dropped.inc()

    def hold(self, memories: int, num_bytes: int) -> None:
        """Note what RAM holds."""
        self._memories.set(memories)
        self._bytes.set(num_bytes)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)
