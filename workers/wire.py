"""Between `homer.v1` messages and tensors on one side and `homer`'s own types on the other.

What needs no torch is in `plan_wire`. Knows nothing about calls, jobs or what is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from homer.context import KVRows
from homer.errors import PromptError, StateError
from homer.generation import FinishReason
from homer.plan import MergePlan, NodeId, PlanNode
from homer.sampling import SamplingParams
from homer.stack import LayerStack
from homer.state import KVShard, LayerKV, NodeState, rows_of
from homer.v1 import sampling_pb2, worker_pb2
from workers import plan_wire
from workers.errors import TensorStreamError
from workers.staging import Places
from workers.tensor_stream import NamedTensor, Spec
from workers.wire_format import WireFormat

# A plan is made before the context is seen: this bounds what a small message can make us build.
MAX_CONTEXT_TOKENS = 1 << 26

FINISH_REASONS = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
}


def read_plan(spec: worker_pb2.PlanSpec, stack: LayerStack) -> MergePlan:
    """The plan that a request was cut by.

    Raises
    ------
    PlanError, ConfigError
        When there is no such plan.
    PromptError
        When the context is too long to plan.
    StateError
        When it was made for another model.
    """
    if spec.num_layers != stack.num_layers:
        raise StateError(
            f"the plan was made for {spec.num_layers} layers, but this worker's model has "
            f"{stack.num_layers}; every worker has to load the same model"
        )
    if spec.context_len > MAX_CONTEXT_TOKENS:
        raise PromptError(
            f"the context has {spec.context_len} tokens; at most {MAX_CONTEXT_TOKENS} can be run"
        )
    return plan_wire.read_plan(spec)


def read_sampling(params: sampling_pb2.SamplingParams) -> SamplingParams:
    """Sampling settings, with the defaults where a field is not set.

    Raises
    ------
    ConfigError
        When a setting is out of its range.
    """
    given: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
    }
    given = {name: value for name, value in given.items() if value}
    for name in ("seed", "logprobs"):
        if params.HasField(name):
            given[name] = getattr(params, name)
    return SamplingParams(**given)


def state_tensors(state: NodeState) -> list[NamedTensor]:
    """What a parent needs of a state, as it travels."""
    tensors = [
        NamedTensor("hidden", state.hidden),
        NamedTensor("position_ids", state.position_ids.to(torch.int32)),
        NamedTensor("context_indices", state.context_indices.to(torch.int32)),
    ]
    for layer, (keys, values) in enumerate(state.suffix_kv or ()):
        tensors.append(NamedTensor(f"suffix_keys.{layer}", keys))
        tensors.append(NamedTensor(f"suffix_values.{layer}", values))
    return tensors


def state_specs(plan: MergePlan, node: PlanNode, stack: LayerStack) -> list[Spec]:
    """What `state_tensors` of a node other than the root must be: the plan knows every shape."""
    rows = node.context_out + plan.suffix_len
    specs = [
        Spec("hidden", stack.dtype, (rows, stack.hidden_size)),
        Spec("position_ids", torch.int32, (rows,)),
        Spec("context_indices", torch.int32, (node.context_out,)),
    ]
    if not plan.refreshes_suffix:
        shapes = stack.cache_row.shapes(plan.suffix_len)
        for layer in range(node.layer_end):
            for name, shape in zip(("suffix_keys", "suffix_values"), shapes, strict=True):
                specs.append(Spec(f"{name}.{layer}", stack.dtype, shape))
    return specs


def read_state(node: NodeId, tensors: Sequence[NamedTensor], places: Places) -> NodeState:
    """The state whose tensors came in the order of `state_specs`; it has no shards here."""
    hidden, position_ids, context_indices, *suffix = (
        named.tensor.to(places[named.name]) for named in tensors
    )
    suffix_kv: list[LayerKV] = list(zip(suffix[::2], suffix[1::2], strict=True))
    return NodeState(
        node=node,
        hidden=hidden,
        position_ids=position_ids.long(),
        context_indices=context_indices.long(),
        suffix_kv=suffix_kv or None,
    )


def must_equal(expected: Sequence[Spec]) -> Callable[[Sequence[Spec]], None]:
    """A check for `StreamReader`: the tensors announced are just these."""

    def check(announced: Sequence[Spec]) -> None:
        if list(announced) != list(expected):
            raise TensorStreamError(
                f"a worker sends {_describe(announced)}, but the plan needs {_describe(expected)}; "
                "every worker has to load the same model in the same type"
            )

    return check


def gather_tensors(
    shards: Sequence[KVShard], kept: torch.Tensor, stack: LayerStack
) -> tuple[list[Spec], Iterator[torch.Tensor]]:
    """The rows of `shards` whose context index is in `kept`, as they travel.

    For each layer `keys.N` and `values.N`; before them, where the rows differ from those of the
    layer before, `indices.N`. Tensors are made one at a time, as they are asked for.
    """
    chosen = [(shard, rows_of(shard.context_indices, kept)) for shard in shards]
    specs: list[Spec] = []
    makers: list[Callable[[], torch.Tensor]] = []
    previous: torch.Tensor | None = None
    for layer in range(stack.num_layers):
        here = [(s, rows) for s, rows in chosen if s.layer_start <= layer < s.layer_end]
        parts = [shard.context_indices[rows] for shard, rows in here]
        indices = torch.cat(parts) if parts else kept[:0]
        if previous is None or not torch.equal(indices, previous):
            wire_indices = indices.to(torch.int32)
            specs.append(Spec(f"indices.{layer}", torch.int32, tuple(indices.shape)))
            makers.append(lambda tensor=wire_indices: tensor)  # type: ignore[misc]
            previous = indices
        pieces = [(*shard.layer(layer), rows) for shard, rows in here]
        shapes = stack.cache_row.shapes(len(indices))
        for which, (name, shape) in enumerate(zip(("keys", "values"), shapes, strict=True)):
            specs.append(Spec(f"{name}.{layer}", stack.dtype, shape))
            picked = [(piece[which], piece[2]) for piece in pieces]
            makers.append(lambda picked=picked, shape=shape: _pick(picked, shape, stack))  # type: ignore[misc]
    return specs, (make() for make in makers)


def _pick(
    picked: Sequence[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, ...], stack: LayerStack
) -> torch.Tensor:
    if not picked:
        return torch.empty(shape, dtype=stack.dtype)
    return torch.cat(
        [tensor.index_select(1, rows.to(tensor.device)) for tensor, rows in picked], dim=1
    )


def gather_check(
    stack: LayerStack, max_rows: int, wire: WireFormat
) -> Callable[[Sequence[Spec]], None]:
    """A check for `StreamReader`: the tensors announced are those of `gather_tensors` in `wire`."""

    def check(announced: Sequence[Spec]) -> None:
        expected: list[Spec] = []
        given = {spec.name: spec for spec in announced}
        rows = 0
        for layer in range(stack.num_layers):
            indices = given.get(f"indices.{layer}")
            if indices is not None and len(indices.shape) == 1 and indices.shape[0] <= max_rows:
                rows = indices.shape[0]
                expected.append(Spec(indices.name, torch.int32, (rows,)))
            for name, shape in zip(("keys", "values"), stack.cache_row.shapes(rows), strict=True):
                expected.append(Spec(f"{name}.{layer}", stack.dtype, shape))
        must_equal(wire.specs(expected))(announced)

    return check


class LayerRows:
    """Puts the tensors of a gather together to the rows of one layer after the other."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._indices = torch.empty(0, dtype=torch.int64)
        self._keys = torch.empty(0)

    def take(self, named: NamedTensor) -> tuple[int, KVRows] | None:
        """The next tensor; a layer and its rows when it completed them."""
        kind, layer = named.name.split(".")
        tensor = named.tensor.to(self._places[named.name])
        if kind == "indices":
            self._indices = tensor.long()
        elif kind == "keys":
            self._keys = tensor
        else:
            return int(layer), KVRows(self._indices, self._keys, tensor)
        return None


def _describe(specs: Sequence[Spec]) -> str:
    shown = ", ".join(f"{s.name} {str(s.dtype).removeprefix('torch.')}{s.shape}" for s in specs[:4])
    return f"{len(specs)} tensors ({shown}{', …' if len(specs) > 4 else ''})"
