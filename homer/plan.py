"""The merge plan: how a prompt is cut into leaves, and which node merges what, in which layers.

Pure Python: the same lengths, layer count and settings give the same plan on every machine, so a
plan never travels; only what it is made from does. Knows nothing about tensors, models or workers.

Reference: HOMER, arXiv 2404.10308, section 3 and appendix; names follow the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from homer.config import HomerConfig, PlanKind
from homer.errors import PlanError

# A few numbers of a request say how large its plan is: this is about a second.
MAX_LEAVES = 1 << 16


class NodeId(NamedTuple):
    """A node of the tree: its height above the leaves, and its index within that height."""

    height: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


@dataclass(frozen=True)
class PlanNode:
    """One node: what it reads, which layers it runs, and how many tokens it leaves.

    `context_start` and `context_end` bound the span of the original context below this node;
    `context_in` and `context_out` count the context tokens that enter and leave it (prefix and
    suffix not counted). A leaf has no children.
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
        num_leaves = -(-context_len // leaf_room)
        if num_leaves > MAX_LEAVES:
            raise PlanError(
                f"the context takes {num_leaves} leaves of {leaf_room} tokens, but at most "
                f"{MAX_LEAVES} are planned; raise max_chunk_len, or shorten the document"
            )
        if config.plan == "paper":
            num_leaves = 1 << (num_leaves - 1).bit_length()
        fan_in = _choose_fan_in(num_leaves, num_layers, config.max_chunk_len - affix_len, config)
        levels = _levels(num_leaves, fan_in)
        height = len(levels) - 1
        layer_bounds = _layer_bounds(num_layers, height, config)

        chunk_context_len, spans = _leaf_spans(context_len, num_leaves, config.plan)
        targets = _target_lens(prefix_len, suffix_len, context_len, levels, spans, config)
        built: dict[NodeId, PlanNode] = {}

        def visit(node_id: NodeId) -> Iterator[PlanNode]:
            """The subtree of `node_id` in post-order."""
            level, index = node_id
            children = tuple(NodeId(level - 1, child) for child in levels[level][index])
            if not children:
                start, end = spans[index]
                context_in = end - start
            else:
                for child in children:
                    yield from visit(child)
                start = built[children[0]].context_start
                end = built[children[-1]].context_end
                context_in = sum(built[child].context_out for child in children)
            target = targets[node_id]
            node = PlanNode(
                id=node_id,
                children=children,
                context_start=start,
                context_end=end,
                layer_start=layer_bounds[level],
                layer_end=layer_bounds[level + 1],
                context_in=context_in,
                context_out=min(context_in, target - affix_len),
                target_len=target,
            )
            built[node_id] = node
            yield node

        nodes = tuple(visit(NodeId(height, 0)))
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
    def level_nodes(self) -> list[int]:
        """Number of nodes of each level, from the leaves up."""
        counts = Counter(node.id.height for node in self.nodes)
        return [counts[height] for height in range(self.height + 1)]

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
        start, end = self._subtree_bounds[node_id]
        return self.nodes[start:end]

    @cached_property
    def _subtree_bounds(self) -> dict[NodeId, tuple[int, int]]:
        """Where in `nodes` each node's subtree starts and ends."""
        bounds: dict[NodeId, tuple[int, int]] = {}
        for place, node in enumerate(self.nodes):
            start = bounds[node.children[0]][0] if node.children else place
            bounds[node.id] = (start, place + 1)
        return bounds


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
            "the suffix is empty; give a question: its last token decides which context tokens "
            "are kept"
        )
    affix_len = prefix_len + suffix_len
    for name in ("max_chunk_len", "max_initial_chunk_len"):
        length = getattr(config, name)
        if length is not None and length <= affix_len:
            raise PlanError(
                f"prefix and suffix take {affix_len} tokens, which leaves no room for context in "
                f"a chunk of {length}; raise {name} above {affix_len} or shorten prefix and suffix"
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


def _num_levels(num_leaves: int, fan_in: int) -> int:
    levels = 1
    while num_leaves > 1:
        num_leaves = -(-num_leaves // fan_in)
        levels += 1
    return levels


def _levels(num_leaves: int, fan_in: int) -> list[list[range]]:
    """For each level and node, the indices of its children one level below; leaves have none.

    Every node has as few children as the levels below it allow, and its leaves are spread evenly
    over them: split from the root down, so that no part of the context gets a larger share of the
    targets.
    """
    sizes, levels = [num_leaves], []
    for height in range(_num_levels(num_leaves, fan_in) - 1, 0, -1):
        children: list[int] = []
        nodes: list[range] = []
        for size in sizes:
            count = -(-size // fan_in ** (height - 1))
            first = len(children)
            children += [(i + 1) * size // count - i * size // count for i in range(count)]
            nodes.append(range(first, len(children)))
        levels.append(nodes)
        sizes = children
    return [[range(0)] * num_leaves, *reversed(levels)]


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
                f"a chunk of {config.max_chunk_len} tokens has room for {room} context tokens "
                f"beside prefix and suffix, too few to merge {fan_in} children; raise "
                f"max_chunk_len, or shorten prefix "
                "and suffix"
            )
        levels = _num_levels(num_leaves, fan_in)
        if merge_layers >= levels:
            return fan_in
    raise PlanError(
        f"{num_leaves} leaves with a fan-in of {fan_in} make {levels} levels, but only "
        f"{merge_layers} of {num_layers} layers are left for merging; lower warmup_layers to "
        f"{max(0, num_layers - levels)} or less, raise max_chunk_len, or "
        + ("leave fan_in out" if config.fan_in else "use a model with more layers")
    )


def _layer_bounds(num_layers: int, height: int, config: HomerConfig) -> list[int]:
    """First layer of each level, from the leaves up, and the end of the root's.

    The merging layers are shared evenly by the levels. What is left over goes to the leaves in the
    paper; in a balanced plan to the top levels, one each, where it costs next to nothing.
    """
    per_level, left_over = divmod(num_layers - config.warmup_layers, height + 1)
    counts = [config.warmup_layers + per_level] + [per_level] * height
    if config.plan == "paper":
        counts[0] += left_over
    else:
        for level in range(height + 1 - left_over, height + 1):
            counts[level] += 1
    return [0, *accumulate(counts)]


def _leaf_spans(
    context_len: int, num_leaves: int, kind: PlanKind
) -> tuple[int, list[tuple[int, int]]]:
    """Longest leaf, and each leaf's span of the context.

    In the paper every leaf but the last is full. Where that would make the last leaf's length
    negative (the authors' code crashes), and in a balanced plan, the context is spread evenly.
    """
    chunk = -(-context_len // num_leaves)
    if kind == "paper" and chunk * (num_leaves - 1) <= context_len:
        bounds = [min(i * chunk, context_len) for i in range(num_leaves + 1)]
    else:
        bounds = [i * context_len // num_leaves for i in range(num_leaves + 1)]
    return chunk, list(pairwise(bounds))


def _target_lens(
    prefix_len: int,
    suffix_len: int,
    context_len: int,
    levels: list[list[range]],
    spans: list[tuple[int, int]],
    config: HomerConfig,
) -> dict[NodeId, int]:
    """The most tokens that each node may leave, affixes included."""
    affix_len = prefix_len + suffix_len
    room = config.max_chunk_len - affix_len
    # Per node: context tokens below it, and the length of its first leaf.
    sizes = [end - start for start, end in spans]
    first_leaf = list(sizes)
    targets = {NodeId(len(levels) - 1, 0): min(config.target_len, affix_len + context_len)}
    for level, nodes in enumerate(levels[1:], start=1):
        for children in nodes:
            if config.plan == "paper" and len(children) == 2:
                shares = _paper_shares(room, first_leaf[children[1]])
            else:
                shares = _even_shares(room, [sizes[child] for child in children])
            for child, share in zip(children, shares, strict=True):
                targets[NodeId(level - 1, child)] = affix_len + share
        sizes = [sum(sizes[child] for child in children) for children in nodes]
        first_leaf = [first_leaf[children[0]] for children in nodes]
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
