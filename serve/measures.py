"""What a replica measures, for Prometheus: Ray exports it on each node's metrics port, with deployment, replica and application as labels."""

from functools import cache

from ray.serve import metrics

from sentinode.probability import Decision

LATENCY_BOUNDARIES_S = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
BATCH_BOUNDARIES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]


class Measures:
    """The counters of this process; without Ray they count for nobody."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("sentinode_requests", "Requests answered.", ("route", "method", "status"))
        self._latency = metrics.Histogram("sentinode_request_seconds", "From the first byte to the answer's last.", LATENCY_BOUNDARIES_S, ("route",))
        self._passes = metrics.Histogram("sentinode_batch_patches", "Patches of a forward pass.", BATCH_BOUNDARIES, ())
        self._engine = metrics.Histogram("sentinode_engine_seconds", "Time of a forward pass or of a map.", LATENCY_BOUNDARIES_S, ())
        self._decisions = metrics.Counter("sentinode_decisions", "Patches decided about.", ("prediction", "needs_review"))

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered, by the matched route: paths are the caller's."""
        self._requests.inc(1, {"route": route, "method": method, "status": str(status)})
        self._latency.observe(seconds, {"route": route})

    def passed(self, patches: int) -> None:
        """Count a forward pass over so many patches."""
        self._passes.observe(patches)

    def engine(self, seconds: float) -> None:
        """Count the time that the engine took for one pass or map."""
        self._engine.observe(seconds)

    def decided(self, decision: Decision, needs_review: bool) -> None:
        """Count a decision that was told to a caller."""
        self._decisions.inc(1, {"prediction": decision.prediction, "needs_review": str(needs_review).lower()})


@cache
def measures() -> Measures:
    """Return the counters of this process, made at first use: in a replica they get its labels."""
    return Measures()
