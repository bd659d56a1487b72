from homer.v1 import plan_pb2 as _plan_pb2
from homer.v1 import sampling_pb2 as _sampling_pb2
from homer.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeId(_message.Message):
    __slots__ = ("height", "index")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    height: int
    index: int
    def __init__(self, height: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class PlanSpec(_message.Message):
    __slots__ = ("prefix_len", "context_len", "suffix_len", "num_layers", "max_chunk_len", "target_len", "warmup_layers", "max_initial_chunk_len", "fan_in", "refresh_suffix", "plan", "score")
    PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LEN_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_LEN_FIELD_NUMBER: _ClassVar[int]
    TARGET_LEN_FIELD_NUMBER: _ClassVar[int]
    WARMUP_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_INITIAL_CHUNK_LEN_FIELD_NUMBER: _ClassVar[int]
    FAN_IN_FIELD_NUMBER: _ClassVar[int]
    REFRESH_SUFFIX_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    prefix_len: int
    context_len: int
    suffix_len: int
    num_layers: int
    max_chunk_len: int
    target_len: int
    warmup_layers: int
    max_initial_chunk_len: int
    fan_in: int
    refresh_suffix: bool
    plan: _plan_pb2.PlanKind
    score: str
    def __init__(self, prefix_len: _Optional[int] = ..., context_len: _Optional[int] = ..., suffix_len: _Optional[int] = ..., num_layers: _Optional[int] = ..., max_chunk_len: _Optional[int] = ..., target_len: _Optional[int] = ..., warmup_layers: _Optional[int] = ..., max_initial_chunk_len: _Optional[int] = ..., fan_in: _Optional[int] = ..., refresh_suffix: _Optional[bool] = ..., plan: _Optional[_Union[_plan_pb2.PlanKind, str]] = ..., score: _Optional[str] = ...) -> None: ...

class RequestSpec(_message.Message):
    __slots__ = ("request_id", "plan", "prefix_ids", "suffix_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_IDS_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    plan: PlanSpec
    prefix_ids: _containers.RepeatedScalarFieldContainer[int]
    suffix_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., plan: _Optional[_Union[PlanSpec, _Mapping]] = ..., prefix_ids: _Optional[_Iterable[int]] = ..., suffix_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RunSubtreeRequest(_message.Message):
    __slots__ = ("request", "node", "attempt", "context_ids", "report_seconds", "report_kept")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    REPORT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REPORT_KEPT_FIELD_NUMBER: _ClassVar[int]
    request: RequestSpec
    node: NodeId
    attempt: int
    context_ids: _containers.RepeatedScalarFieldContainer[int]
    report_seconds: float
    report_kept: bool
    def __init__(self, request: _Optional[_Union[RequestSpec, _Mapping]] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ..., context_ids: _Optional[_Iterable[int]] = ..., report_seconds: _Optional[float] = ..., report_kept: _Optional[bool] = ...) -> None: ...

class RunSubtreeResponse(_message.Message):
    __slots__ = ("node", "context_tokens_in", "context_tokens_out", "compute_seconds", "started_unix_seconds", "before", "kept_runs")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_OUT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    KEPT_RUNS_FIELD_NUMBER: _ClassVar[int]
    node: NodeId
    context_tokens_in: int
    context_tokens_out: int
    compute_seconds: float
    started_unix_seconds: float
    before: _containers.RepeatedCompositeFieldContainer[RunSubtreeResponse]
    kept_runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, node: _Optional[_Union[NodeId, _Mapping]] = ..., context_tokens_in: _Optional[int] = ..., context_tokens_out: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., started_unix_seconds: _Optional[float] = ..., before: _Optional[_Iterable[_Union[RunSubtreeResponse, _Mapping]]] = ..., kept_runs: _Optional[_Iterable[int]] = ...) -> None: ...

class NodeLocation(_message.Message):
    __slots__ = ("node", "address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: NodeId
    address: str
    def __init__(self, node: _Optional[_Union[NodeId, _Mapping]] = ..., address: _Optional[str] = ...) -> None: ...

class MergeRequest(_message.Message):
    __slots__ = ("request", "node", "attempt", "children")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    request: RequestSpec
    node: NodeId
    attempt: int
    children: _containers.RepeatedCompositeFieldContainer[NodeLocation]
    def __init__(self, request: _Optional[_Union[RequestSpec, _Mapping]] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ..., children: _Optional[_Iterable[_Union[NodeLocation, _Mapping]]] = ...) -> None: ...

class MergeResponse(_message.Message):
    __slots__ = ("node", "context_tokens_in", "context_tokens_out", "compute_seconds", "transfer_seconds", "received_bytes", "context_indices", "started_unix_seconds", "transfer_started_unix_seconds")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_OUT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_INDICES_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    node: NodeId
    context_tokens_in: int
    context_tokens_out: int
    compute_seconds: float
    transfer_seconds: float
    received_bytes: int
    context_indices: _containers.RepeatedScalarFieldContainer[int]
    started_unix_seconds: float
    transfer_started_unix_seconds: float
    def __init__(self, node: _Optional[_Union[NodeId, _Mapping]] = ..., context_tokens_in: _Optional[int] = ..., context_tokens_out: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., transfer_seconds: _Optional[float] = ..., received_bytes: _Optional[int] = ..., context_indices: _Optional[_Iterable[int]] = ..., started_unix_seconds: _Optional[float] = ..., transfer_started_unix_seconds: _Optional[float] = ...) -> None: ...

class FetchStateRequest(_message.Message):
    __slots__ = ("request_id", "node", "attempt", "transfer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    node: NodeId
    attempt: int
    transfer: _tensor_pb2.TransferOptions
    def __init__(self, request_id: _Optional[str] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ..., transfer: _Optional[_Union[_tensor_pb2.TransferOptions, _Mapping]] = ...) -> None: ...

class GatherKvRequest(_message.Message):
    __slots__ = ("request_id", "node", "attempt", "context_indices", "transfer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_INDICES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    node: NodeId
    attempt: int
    context_indices: _containers.RepeatedScalarFieldContainer[int]
    transfer: _tensor_pb2.TransferOptions
    def __init__(self, request_id: _Optional[str] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ..., context_indices: _Optional[_Iterable[int]] = ..., transfer: _Optional[_Union[_tensor_pb2.TransferOptions, _Mapping]] = ...) -> None: ...

class GenerateTokensRequest(_message.Message):
    __slots__ = ("request", "node", "attempt", "shard_addresses", "sampling", "delivered")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SHARD_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    request: RequestSpec
    node: NodeId
    attempt: int
    shard_addresses: _containers.RepeatedScalarFieldContainer[str]
    sampling: _sampling_pb2.SamplingParams
    delivered: _containers.RepeatedCompositeFieldContainer[DeliveredTokens]
    def __init__(self, request: _Optional[_Union[RequestSpec, _Mapping]] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ..., shard_addresses: _Optional[_Iterable[str]] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., delivered: _Optional[_Iterable[_Union[DeliveredTokens, _Mapping]]] = ...) -> None: ...

class DeliveredTokens(_message.Message):
    __slots__ = ("token_ids", "ended")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ended: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., ended: _Optional[bool] = ...) -> None: ...

class GenerateTokensResponse(_message.Message):
    __slots__ = ("cache_ready", "token", "summary")
    CACHE_READY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    cache_ready: CacheReady
    token: TokenPiece
    summary: GenerateTokensSummary
    def __init__(self, cache_ready: _Optional[_Union[CacheReady, _Mapping]] = ..., token: _Optional[_Union[TokenPiece, _Mapping]] = ..., summary: _Optional[_Union[GenerateTokensSummary, _Mapping]] = ...) -> None: ...

class CacheReady(_message.Message):
    __slots__ = ("cache_tokens", "gather_seconds", "refresh_seconds", "received_bytes", "context_indices", "started_unix_seconds")
    CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GATHER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_INDICES_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    cache_tokens: int
    gather_seconds: float
    refresh_seconds: float
    received_bytes: int
    context_indices: _containers.RepeatedScalarFieldContainer[int]
    started_unix_seconds: float
    def __init__(self, cache_tokens: _Optional[int] = ..., gather_seconds: _Optional[float] = ..., refresh_seconds: _Optional[float] = ..., received_bytes: _Optional[int] = ..., context_indices: _Optional[_Iterable[int]] = ..., started_unix_seconds: _Optional[float] = ...) -> None: ...

class TokenPiece(_message.Message):
    __slots__ = ("token_id", "answer", "logprob", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    answer: int
    logprob: _sampling_pb2.TokenLogprob
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., answer: _Optional[int] = ..., logprob: _Optional[_Union[_sampling_pb2.TokenLogprob, _Mapping]] = ..., top_logprobs: _Optional[_Iterable[_Union[_sampling_pb2.TokenLogprob, _Mapping]]] = ...) -> None: ...

class GenerateTokensSummary(_message.Message):
    __slots__ = ("generated_tokens", "finish_reason", "decode_seconds", "started_unix_seconds", "answer")
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    generated_tokens: int
    finish_reason: _sampling_pb2.FinishReason
    decode_seconds: float
    started_unix_seconds: float
    answer: int
    def __init__(self, generated_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ..., decode_seconds: _Optional[float] = ..., started_unix_seconds: _Optional[float] = ..., answer: _Optional[int] = ...) -> None: ...

class EndAnswerRequest(_message.Message):
    __slots__ = ("request_id", "answer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    answer: int
    def __init__(self, request_id: _Optional[str] = ..., answer: _Optional[int] = ...) -> None: ...

class EndAnswerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("request_id", "node", "attempt", "context_indices", "context_start", "context_end")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_INDICES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_START_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_END_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    node: NodeId
    attempt: int
    context_indices: _containers.RepeatedScalarFieldContainer[int]
    context_start: int
    context_end: int
    def __init__(self, request_id: _Optional[str] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ..., context_indices: _Optional[_Iterable[int]] = ..., context_start: _Optional[int] = ..., context_end: _Optional[int] = ...) -> None: ...

class PruneResponse(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("request_id", "node", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    node: NodeId
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., node: _Optional[_Union[NodeId, _Mapping]] = ..., attempt: _Optional[int] = ...) -> None: ...

class DropResponse(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ("keep_request_ids",)
    KEEP_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    keep_request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keep_request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ResetResponse(_message.Message):
    __slots__ = ("released_requests", "freed_bytes")
    RELEASED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    released_requests: int
    freed_bytes: int
    def __init__(self, released_requests: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class GetWorkerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkerInfoResponse(_message.Message):
    __slots__ = ("model", "model_type", "num_layers", "hidden_size", "num_kv_heads", "head_dim", "vocab_size", "max_position_embeddings", "dtype", "device", "calibrated", "max_distance", "homer_version", "torch_version", "transformers_version", "process_id", "worker_id", "kv_bytes_per_token", "memory_budget_bytes", "metrics_port", "loaded_layers", "load_seconds", "load_peak_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITION_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    MAX_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    HOMER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMERS_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    METRICS_PORT_FIELD_NUMBER: _ClassVar[int]
    LOADED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    device: str
    calibrated: bool
    max_distance: int
    homer_version: str
    torch_version: str
    transformers_version: str
    process_id: int
    worker_id: str
    kv_bytes_per_token: int
    memory_budget_bytes: int
    metrics_port: int
    loaded_layers: int
    load_seconds: float
    load_peak_bytes: int
    def __init__(self, model: _Optional[str] = ..., model_type: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_position_embeddings: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., calibrated: _Optional[bool] = ..., max_distance: _Optional[int] = ..., homer_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., transformers_version: _Optional[str] = ..., process_id: _Optional[int] = ..., worker_id: _Optional[str] = ..., kv_bytes_per_token: _Optional[int] = ..., memory_budget_bytes: _Optional[int] = ..., metrics_port: _Optional[int] = ..., loaded_layers: _Optional[int] = ..., load_seconds: _Optional[float] = ..., load_peak_bytes: _Optional[int] = ...) -> None: ...

class GetWorkerStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("peer", "transport", "received_bytes", "seconds")
    PEER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    peer: str
    transport: str
    received_bytes: int
    seconds: float
    def __init__(self, peer: _Optional[str] = ..., transport: _Optional[str] = ..., received_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class GetWorkerStatsResponse(_message.Message):
    __slots__ = ("requests", "node_states", "kv_shards", "state_bytes", "kv_shard_bytes", "running_calls", "sent_bytes", "received_bytes", "leaves_done", "merges_done", "generated_tokens", "resident_bytes", "accelerator_bytes", "unix_seconds", "transfers", "memory_budget_bytes", "reserved_bytes")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NODE_STATES_FIELD_NUMBER: _ClassVar[int]
    KV_SHARDS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CALLS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEAVES_DONE_FIELD_NUMBER: _ClassVar[int]
    MERGES_DONE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    requests: int
    node_states: int
    kv_shards: int
    state_bytes: int
    kv_shard_bytes: int
    running_calls: int
    sent_bytes: int
    received_bytes: int
    leaves_done: int
    merges_done: int
    generated_tokens: int
    resident_bytes: int
    accelerator_bytes: int
    unix_seconds: float
    transfers: _containers.RepeatedCompositeFieldContainer[TransferStats]
    memory_budget_bytes: int
    reserved_bytes: int
    def __init__(self, requests: _Optional[int] = ..., node_states: _Optional[int] = ..., kv_shards: _Optional[int] = ..., state_bytes: _Optional[int] = ..., kv_shard_bytes: _Optional[int] = ..., running_calls: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., leaves_done: _Optional[int] = ..., merges_done: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., accelerator_bytes: _Optional[int] = ..., unix_seconds: _Optional[float] = ..., transfers: _Optional[_Iterable[_Union[TransferStats, _Mapping]]] = ..., memory_budget_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ...) -> None: ...
