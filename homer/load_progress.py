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

import torch
import transformers
from transformers import modeling_utils

from homer.checkpoint import Shards

_log = logging.getLogger(__name__)
_BAR = "Loading weights"
_MOST_LINES = 20
_INTO_PARTS = "_load_state_dict_into_zero3_model"
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
    into_parts = getattr(modeling_utils, _INTO_PARTS, None)
    try:
        if into_parts is not None:
            # For ZeRO-3 it has no bar.
            setattr(modeling_utils, _INTO_PARTS, _told(into_parts, shards))
        yield
    finally:
        install(before)
        if into_parts is not None:
            setattr(modeling_utils, _INTO_PARTS, into_parts)
        _hooked.release()


class _Progress:
    """Tells how far the shards are, a weight at a time."""

    def __init__(self, shards: Shards, weights: int, factory: Callable[..., Any]) -> None:
        self._shards, self._at, self._told = shards, 0, 0
        self._bar = factory(total=weights, desc=_BAR) if sys.stderr.isatty() else None

    def done(self, *names: str) -> None:
        """A weight is there; the first of `names` that the checkpoint knows says from which."""
        known = (self._shards.of[name] for name in names if name in self._shards.of)
        self._at = max(self._at, next(known, self._at))
        count = len(self._shards.files)
        if self._bar is not None:
            self._bar.set_postfix_str(f"shard {self._at + 1} of {count}", refresh=False)
            self._bar.update(1)
        elif self._at * _MOST_LINES // count > self._told:
            self._told = self._at * _MOST_LINES // count
            _log.info("loading: shard %d of %d", self._at + 1, count)

    def close(self) -> None:
        """All is there."""
        if self._bar is not None:
            self._bar.close()


def _by_shard(factory: Callable[..., Any], weights: Any, shards: Shards) -> Iterator[Any]:
    """`weights` one after the other, as transformers' bar gives them."""
    progress = _Progress(shards, len(weights), factory)
    for name, source in weights:
        yield name, source
        # What is made of several weights of the checkpoint has none of its name there.
        progress.done(next(iter(getattr(source, "source_patterns", ())), name), name)
    progress.close()


def _told(load: Callable[..., Any], shards: Shards) -> Callable[..., Any]:
    """`load`, which brings weights into a model, module by module; only rank 0 has any to bring."""

    def loads(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        count = len(list(model.parameters()))
        progress = _Progress(shards, count, transformers.utils.logging.tqdm)

        def before(module: torch.nn.Module, _: Any, prefix: str, *__: Any) -> None:
            for name, _weight in module.named_parameters(prefix[:-1], recurse=False):
                progress.done(name)

        hooks = [m.register_load_state_dict_pre_hook(before) for m in model.modules()]
        try:
            return load(model, *args, **kwargs)
        finally:
            progress.close()
            for hook in hooks:
                hook.remove()

    return loads
