"""`python -m workers.follower`: a rank of a worker other than the first; started by that one.

Reads from its standard input what to do with its part of the model, a line each, and does it in
that order. Ends when the input does: then rank 0 is gone. Talks to nobody else.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step
from homer.encode import TreeEncoder
from homer.errors import HomerError
from homer.finish import CacheBuilder
from homer.load_options import LoadOptions
from homer.plan import NodeId
from homer.state import KVShard, NodeState
from homer.v1 import worker_pb2
from workers.engine import LoadedModel
from workers.intake import make_encoder
from workers.logs import set_up_logging
from workers.options import WorkerOptions
from workers.rank_tensors import RankTensors
from workers.ranked_model import shard_keys
from workers.ranks import join_ranks

T = TypeVar("T")

_log = logging.getLogger(__name__)

# An error of ours is rank 0's as well, which reports it and ends; if not, it has to hear of it.
REPORT_SECONDS = 10.0


class Key:
    """What a shard is called by rank 0."""

    def __init__(self, key: str) -> None:
        self.key = key

    def copy(self) -> Key:
        return self

    def select(self, kept: torch.Tensor) -> None:
        """Nobody else has to hear of it."""


class Follower:
    """This rank's part of everything that rank 0 has, by name, and what can be done with it."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._stack = model.stack
        self._tensors = RankTensors(model.stack)
        self._held: dict[str, Any] = {}

    def do(self, operation: str, **arguments: Any) -> None:
        """One thing that rank 0 does, or has had done."""
        work: Callable[..., None] = getattr(self, f"_{operation}")
        with torch.inference_mode():
            work(**arguments)

    def _encoder(self, key: str, spec: str) -> None:
        message = worker_pb2.RequestSpec.FromString(base64.b64decode(spec))
        self._held[key] = make_encoder(self._model, message)

    def _run(self, encoder: str, nodes: Sequence[dict[str, Any]]) -> None:
        tree = self._as(TreeEncoder, encoder)
        planned = [tree.plan.by_id[NodeId(*told["node"])] for told in nodes]
        inputs = [
            self._indices(told["given"])
            if node.is_leaf
            else [self._state(child, tree) for child in told["given"]]
            for node, told in zip(planned, nodes, strict=True)
        ]
        for state, told in zip(tree.run_together(planned, inputs), nodes, strict=True):
            self._keep(state, told["key"])

    def _finishing(self, encoder: str, root: dict[str, Any], room: int, key: str) -> None:
        tree = self._as(TreeEncoder, encoder)
        self._held[key] = tree.finishing(self._state(root, tree), room)

    def _layer(self, builder: str, rows: Sequence[int]) -> None:
        self._as(CacheBuilder, builder).add_layer(self._tensors.share_rows(rows))

    def _finish(self, builder: str, key: str) -> None:
        self._held[key] = self._as(CacheBuilder, builder).finish()

    def _cache(self, context: str, room: int, beside: bool, key: str) -> None:
        rows = self._as(CompressedContext, context)
        self._held[key] = self._model.decode_cache(rows, room, beside)

    def _decode(self, tokens: Sequence[int], caches: Sequence[str]) -> None:
        decode_step(self._stack, tokens, [self._as(DecodeCache, cache) for cache in caches])

    def _copy(self, of: str, key: str) -> None:
        copied = self._as(KVShard, of).copy()
        copied.elsewhere = Key(key)
        self._held[key] = copied

    def _select(self, of: str, kept: list[int]) -> None:
        try:
            self._as(KVShard, of).select_(self._indices(kept))
        except IndexError:
            # An answer had taken the shard apart before; rank 0 finds the same, and drops it.
            _log.info("a shard that was to be pruned has gone into an answer's cache")

    def _rows(self, shards: Sequence[str], kept: list[int]) -> None:
        given = [self._as(KVShard, shard) for shard in shards]
        self._tensors.collect_rows(given, self._indices(kept))

    def _suffix(self, state: str) -> None:
        self._tensors.collect_kv(self._as(NodeState, state).suffix_kv or ())

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._held.pop(key, None)

    def _as(self, kind: type[T], key: str) -> T:
        held = self._held[key]
        assert isinstance(held, kind), f"{key} is {type(held).__name__}, not {kind.__name__}"
        return held

    def _indices(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor(indices, dtype=torch.int64, device=self._stack.device)

    def _state(self, told: dict[str, Any], tree: TreeEncoder) -> NodeState:
        if "state" in told:
            state = self._as(NodeState, told["state"]).without_shards()
            state.shards = [self._as(KVShard, shard) for shard in told["shards"]]
            return state
        return self._tensors.share_state(
            NodeId(*told["node"]), told["rows"], tree.plan.suffix_len, told["layers"]
        )

    def _keep(self, state: NodeState, key: str) -> None:
        for shard, name in zip(state.shards, shard_keys(state, key), strict=True):
            if shard.elsewhere is None:
                shard.elsewhere = Key(name)
                self._held[name] = shard
        self._held[key] = state.without_shards()


def _read(lines: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    # Rank 0 has gone, or wants this one to go; the model may be in the middle of anything.
    os._exit(0)


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    first = json.loads(lines.get())
    load = LoadOptions(**first["options"].pop("load"))
    options = WorkerOptions(load=load, **first["options"])
    set_up_logging(options.log_format, worker=f"{options.name or 'worker'} rank {first['rank']}")
    try:
        join_ranks(options, first["rank"], Path(first["folder"]))
        follower = Follower(LoadedModel.load(options))
    except HomerError as error:
        _log.error("cannot load: %s", error)
        time.sleep(REPORT_SECONDS)
        return 2
    while True:
        told = json.loads(lines.get())
        try:
            follower.do(told.pop("do"), **told)
        except HomerError as error:
            # It comes from the request: rank 0 has met it too, and tells its caller.
            _log.info("a step failed, as on rank 0: %s", error)


if __name__ == "__main__":
    sys.exit(main())
