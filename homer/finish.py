"""The final cache, put together layer by layer from KV rows that may come from elsewhere.

Behind each layer that is complete the suffix runs once more through it (the refreshed suffix), so
that the first token is there as soon as the last rows are. Knows nothing about machines or about
how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from homer.attention import NodePass
from homer.context import CompressedContext, KVRows
from homer.errors import StateError
from homer.plan import MergePlan
from homer.stack import LayerStack
from homer.state import KVShard, LayerKV, NodeState


class CacheBuilder:
    """Builds the cache of one prompt: `add_layer` for one layer after the other, then `finish`.

    Averaging at merges mixes the suffix states of the chunk that holds the answer with those of
    all that don't; after three levels most of it is noise. Where the plan says so, the suffix runs
    once more over what survived, for `suffix_len` tokens of work. Otherwise the averaged states are
    used.

    Parameters
    ----------
    stack : LayerStack
    plan : MergePlan
    root : NodeState
        Its shards give up each layer once it is used.
    prefix_kv : list of (keys, values), or None
    suffix_ids : torch.Tensor of shape (suffix,), int64
    room_tokens : int
        Room for so many generated tokens behind the rows, in the same memory.
    """

    def __init__(
        self,
        stack: LayerStack,
        plan: MergePlan,
        root: NodeState,
        prefix_kv: Sequence[LayerKV] | None,
        suffix_ids: torch.Tensor,
        room_tokens: int = 0,
    ) -> None:
        if root.node != plan.root.id:
            raise StateError(f"node {root.node} is not the root")
        self._stack = stack
        self._plan = plan
        self._root = root
        self._prefix_kv = prefix_kv
        self._room_tokens = room_tokens
        self._buffers: list[LayerKV] = []
        self._next_layer = 0
        front = torch.arange(plan.prefix_len, device=root.position_ids.device)
        self._positions = torch.cat((front, root.position_ids))
        past_len = plan.kept_len - plan.suffix_len
        # Of the layer that is being added. Not by way of `self`: in such a cycle the cache would be
        # held until the garbage collector comes by.
        buffers = self._buffers
        self._pass = NodePass(
            span=plan.next_position,
            past=lambda _: _first_rows(buffers[-1], past_len),
            past_positions=self._positions[:past_len],
        )
        self._hidden: torch.Tensor | None = None
        if plan.refreshes_suffix:
            self._hidden = stack.embed(suffix_ids)
        elif root.suffix_kv is None:
            raise StateError("the root has no suffix states")

    @property
    def next_layer(self) -> int:
        """The layer that `add_layer` takes next; the number of layers when all are there."""
        return self._next_layer

    @property
    def complete(self) -> bool:
        return self.next_layer == self._plan.num_layers

    @torch.inference_mode()
    def add_layer(self, remote: Sequence[KVRows] = ()) -> None:
        """Take the next layer: its rows from elsewhere, and those of the root's shards.

        Raises
        ------
        StateError
            When a surviving row is missing, or there more than once.
        """
        plan, layer = self._plan, self.next_layer
        pieces = list(remote)
        for shard in self._root.shards:
            if shard.layer_start <= layer < shard.layer_end:
                pieces.append(KVRows(shard.context_indices, *shard.layer(layer)))
        _check_rows(pieces, self._root.context_indices, layer)
        room = plan.kept_len + self._room_tokens
        device = self._stack.layer_devices[layer]
        keys, values = pieces[0].keys, pieces[0].values
        buffers = _rows_like(keys, room, device), _rows_like(values, room, device)
        self._buffers.append(buffers)
        for which, buffer in enumerate(buffers):
            if self._prefix_kv is not None:
                buffer[:, : plan.prefix_len] = self._prefix_kv[layer][which]
            for indices, *rows in pieces:
                places = torch.searchsorted(self._root.context_indices, indices) + plan.prefix_len
                buffer.index_copy_(1, places.to(device), rows[which].to(device))
        for buffer, suffix in zip(buffers, self._suffix_rows(layer), strict=True):
            buffer[:, plan.kept_len - plan.suffix_len : plan.kept_len] = suffix
        self._next_layer += 1
        _release_layer(self._root.shards, layer)

    @torch.inference_mode()
    def finish(self) -> CompressedContext:
        """The context, when all layers are there."""
        if not self.complete:
            raise StateError(f"layer {self.next_layer} of the final cache has not come")
        hidden = self._root.hidden if self._hidden is None else self._hidden
        self._root.shards.clear()
        return CompressedContext(
            context_indices=self._root.context_indices,
            position_ids=self._positions,
            next_position=self._plan.next_position,
            logits=self._stack.logits(hidden[-1:])[0],
            buffers=self._buffers,
        )

    def _suffix_rows(self, layer: int) -> LayerKV:
        """The suffix's rows of `layer`, behind those that its buffers hold already."""
        if self._hidden is None:
            if self._root.suffix_kv is None:
                raise StateError("the root has no suffix states")
            return self._root.suffix_kv[layer]
        if layer == self._plan.num_layers - 1:
            last_row = torch.tensor([len(self._hidden) - 1], device=self._hidden.device)
            self._pass.choose_rows = lambda _: last_row
        positions = self._positions[len(self._positions) - self._plan.suffix_len :]
        self._hidden = self._stack.run(self._hidden, positions, range(layer, layer + 1), self._pass)
        return self._pass.kv.pop()


def _first_rows(layer: LayerKV, count: int) -> LayerKV:
    keys, values = layer
    return keys[:, :count], values[:, :count]


def _rows_like(tensor: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """Room for `rows` rows of the same kind on `device`."""
    heads, _, numbers = tensor.shape
    return tensor.new_empty(heads, rows, numbers, device=device)


def _check_rows(pieces: Sequence[KVRows], wanted: torch.Tensor, layer: int) -> None:
    """The rows of `pieces` are those `wanted` (ascending), each once."""
    if not pieces:
        raise StateError(f"no KV rows of layer {layer} are held anywhere")
    indices = torch.cat([piece.context_indices for piece in pieces]).sort().values
    if not torch.equal(indices, wanted):
        raise StateError(
            f"layer {layer} needs the KV rows of {len(wanted)} context tokens, but there "
            f"are {len(indices)} rows that do not match them; the request has to be run again"
        )


def _release_layer(shards: Sequence[KVShard], layer: int) -> None:
    """Let go of one layer's rows that are now in the cache."""
    for shard in shards:
        if shard.layer_start <= layer < shard.layer_end:
            at = layer - shard.layer_start
            shard.keys[at] = shard.keys[at][:, :0].clone()
            shard.values[at] = shard.values[at][:, :0].clone()
