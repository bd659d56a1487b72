"""Measurements of workers, scheduler and service together: what `homer bench` runs beside the rest.

Real worker processes, real gRPC and the real scheduler. What one process can measure alone is in
`homer.bench`.
"""

from __future__ import annotations
