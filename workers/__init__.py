"""One worker per GPU or CPU share: runs nodes of merge trees, serves `homer.v1.Worker` over gRPC.

Imports `homer`, and never Ray.
"""

from __future__ import annotations

import os

# A worker never forks after its server runs; gRPC's fork handlers would only stall its threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
