"""A simulator: the same scheduler as in a service, over workers of virtual time.

The scheduler is `cluster.scheduler.Scheduler`, unchanged. Its event loop's clock jumps to the next
timer instead of waiting (`loop`); its workers take the seconds that a file of costs says
(`costs`, `worker`), and share network links (`network`).
"""

from __future__ import annotations
