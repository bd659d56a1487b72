"""Shows how far loading is, by shards: a bar on a terminal, else lines in the log.

Knows nothing about what is loaded.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from homer.checkpoint import Shards

_log = logging.getLogger(__name__)
_BAR = "Loading weights"
_MOST_LINES = 20
# The hook is one for the process: while one model is loaded, another one's bar is transformers'.
_hooked = threading.Lock()


@contextmanager
def shown_by_shards(shards: Shards | None) -> Iterator[None]:
    """While inside, what transformers loads is shown by the shards that it comes from.

    Where the shards are not known (a model id, another format) transformers shows it its own way.
    """
    install: Callable[[Any], Any] | None = getattr(
        transformers.utils.logging, "set_tqdm_hook", None
    )
    if shards is None or install is None or not _hooked.acquire(blocking=False):
        yield
        return

    def hook(factory: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == _BAR and len(args) == 1:
            return _by_shard(factory, args[0], shards)
        return factory(*args, **kwargs)

    before = install(hook)
    try:
        yield
    finally:
        install(before)
        _hooked.release()


def _by_shard(factory: Callable[..., Any], weights: Any, shards: Shards) -> Iterator[Any]:
    """`weights` one after the other, as transformers' bar gives them."""
    count, at, told = len(shards.files), 0, 0
    bar = factory(total=len(weights), desc=_BAR) if sys.stderr.isatty() else None
    for name, source in weights:
        yield name, source
        # What is made of several weights of the checkpoint has none of its name there.
        origin = next(iter(getattr(source, "source_patterns", ())), name)
        at = max(at, shards.of.get(origin, shards.of.get(name, at)))
        if bar is not None:
            bar.set_postfix_str(f"shard {at + 1} of {count}", refresh=False)
            bar.update(1)
        elif at * _MOST_LINES // count > told:
            told = at * _MOST_LINES // count
            _log.info("loading: shard %d of %d", at + 1, count)
    if bar is not None:
        bar.close()
