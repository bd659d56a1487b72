"""What a worker tells of itself, as messages. Knows nothing about calls or how work is run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
import transformers

import homer
from homer.v1 import worker_pb2
from workers.budget import Budget
from workers.engine import LoadedModel
from workers.memory import accelerator_bytes, resident_bytes
from workers.runs import Counters
from workers.store import HeldRequest


def worker_info(
    model: LoadedModel, worker_id: str, budget: Budget, metrics_port: int
) -> worker_pb2.GetWorkerInfoResponse:
    """What does not change while a worker runs."""
    stack = model.stack
    config = stack.config
    return worker_pb2.GetWorkerInfoResponse(
        model=model.path,
        model_type=config.model_type,
        num_layers=stack.num_layers,
        hidden_size=stack.hidden_size,
        num_kv_heads=stack.cache_row.key[0],
        head_dim=stack.cache_row.key[1],
        vocab_size=stack.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        dtype=str(stack.dtype).removeprefix("torch."),
        device=", ".join(map(str, stack.devices)),
        calibrated=model.bias is not None,
        max_distance=model.max_distance,
        homer_version=homer.__version__,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        process_id=os.getpid(),
        worker_id=worker_id,
        memory_budget_bytes=budget.total_bytes,
        kv_bytes_per_token=stack.num_layers * stack.kv_bytes_per_row,
        metrics_port=metrics_port,
        loaded_layers=stack.loaded_layers,
        load_seconds=model.report.seconds,
        load_peak_bytes=model.report.peak_bytes,
    )


def worker_stats(
    held: Sequence[HeldRequest], budget: Budget, counters: Counters, running_calls: int
) -> worker_pb2.GetWorkerStatsResponse:
    """What it holds now, and what it has counted since it started."""
    return worker_pb2.GetWorkerStatsResponse(
        memory_budget_bytes=budget.total_bytes,
        reserved_bytes=budget.reserved_bytes,
        requests=len(held),
        node_states=sum(len(one.states) for one in held),
        kv_shards=sum(len(one.all_shards()) for one in held),
        state_bytes=sum(one.state_bytes for one in held),
        kv_shard_bytes=sum(one.kv_shard_bytes for one in held),
        running_calls=running_calls,
        sent_bytes=counters.sent_bytes,
        received_bytes=counters.received_bytes,
        leaves_done=counters.leaves_done,
        merges_done=counters.merges_done,
        generated_tokens=counters.generated_tokens,
        resident_bytes=resident_bytes(),
        accelerator_bytes=accelerator_bytes(),
        unix_seconds=time.time(),
        transfers=[
            worker_pb2.TransferStats(
                peer=peer, transport=transport, received_bytes=received, seconds=seconds
            )
            for (peer, transport), (received, seconds) in counters.transfers.items()
        ],
    )
