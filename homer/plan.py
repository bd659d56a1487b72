"""The merge plan: how a prompt is cut into leaves, and which node merges what, in which layers.

Pure Python: the same lengths, layer count and settings give the same plan on every machine, so a plan
never travels; only what it is made from does. Knows nothing about tensors, models or workers.

Reference: HOMER, arXiv 2404.10308, section 3 and appendix; names follow the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from homer.config import HomerConfig
from homer.errors import PlanError


class NodeId(NamedTuple):
    """A node of the tree: its height above the leaves, and its index within that height."""

    height: int
    index: int


@dataclass(frozen=True)
class PlanNode:
    """One node: what it reads, which layers it runs, and how many tokens it leaves.

    `context_start` and `context_end` bound the span of the original context below this node;
    `context_in` and `context_out` count the context tokens that enter and leave it (prefix and suffix
    not counted). A leaf has no children.
    """

    id: NodeId
    children: tuple[NodeId, ...]
    context_start: int
    context_end: int
    layer_start: int
    layer_end: int
    context_in: int
    context_out: int
    target_len: int

    @property
    def is_leaf(self) -> bool:
        return not self.children

    @property
    def prunes(self) -> bool:
        return self.context_out < self.context_in


@dataclass(frozen=True)
class MergePlan:
    """The whole tree for one prompt. Make it with `MergePlan.build`.

    `nodes` are in post-order: children before parents, left before right, the root last.
    """

    prefix_len: int
    context_len: int
    suffix_len: int
    num_layers: int
    config: HomerConfig
    fan_in: int
    height: int
    chunk_context_len: int
    nodes: tuple[PlanNode, ...]

    @classmethod
    def build(
        cls,
        prefix_len: int,
        context_len: int,
        suffix_len: int,
        num_layers: int,
        config: HomerConfig,
    ) -> MergePlan:
        """Plan a prompt of `prefix_len + context_len + suffix_len` tokens for `num_layers` layers.

        Raises
        ------
        PlanError
            When no plan exists for these lengths; the message names the settings to change.
        """
        _check_lengths(prefix_len, context_len, suffix_len, num_layers, config)
        affix_len = prefix_len + suffix_len
        leaf_room = (config.max_initial_chunk_len or config.max_chunk_len) - affix_len
        num_chunks = -(-context_len // leaf_room)
        num_leaves = 1 << (num_chunks - 1).bit_length()
        fan_in = _choose_fan_in(num_leaves, num_layers, config.max_chunk_len - affix_len, config)
        height = _tree_height(num_leaves, fan_in)
        merge_layers = num_layers - config.warmup_layers
        layers_per_node = merge_layers // (height + 1)
        leaf_layers = num_layers - layers_per_node * height

        chunk_context_len, spans = _leaf_spans(context_len, num_leaves)
        targets = _target_lens(prefix_len, suffix_len, context_len, spans, fan_in, height, config)
        built: dict[NodeId, PlanNode] = {}

        def visit(node_id: NodeId, first: int, last: int) -> Iterator[PlanNode]:
            """Post-order over the leaves first..last-1."""
            level, index = node_id
            children: list[NodeId] = []
            if level == 0:
                context_in = spans[first][1] - spans[first][0]
                layer_start, layer_end = 0, leaf_layers
            else:
                width = fan_in ** (level - 1)
                for number, start in enumerate(range(first, last, width)):
                    child = NodeId(level - 1, index * fan_in + number)
                    yield from visit(child, start, min(start + width, last))
                    children.append(child)
                context_in = sum(built[child].context_out for child in children)
                layer_start = leaf_layers + layers_per_node * (level - 1)
                layer_end = layer_start + layers_per_node
            target = targets[node_id]
            node = PlanNode(
                id=node_id,
                children=tuple(children),
                context_start=spans[first][0],
                context_end=spans[last - 1][1],
                layer_start=layer_start,
                layer_end=layer_end,
                context_in=context_in,
                context_out=min(context_in, target - affix_len),
                target_len=target,
            )
            built[node_id] = node
            yield node

        nodes = tuple(visit(NodeId(height, 0), 0, num_leaves))
        return cls(
            prefix_len=prefix_len,
            context_len=context_len,
            suffix_len=suffix_len,
            num_layers=num_layers,
            config=config,
            fan_in=fan_in,
            height=height,
            chunk_context_len=chunk_context_len,
            nodes=nodes,
        )

    @cached_property
    def by_id(self) -> dict[NodeId, PlanNode]:
        """Nodes by their id."""
        return {node.id: node for node in self.nodes}

    @cached_property
    def parents(self) -> dict[NodeId, NodeId]:
        """The parent of every node but the root."""
        return {child: node.id for node in self.nodes for child in node.children}

    @property
    def root(self) -> PlanNode:
        return self.nodes[-1]

    @property
    def leaves(self) -> tuple[PlanNode, ...]:
        """The leaves in context order."""
        return tuple(node for node in self.nodes if node.is_leaf)

    @property
    def merges(self) -> tuple[PlanNode, ...]:
        """The merge nodes in post-order."""
        return tuple(node for node in self.nodes if not node.is_leaf)

    @property
    def prompt_len(self) -> int:
        """Tokens of the whole prompt."""
        return self.prefix_len + self.context_len + self.suffix_len

    @property
    def kept_len(self) -> int:
        """Tokens in the final cache, prefix and suffix included."""
        return self.prefix_len + self.root.context_out + self.suffix_len

    @property
    def next_position(self) -> int:
        """Position of the first generated token."""
        return self.prefix_len + self.chunk_context_len + self.suffix_len

    @property
    def max_distance(self) -> int:
        """Largest distance, in position ids, between the last suffix token and a context token."""
        return self.next_position - 1 - self.prefix_len

    @property
    def refreshes_suffix(self) -> bool:
        """Whether the suffix runs once more at the root: not where nothing was merged."""
        return self.config.refresh_suffix and self.height > 0

    def subtree(self, node_id: NodeId) -> tuple[PlanNode, ...]:
        """The nodes of the subtree under `node_id`, itself last, in post-order."""
        end = next(i for i, node in enumerate(self.nodes) if node.id == node_id)
        start = end
        pending = list(self.nodes[end].children)
        while pending:
            start -= 1
            pending.remove(self.nodes[start].id)
            pending.extend(self.nodes[start].children)
        return self.nodes[start : end + 1]


def _check_lengths(
    prefix_len: int, context_len: int, suffix_len: int, num_layers: int, config: HomerConfig
) -> None:
    if prefix_len < 0 or num_layers < 1:
        raise PlanError(
            f"prefix_len is {prefix_len} and num_layers is {num_layers}; use 0 and 1 or more"
        )
    if context_len < 1:
        raise PlanError("the context is empty; give a document of one token or more")
    if suffix_len < 1:
        raise PlanError(
            "the suffix is empty; give a question: its last token decides which context tokens are kept"
        )
    affix_len = prefix_len + suffix_len
    for name in ("max_chunk_len", "max_initial_chunk_len"):
        length = getattr(config, name)
        if length is not None and length <= affix_len:
            raise PlanError(
                f"prefix and suffix take {affix_len} tokens, which leaves no room for context in a chunk "
                f"of {length}; raise {name} above {affix_len} or shorten prefix and suffix"
            )
    if config.target_len < affix_len:
        raise PlanError(
            f"prefix and suffix take {affix_len} tokens and are never removed, but target_len is "
            f"{config.target_len}; raise target_len or shorten prefix and suffix"
        )
    if config.warmup_layers > num_layers:
        raise PlanError(
            f"warmup_layers is {config.warmup_layers}, but the model has {num_layers} layers; "
            f"set it to {num_layers - 1} or less"
        )


def _tree_height(num_leaves: int, fan_in: int) -> int:
    height = 0
    while fan_in**height < num_leaves:
        height += 1
    return height


def _choose_fan_in(num_leaves: int, num_layers: int, room: int, config: HomerConfig) -> int:
    """The fan-in asked for, or the smallest that leaves each level a layer.

    The authors' code goes on with levels that run no layer and ignores the target.
    """
    if num_leaves == 1:
        return config.fan_in or 2
    merge_layers = num_layers - config.warmup_layers
    candidates = (
        [config.fan_in] if config.fan_in else [2**i for i in range(1, num_leaves.bit_length())]
    )
    for fan_in in candidates:
        if fan_in > room:
            raise PlanError(
                f"a chunk of {config.max_chunk_len} tokens has room for {room} context tokens beside prefix "
                f"and suffix, too few to merge {fan_in} children; raise max_chunk_len, or shorten prefix "
                "and suffix"
            )
        if merge_layers > _tree_height(num_leaves, fan_in):
            return fan_in
    levels = _tree_height(num_leaves, candidates[-1]) + 1
    raise PlanError(
        f"{num_leaves} leaves with a fan-in of {candidates[-1]} make {levels} levels, but only "
        f"{merge_layers} of {num_layers} layers are left for merging; lower warmup_layers to "
        f"{max(0, num_layers - levels)} or less, raise max_chunk_len, or "
        + ("leave fan_in out" if config.fan_in else "use a model with more layers")
    )


def _leaf_spans(context_len: int, num_leaves: int) -> tuple[int, list[tuple[int, int]]]:
    """Longest leaf, and each leaf's span of the context.

    Every leaf but the last is full, as in the paper. Where that would make the last leaf's length
    negative (the authors' code crashes), the context is spread evenly instead.
    """
    chunk = -(-context_len // num_leaves)
    if chunk * (num_leaves - 1) <= context_len:
        bounds = [min(i * chunk, context_len) for i in range(num_leaves + 1)]
    else:
        bounds = [i * context_len // num_leaves for i in range(num_leaves + 1)]
        chunk = max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    return chunk, list(zip(bounds, bounds[1:], strict=False))


def _target_lens(
    prefix_len: int,
    suffix_len: int,
    context_len: int,
    spans: list[tuple[int, int]],
    fan_in: int,
    height: int,
    config: HomerConfig,
) -> dict[NodeId, int]:
    """The most tokens that each node may leave, affixes included."""
    affix_len = prefix_len + suffix_len
    room = config.max_chunk_len - affix_len
    leaf_lens = [end - start for start, end in spans]
    targets = {NodeId(height, 0): min(config.target_len, affix_len + context_len)}
    for level in range(height, 0, -1):
        width = fan_in ** (level - 1)
        for index in range(math.ceil(len(spans) / (width * fan_in))):
            firsts = range(
                index * width * fan_in, min((index + 1) * width * fan_in, len(spans)), width
            )
            if len(firsts) == 2:
                shares = _paper_shares(room, leaf_lens[firsts[1]])
            else:
                shares = _even_shares(
                    room, [sum(leaf_lens[first : first + width]) for first in firsts]
                )
            for number, share in enumerate(shares):
                targets[NodeId(level - 1, index * fan_in + number)] = affix_len + share
    return targets


def _paper_shares(room: int, right_first_leaf_len: int) -> list[int]:
    """Two children, as in the authors' code: the left one takes what a short right one leaves."""
    half = room // 2
    if right_first_leaf_len < half:
        return [room - right_first_leaf_len, right_first_leaf_len]
    return [half, half]


def _even_shares(room: int, available: list[int]) -> list[int]:
    """Any number of children: equal shares, and what short children leave goes to the others."""
    shares = [0] * len(available)
    open_children = sorted(range(len(available)), key=lambda i: available[i])
    while open_children:
        share = room // len(open_children)
        child = open_children.pop(0)
        shares[child] = min(available[child], share)
        room -= shares[child]
    return shares
