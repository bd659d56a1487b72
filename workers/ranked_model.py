"""A worker's model that runs on several ranks: what rank 0 does in place of one process.

Each thing that is done with the model is told to the other ranks, by the names of what it is done
with, and then done here. Knows nothing about processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from homer.context import CompressedContext, KVRows
from homer.decode import DecodeCache, decode_step
from homer.encode import NodeInput, TreeEncoder
from homer.finish import CacheBuilder
from homer.plan import PlanNode
from homer.state import ElsewhereToo, KVShard, LayerKV, NodeState
from homer.v1 import worker_pb2
from workers.engine import Engine, LoadedModel
from workers.options import WorkerOptions
from workers.rank_tensors import RankTensors
from workers.ranks import Handle, RankGroup, encode_message
from workers.tensor_stream import Spec


def load_on_all_ranks(options: WorkerOptions) -> RankedModel:
    """Start the other ranks, and load the model on all of them.

    Raises
    ------
    ModelError, BiasError, ConfigError
        When the model or its bias cannot be used.
    """
    group = RankGroup(options)
    try:
        part = LoadedModel.load(options)
    except BaseException:
        group.close()
        raise
    return RankedModel(**vars(part), group=group)


@dataclass(frozen=True)
class RankedModel(LoadedModel):
    """Rank 0's part of a model, and the group of all ranks."""

    group: RankGroup

    @property
    def tensors(self) -> RankTensors:
        return RankTensors(self.stack)

    def encoder(
        self,
        spec: worker_pb2.RequestSpec,
        plan: Any,
        prefix_ids: torch.Tensor,
        suffix_ids: torch.Tensor,
    ) -> TreeEncoder:
        return RankedEncoder(self, spec, plan, prefix_ids, suffix_ids)

    def decode_cache(
        self, context: CompressedContext, room_tokens: int, beside: bool = False
    ) -> DecodeCache:
        assert isinstance(context, RankedContext)
        handle = self.group.new_handle()
        told = {"context": context.handle.key, "room": room_tokens, "beside": beside}
        self.group.tell("cache", key=handle.key, **told)
        cache = super().decode_cache(context, room_tokens, beside)
        return RankedCache(context, cache.buffers, handle)

    def decode(self, tokens: Sequence[int], caches: Sequence[DecodeCache]) -> torch.Tensor:
        own = [cache for cache in caches if isinstance(cache, RankedCache)]
        keys = [cache.handle.key for cache in own]
        with self.group.together("decode", tokens=list(tokens), caches=keys):
            return decode_step(self.stack, tokens, own)

    async def rows(
        self, engine: Engine, shards: Sequence[KVShard], kept: torch.Tensor
    ) -> tuple[list[Spec], Sequence[torch.Tensor]]:
        # Ranks do one thing after the other: this waits for the node that runs.
        return await engine.answer_step(self._collect_rows, shards, kept)

    async def whole_state(self, engine: Engine, state: NodeState) -> NodeState:
        if state.suffix_kv is None:
            return state
        return await engine.answer_step(self._collect_state, state)

    def close(self) -> None:
        self.group.close()

    def _collect_rows(
        self, shards: Sequence[KVShard], kept: torch.Tensor
    ) -> tuple[list[Spec], list[torch.Tensor]]:
        keys = [key_of(shard.elsewhere) for shard in shards]
        with self.group.together("rows", shards=keys, kept=kept.tolist()):
            return self.tensors.collect_rows(shards, kept)

    def _collect_state(self, state: NodeState) -> NodeState:
        with self.group.together("suffix", state=key_of(state.elsewhere)):
            return replace(state, suffix_kv=self.tensors.collect_kv(state.suffix_kv or ()))


class RankedEncoder(TreeEncoder):
    """Runs the nodes of one request on all ranks."""

    def __init__(
        self,
        model: RankedModel,
        spec: worker_pb2.RequestSpec,
        plan: Any,
        prefix_ids: torch.Tensor,
        suffix_ids: torch.Tensor,
    ) -> None:
        super().__init__(model.stack, plan, prefix_ids, suffix_ids, model.bias)
        self._model = model
        self._group = model.group
        self._handle = self._group.new_handle()
        self._group.tell("encoder", key=self._handle.key, spec=encode_message(spec))

    @torch.inference_mode()
    def run_together(
        self, nodes: Sequence[PlanNode], inputs: Sequence[NodeInput]
    ) -> list[NodeState]:
        handles = [self._group.new_handle() for _ in nodes]
        told = [
            {
                "node": list(node.id),
                "key": handle.key,
                "given": given.tolist()
                if isinstance(given, torch.Tensor)
                else [_describe(child) for child in given],
            }
            for node, handle, given in zip(nodes, handles, inputs, strict=True)
        ]
        with self._group.together("run", encoder=self._handle.key, nodes=told):
            # What came from other workers is on no other rank yet.
            here = [
                given
                if isinstance(given, torch.Tensor)
                else [child if child.elsewhere else self._share(child) for child in given]
                for given in inputs
            ]
            states = super().run_together(nodes, here)
        return [self._named(state, handle) for state, handle in zip(states, handles, strict=True)]

    @torch.inference_mode()
    def finishing(self, root: NodeState, room_tokens: int = 0) -> CacheBuilder:
        handle = self._group.new_handle()
        with self._group.together(
            "finishing",
            encoder=self._handle.key,
            root=_describe(root),
            room=room_tokens,
            key=handle.key,
        ):
            prefix_kv = self.prefix_kv() if self.plan.prefix_len else None
            parts = self.stack, self.plan, root, prefix_kv, self.suffix_ids, room_tokens
            return RankedBuilder(self._model, handle, *parts)

    def _share(self, state: NodeState) -> NodeState:
        return self._model.tensors.share_state(
            state.node,
            len(state.hidden),
            self.plan.suffix_len,
            len(state.suffix_kv or ()),
            state,
        )

    def _named(self, state: NodeState, handle: Handle) -> NodeState:
        for shard, key in zip(state.shards, shard_keys(state, handle.key), strict=True):
            if shard.elsewhere is None:
                shard.elsewhere = Handle(key, self._group)
        state.elsewhere = handle
        return state


class RankedBuilder(CacheBuilder):
    """Builds a cache on all ranks, each with its own heads."""

    def __init__(self, model: RankedModel, handle: Handle, *parts: Any) -> None:
        super().__init__(*parts)
        self._model = model
        self._handle = handle

    def add_layer(self, remote: Sequence[KVRows] = ()) -> None:
        counts = [len(rows.context_indices) for rows in remote]
        with self._model.group.together("layer", builder=self._handle.key, rows=counts):
            super().add_layer(self._model.tensors.share_rows(counts, remote))

    def finish(self) -> CompressedContext:
        handle = self._model.group.new_handle()
        with self._model.group.together("finish", builder=self._handle.key, key=handle.key):
            context = super().finish()
        return RankedContext(**vars(context), handle=handle)


@dataclass
class RankedContext(CompressedContext):
    """A context whose rows are spread over the ranks by heads."""

    handle: Handle


class RankedCache(DecodeCache):
    """An answer's cache on all ranks."""

    def __init__(
        self, context: CompressedContext, buffers: Sequence[LayerKV], handle: Handle
    ) -> None:
        super().__init__(context, buffers)
        self.handle = handle


def _describe(state: NodeState) -> dict[str, Any]:
    """A state to the other ranks: its name and those of its shards, or what will be sent of it."""
    if state.elsewhere is not None:
        shards = [key_of(shard.elsewhere) for shard in state.shards]
        return {"state": key_of(state.elsewhere), "shards": shards}
    layers = len(state.suffix_kv or ())
    return {"node": list(state.node), "rows": len(state.hidden), "layers": layers}


def shard_keys(state: NodeState, key: str) -> list[str]:
    """Names of the shards that running a node named `key` left; the same on every rank."""
    return [f"{key}.{number}" for number in range(len(state.shards))]


def key_of(elsewhere: ElsewhereToo | None) -> str:
    """The name of something that all ranks have."""
    assert isinstance(elsewhere, Handle), "not known to the other ranks"
    return elsewhere.key
