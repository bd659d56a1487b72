"""What a call that runs work is about: its request, its node, and its job, found or begun.

Knows nothing about gRPC servers, or about what the work does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import aclosing
from functools import partial
from typing import Any

import torch

from homer.encode import TreeEncoder
from homer.errors import ModelError, PromptError, StateError
from homer.plan import NodeId, PlanNode
from homer.stack import LayerStack
from homer.v1 import worker_pb2
from workers.engine import LoadedModel
from workers.errors import StaleCallError
from workers.jobs import Job
from workers.plan_wire import read_node
from workers.store import HeldRequest, Store
from workers.wire import read_plan

Emit = Callable[[Any], None]

# Far more than a service lets anybody ask for: each takes a copy of the cache.
MOST_ANSWERS = 256


def open_node(
    store: Store,
    model: LoadedModel,
    spec: worker_pb2.RequestSpec,
    node: worker_pb2.NodeId,
) -> tuple[HeldRequest, PlanNode]:
    """The request of `spec`, new or held already, and a node of its plan.

    Raises
    ------
    PromptError, PlanError, StateError
        When the request is not what its plan says, another one has its id, or there is no such
        node.
    ModelError
        When the node runs layers that are not loaded here.
    """

    held = store.open(spec, partial(make_encoder, model, spec))
    found = find_node(held, node)
    if found.layer_end > model.stack.loaded_layers:
        raise ModelError(
            f"node {tuple(found.id)} runs layers up to {found.layer_end}, but this worker has only "
            f"the lowest {model.stack.loaded_layers} of {model.stack.num_layers}; use a worker "
            "with more layers"
        )
    return held, found


def read_delivered(
    request: worker_pb2.GenerateTokensRequest, count: int, max_new_tokens: int, stack: LayerStack
) -> tuple[tuple[int, ...] | None, ...]:
    """The beginnings of `count` answers that their callers have; None for those that have ended.

    Raises
    ------
    PromptError
        When there are more of them than answers, or they are no answers of this model; or when
        `count` is more than a worker gives.
    """
    begun = request.delivered
    if count > MOST_ANSWERS:
        raise PromptError(f"{count} answers are asked for; a worker gives at most {MOST_ANSWERS}")
    if len(begun) > count:
        raise PromptError(f"there are {count} answers, but {len(begun)} had begun")
    delivered = [None if answer.ended else tuple(answer.token_ids) for answer in begun]
    for ids in filter(None, delivered):
        stack.check_ids("delivered", torch.tensor(ids, dtype=torch.int64))
        if len(ids) > max_new_tokens:
            raise PromptError(
                f"an answer may have {max_new_tokens} tokens, but {len(ids)} were delivered already"
            )
    return (*delivered, *[()] * (count - len(begun)))


def make_encoder(model: LoadedModel, spec: worker_pb2.RequestSpec) -> TreeEncoder:
    """What runs the nodes of the request of `spec`.

    Raises
    ------
    PromptError, PlanError, StateError
        When the request is not what its plan says.
    """
    if not spec.request_id:
        raise PromptError("the request id is empty; give every request its own id")
    plan = read_plan(spec.plan, model.stack)
    for name, ids, length in (
        ("prefix_ids", spec.prefix_ids, plan.prefix_len),
        ("suffix_ids", spec.suffix_ids, plan.suffix_len),
    ):
        if len(ids) != length:
            raise PromptError(f"{name} has {len(ids)} tokens, but the plan was made for {length}")
    prefix_ids, suffix_ids = (
        torch.tensor(ids, dtype=torch.int64) for ids in (spec.prefix_ids, spec.suffix_ids)
    )
    return model.encoder(spec, plan, prefix_ids, suffix_ids)


def find_node(held: HeldRequest, node: worker_pb2.NodeId) -> PlanNode:
    """A node of the request's plan.

    Raises
    ------
    PromptError
        When the plan has no such node.
    """
    node_id = read_node(node)
    if node_id not in held.plan.by_id:
        raise PromptError(
            f"the plan has no node {tuple(node_id)}; its root is {tuple(held.plan.root.id)}"
        )
    return held.plan.by_id[node_id]


async def follow_job(
    store: Store,
    held: HeldRequest,
    kind: str,
    node: NodeId,
    attempt: int,
    work: Callable[[Emit], Awaitable[None]],
    variant: Hashable = None,
) -> AsyncGenerator[Any, None]:
    """The events of the job for a call: one that is there already, or a new one.

    A newer attempt takes over what is done, and starts what is running anew: it may know of
    other peers.

    Raises
    ------
    StaleCallError
        When a newer attempt is known, or this one was dropped.
    StateError
        When this attempt is known with another `variant`.
    """
    if kind == "node" and attempt <= held.dropped.get(node, -1):
        raise StaleCallError(f"attempt {attempt} for node {tuple(node)} was dropped here")
    job = held.jobs.get((kind, node))
    if job is not None and attempt < job.attempt:
        raise StaleCallError(
            f"attempt {attempt} for node {tuple(node)} is older than attempt {job.attempt}"
        )
    if job is not None and attempt == job.attempt and variant != job.variant:
        raise StateError(
            f"attempt {attempt} for node {tuple(node)} is known here with other arguments; "
            "give a newer attempt"
        )
    held_still = kind != "node" or node in held.states
    if job is not None and attempt > job.attempt:
        if job.done and held_still and variant == job.variant:
            job.attempt = attempt
        else:
            job.stop(f"attempt {attempt} for node {tuple(node)} has begun")
    if job is None or not (job.running or job.done):
        job = held.jobs[kind, node] = Job(attempt, variant, work)
    try:
        async with aclosing(job.follow()) as events:
            async for event in events:
                yield event
    finally:
        # A call that reached a worker late, and whose caller is gone, leaves no trace.
        if held.is_empty:
            store.forget(held)
