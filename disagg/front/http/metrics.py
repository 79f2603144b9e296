"""The router's numbers in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Counter, generate_latest

from disagg.front.router import Router


def render(router: Router) -> bytes:
    """Return all metrics. Call it in the router's thread."""
    registry = CollectorRegistry()  # of its own: nothing of this process or of Python is in it
    ended = Counter("moesaic_requests_ended", "Requests that have ended, by reason.", ["reason"], registry=registry)
    for reason, count in router.metrics.finished.items():
        ended.labels(reason).inc(count)
    return generate_latest(registry)
