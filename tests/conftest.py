"""Settings that every test shares."""

from __future__ import annotations

import os

# No test reaches for a model hub or reports usage. One thread each: on models this small, threads
# that wait for each other on a busy machine cost nine times what they save.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

# The machine may be busy, so no example has a deadline; the same examples are drawn each time, so
# that a red test is red for everybody.
settings.register_profile("homer", deadline=None, derandomize=True, database=None)
settings.load_profile("homer")
