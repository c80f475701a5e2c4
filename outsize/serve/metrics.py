"""An engine's counts for Prometheus, read when somebody asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outsize.serve.engine import Engine
from outsize.serve.request import State


class EngineMetrics(Collector):
    """`answered[status]` counts HTTP answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.answered: Counter[int] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        engine, totals = self._engine, self._engine.totals
        running = sum(sequence.state is State.RUNNING for sequence in list(engine.scheduler.sequences))
        for name, about, value in (
            ("sequences_running", "Sequences that hold pages", running),
            ("requests_waiting", "Sequences that hold none yet", engine.waiting),
            ("kv_pages", "Pages of keys and values", engine.pages.count),
            ("kv_pages_available", "Pages that nobody holds", engine.pages.available),
        ):
            yield GaugeMetricFamily(f"outsize_{name}", about, value)
        for name, about, value in (
            ("steps", "Engine steps", totals.steps),
            ("prompt_tokens", "Tokens of prompts taken in", totals.prompt_tokens),
            ("new_tokens", "Tokens generated", totals.new_tokens),
            ("preemptions", "Sequences that gave up their pages", engine.scheduler.preemptions),
        ):
            yield CounterMetricFamily(f"outsize_{name}", about, value)
        held = GaugeMetricFamily("outsize_bytes_held", "Bytes in the store", labels=["tier", "kind"])
        for (tier, kind), nbytes in list(engine.store.ledger.held.items()):
            held.add_metric([tier, kind], nbytes)
        yield held
        moved = CounterMetricFamily("outsize_bytes_moved", "Bytes moved", labels=["source", "target", "kind"])
        for way, nbytes in list(engine.store.ledger.moved.items()):
            moved.add_metric(list(way), nbytes)
        yield moved
        answered = CounterMetricFamily("outsize_http_answers", "HTTP answers", labels=["status"])
        for status, count in list(self.answered.items()):
            answered.add_metric([str(status)], count)
        yield answered
