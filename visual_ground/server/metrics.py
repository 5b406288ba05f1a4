"""Counters in Prometheus' text format, and one line of JSON for each request."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, defaultdict

logger = logging.getLogger("visual_ground.server.requests")


class Metrics:
    """Counts requests; none of their contents is ever kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request and log its line, which has the route as it is declared, without ids."""
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds
        entry = {"method": method, "route": route, "status": status, "milliseconds": round(seconds * 1000, 1)}
        logger.info(json.dumps(entry))

    def text(self, waiting: int, batches: int, batched: int) -> str:
        """Return all numbers, with how many answers wait, and how many were generated in how many batches."""
        lines = ["# TYPE visual_ground_requests_total counter"]
        with self._lock:
            for (route, status), count in sorted(self._requests.items()):
                lines.append(f'visual_ground_requests_total{{route="{route}",status="{status}"}} {count}')
            lines.append("# TYPE visual_ground_request_seconds_total counter")
            for route, seconds in sorted(self._seconds.items()):
                lines.append(f'visual_ground_request_seconds_total{{route="{route}"}} {seconds:.6f}')
        for name, kind, value in (
            ("waiting", "gauge", waiting),
            ("batches_total", "counter", batches),
            ("batched_answers_total", "counter", batched),
        ):
            lines += [f"# TYPE visual_ground_{name} {kind}", f"visual_ground_{name} {value}"]
        return "\n".join(lines) + "\n"
