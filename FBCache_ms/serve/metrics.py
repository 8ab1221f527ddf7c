"""What is counted. No prompt, no key and no job's name is in it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The server's metrics, in the names that GET /metrics has."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.answers = Counter("fbcache_requests", "Answers", ("method", "path", "status"), registry=registry)
        self.waiting = Gauge("fbcache_requests_waiting", "Requests in the queue", registry=registry)
        self.ready = Gauge("fbcache_painters_ready", "Drawing processes that are ready", registry=registry)
        self.pictures = Counter("fbcache_pictures", "Pictures that were drawn", registry=registry)
        self.steps = Counter("fbcache_steps", "Steps that were drawn", ("decision",), registry=registry)
        self.seconds = Histogram(
            "fbcache_picture_seconds", "Seconds a picture", ("part",), registry=registry, buckets=SECONDS
        )
        self.compilations = Counter("graph_compilations", "Denoise graphs that were compiled", registry=registry)
        self.restarts = Counter("fbcache_painter_restarts", "Drawing processes that were lost", registry=registry)

    def drawn(self, facts):
        """Counts a picture."""
        self.pictures.inc()
        self.steps.labels("computed").inc(len(facts["computed_steps"]))
        self.steps.labels("reused").inc(len(facts["cached_steps"]))
        for part, seconds in facts["seconds"].items():
            self.seconds.labels(part).observe(seconds)

    def text(self):
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
