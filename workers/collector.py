"""What Python's garbage collector looks at: not at what stays for as long as the process.

torch and transformers are some 350,000 objects. To look through all of them takes a worker a third
of a second each time, in which it does nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_collecting() -> Iterator[None]:
    """For imports: what is there when this ends is never looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
