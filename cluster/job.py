"""The nouns of scheduling: a job, its events, what a worker can do and what it answers.

Plain dataclasses and a protocol, so that the scheduler runs against real workers, fakes and
simulated ones alike. Knows nothing about Ray, gRPC or tensors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from homer.plan import MergePlan, NodeId

Outcome = Literal["finished", "failed", "cancelled", "refused"]
Stop = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings as they travel; they mean what `homer.sampling.SamplingParams` says."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None


class JobSpans(Protocol):
    """Spans of a job: what its calls carry as metadata, and what closes them."""

    def below(self, node: NodeId | None) -> Sequence[tuple[str, str]]:
        """Of a call whose spans belong below `node`; None is the request itself."""
        ...

    def above(self, node: NodeId) -> Sequence[tuple[str, str]]:
        """Of a call that runs the whole subtree under `node`."""
        ...

    def node_done(self, worker: str, done: NodeDone) -> None: ...

    def end(self, outcome: Outcome, summary: JobSummary | None) -> None: ...


@dataclass(frozen=True)
class Job:
    """One request: a plan and the token ids that it is for.

    From its one cache come as many `answers` as are wanted. Of two requests that wait, the one of
    higher `priority` goes first; each also rises with its age. Workers may report finished nodes
    together, up to `report_seconds` after each other. Where `with_evidence` is set they tell which
    tokens each node kept.
    """

    request_id: str
    plan: MergePlan
    prefix_ids: Sequence[int]
    context_ids: Sequence[int]
    suffix_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    answers: int = 1
    priority: int = 0
    # What traces it, where something does.
    spans: JobSpans | None = field(default=None, compare=False, repr=False)
    report_seconds: float = 0.0
    with_evidence: bool = False


@dataclass(frozen=True)
class NodeDone:
    """A worker finished a node, in `seconds` of its own clock from `started_unix_seconds` on.

    `kept_runs`, where asked for, are the context tokens that it keeps: lengths of runs, in turn
    dropped and kept, from the start of its span on.
    """

    node: NodeId
    context_in: int
    context_out: int
    seconds: float
    # By the worker's clock; 0 where it was not told.
    started_unix_seconds: float = field(default=0.0, kw_only=True)
    kept_runs: Sequence[int] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class MergeDone(NodeDone):
    """A worker finished a merge; `context_indices` are the survivors, ascending."""

    transfer_seconds: float
    received_bytes: int
    context_indices: Sequence[int]
    transfer_started_unix_seconds: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class CacheReady:
    """The root worker has gathered the final cache."""

    cache_tokens: int
    gather_seconds: float
    refresh_seconds: float
    received_bytes: int
    context_indices: Sequence[int]
    started_unix_seconds: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, by the model alone."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenOut:
    """One generated token of an answer; what it was chosen from where that is asked for."""

    token_id: int
    answer: int = 0
    logprob: Logprob | None = None
    top_logprobs: Sequence[Logprob] = ()


@dataclass(frozen=True)
class GenerateDone:
    """An answer is complete."""

    generated_tokens: int
    finish_reason: Stop
    decode_seconds: float
    started_unix_seconds: float = field(default=0.0, kw_only=True)
    answer: int = field(default=0, kw_only=True)


GenerateEvent = CacheReady | TokenOut | GenerateDone


@dataclass(frozen=True)
class JobProgress:
    """A node of a job is done, and where the job stands."""

    done: NodeDone
    worker: str
    # The part of the context below the node.
    context_start: int
    context_end: int
    leaves_done: int
    leaves_total: int
    merges_done: int
    merges_total: int


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """Wall-clock seconds of each stage, one after the other.

    `leaves` ends with the last leaf, `merges` with the root, `gather` with the complete cache;
    `time_to_first_token` counts from submission.
    """

    queue: float
    leaves: float
    merges: float
    gather: float
    time_to_first_token: float
    decode: float
    total: float


@dataclass(frozen=True)
class JobSummary:
    """The last event of a job: tokens of all its answers, and why each of them ended."""

    generated_tokens: int
    finish_reasons: Sequence[Stop]
    kept_tokens: int
    context_indices: Sequence[int]
    seconds: StageSeconds
    moved_bytes: int
    nodes_by_worker: dict[str, int]
    # With evidence: of each node the result that counts, and the worker that it came from.
    evidence: Mapping[NodeId, tuple[str, NodeDone]] = field(default_factory=dict)

    @property
    def finish_reason(self) -> Stop:
        """Of the first answer."""
        return self.finish_reasons[0]


JobEvent = JobProgress | CacheReady | TokenOut | JobSummary


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker is."""

    model: str
    model_type: str
    num_layers: int
    vocab_size: int
    max_position_embeddings: int
    device: str
    dtype: str
    calibrated: bool
    max_distance: int
    # All layers of one token; 0 where a worker does not say.
    kv_bytes_per_token: int = 0
    memory_budget_bytes: int = 0
    # Where its metrics are; 0 where it serves none.
    metrics_port: int = 0
    # 0 where it does not say.
    loaded_layers: int = 0

    @property
    def lowest_layers(self) -> int | None:
        """How many of the lowest layers it has; None is all."""
        return self.loaded_layers if 0 < self.loaded_layers < self.num_layers else None


@dataclass(frozen=True)
class TransferStats:
    """What a worker has received from the one at `peer`, by one transport."""

    peer: str
    transport: str
    received_bytes: int
    seconds: float


@dataclass(frozen=True)
class WorkerStats:
    """What a worker holds now."""

    requests: int
    node_states: int
    kv_shards: int
    state_bytes: int
    kv_shard_bytes: int
    running_calls: int
    sent_bytes: int = 0
    received_bytes: int = 0
    leaves_done: int = 0
    merges_done: int = 0
    generated_tokens: int = 0
    resident_bytes: int = 0
    accelerator_bytes: int = 0
    # Its clock when it answered; 0 where it was not told.
    unix_seconds: float = 0.0
    memory_budget_bytes: int = 0
    reserved_bytes: int = 0
    transfers: Sequence[TransferStats] = ()


@dataclass(frozen=True, kw_only=True)
class SchedulerLoad:
    """What a scheduler has to do now. A job is queued until something of it has started.

    `growing_jobs` of the queued ones wait for a larger pool, whose memory they need.
    """

    running_jobs: int
    queued_jobs: int
    queued_tokens: int
    busy_workers: tuple[str, ...]
    idle_workers: tuple[str, ...]
    draining_workers: tuple[str, ...]
    growing_jobs: int = 0


class WorkerClient(Protocol):
    """One worker, as the scheduler sees it.

    Calls raise `WorkerLostError` when the worker does not answer, `PeerCallError` when it could not
    get what it needs from another, `WorkerCallError` for a fault of the worker, and `PromptError`
    for a mistake in the request. Cancelling a call stops its work.
    """

    @property
    def name(self) -> str:
        """Unique among all workers there ever were: "worker-3", after a restart "worker-3.1"."""
        ...

    @property
    def address(self) -> str: ...

    async def info(self) -> WorkerInfo: ...

    async def stats(self) -> WorkerStats: ...

    def run_subtree(self, job: Job, node: NodeId, attempt: int) -> AsyncIterator[NodeDone]: ...

    async def merge(
        self, job: Job, node: NodeId, attempt: int, children: Sequence[tuple[NodeId, str]]
    ) -> MergeDone:
        """Merge `children`, each with the address of its worker, empty for this one."""
        ...

    async def prune(
        self, job: Job, node: NodeId, attempt: int, context_indices: Sequence[int]
    ) -> None: ...

    def generate(
        self,
        job: Job,
        attempt: int,
        shard_addresses: Sequence[str],
        delivered: Sequence[Sequence[int] | None] = (),
    ) -> AsyncIterator[GenerateEvent]:
        """Answer; of each answer the `delivered` tokens are taken as given, and only others come.

        A `GenerateDone` for each answer. Of one that has ended (None) nothing is wanted or said.
        """
        ...

    async def end_answer(self, request_id: str, answer: int) -> None:
        """Decode an answer no further; nothing is said of it any more."""
        ...

    async def drop(self, request_id: str, node: NodeId, attempt: int) -> None:
        """Forget the subtree under `node`, itself included, and stop what runs for it.

        Nothing happens where a newer attempt is known; this one and older ones are refused later.
        """
        ...

    async def release(self, request_id: str) -> None: ...

    async def reset(self, keep_request_ids: Sequence[str] = ()) -> None:
        """Forget everything of every request but those named."""
        ...

    async def close(self) -> None: ...
