from homer.v1 import plan_pb2 as _plan_pb2
from homer.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_IDLE: _ClassVar[WorkerState]
    WORKER_STATE_BUSY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_SILENT: _ClassVar[WorkerState]
    WORKER_STATE_ABSENT: _ClassVar[WorkerState]

class RequestStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_STAGE_UNSPECIFIED: _ClassVar[RequestStage]
    REQUEST_STAGE_QUEUED: _ClassVar[RequestStage]
    REQUEST_STAGE_TREE: _ClassVar[RequestStage]
    REQUEST_STAGE_GATHER: _ClassVar[RequestStage]
    REQUEST_STAGE_DECODE: _ClassVar[RequestStage]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_IDLE: WorkerState
WORKER_STATE_BUSY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_SILENT: WorkerState
WORKER_STATE_ABSENT: WorkerState
REQUEST_STAGE_UNSPECIFIED: RequestStage
REQUEST_STAGE_QUEUED: RequestStage
REQUEST_STAGE_TREE: RequestStage
REQUEST_STAGE_GATHER: RequestStage
REQUEST_STAGE_DECODE: RequestStage

class TextPrompt(_message.Message):
    __slots__ = ("prefix", "context", "suffix")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    context: str
    suffix: str
    def __init__(self, prefix: _Optional[str] = ..., context: _Optional[str] = ..., suffix: _Optional[str] = ...) -> None: ...

class TokenPrompt(_message.Message):
    __slots__ = ("prefix_ids", "context_ids", "suffix_ids")
    PREFIX_IDS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_IDS_FIELD_NUMBER: _ClassVar[int]
    prefix_ids: _containers.RepeatedScalarFieldContainer[int]
    context_ids: _containers.RepeatedScalarFieldContainer[int]
    suffix_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prefix_ids: _Optional[_Iterable[int]] = ..., context_ids: _Optional[_Iterable[int]] = ..., suffix_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class CompressionOptions(_message.Message):
    __slots__ = ("max_chunk_len", "target_len", "warmup_layers", "max_initial_chunk_len", "fan_in", "refresh_suffix", "plan", "score")
    MAX_CHUNK_LEN_FIELD_NUMBER: _ClassVar[int]
    TARGET_LEN_FIELD_NUMBER: _ClassVar[int]
    WARMUP_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_INITIAL_CHUNK_LEN_FIELD_NUMBER: _ClassVar[int]
    FAN_IN_FIELD_NUMBER: _ClassVar[int]
    REFRESH_SUFFIX_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    max_chunk_len: int
    target_len: int
    warmup_layers: int
    max_initial_chunk_len: int
    fan_in: int
    refresh_suffix: bool
    plan: _plan_pb2.PlanKind
    score: str
    def __init__(self, max_chunk_len: _Optional[int] = ..., target_len: _Optional[int] = ..., warmup_layers: _Optional[int] = ..., max_initial_chunk_len: _Optional[int] = ..., fan_in: _Optional[int] = ..., refresh_suffix: _Optional[bool] = ..., plan: _Optional[_Union[_plan_pb2.PlanKind, str]] = ..., score: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "tokens", "sampling", "compression", "return_kept_indices", "priority", "return_evidence")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    RETURN_KEPT_INDICES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RETURN_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: TextPrompt
    tokens: TokenPrompt
    sampling: _sampling_pb2.SamplingParams
    compression: CompressionOptions
    return_kept_indices: bool
    priority: int
    return_evidence: bool
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[_Union[TextPrompt, _Mapping]] = ..., tokens: _Optional[_Union[TokenPrompt, _Mapping]] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., compression: _Optional[_Union[CompressionOptions, _Mapping]] = ..., return_kept_indices: _Optional[bool] = ..., priority: _Optional[int] = ..., return_evidence: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "token", "summary")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    token: Token
    summary: Summary
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class GenerateFromStreamRequest(_message.Message):
    __slots__ = ("request", "context_utf8", "context_ids")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_UTF8_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    context_utf8: bytes
    context_ids: TokenIds
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., context_utf8: _Optional[bytes] = ..., context_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateFromStreamResponse(_message.Message):
    __slots__ = ("accepted", "progress", "token", "summary")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    token: Token
    summary: Summary
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted_requests",)
    ABORTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    aborted_requests: int
    def __init__(self, aborted_requests: _Optional[int] = ...) -> None: ...

class CountTokensRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: TextPrompt
    def __init__(self, text: _Optional[_Union[TextPrompt, _Mapping]] = ...) -> None: ...

class CountTokensResponse(_message.Message):
    __slots__ = ("prefix_tokens", "context_tokens", "suffix_tokens")
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefix_tokens: int
    context_tokens: int
    suffix_tokens: int
    def __init__(self, prefix_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., suffix_tokens: _Optional[int] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "model_type", "dtype", "num_layers", "vocab_size", "model_window", "kv_bytes_per_token", "has_tokenizer", "calibrated", "max_context_tokens", "max_document_bytes", "max_message_bytes", "max_new_tokens", "max_answers", "compression")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_WINDOW_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_DOCUMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_type: str
    dtype: str
    num_layers: int
    vocab_size: int
    model_window: int
    kv_bytes_per_token: int
    has_tokenizer: bool
    calibrated: bool
    max_context_tokens: int
    max_document_bytes: int
    max_message_bytes: int
    max_new_tokens: int
    max_answers: int
    compression: CompressionOptions
    def __init__(self, model: _Optional[str] = ..., model_type: _Optional[str] = ..., dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., vocab_size: _Optional[int] = ..., model_window: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., has_tokenizer: _Optional[bool] = ..., calibrated: _Optional[bool] = ..., max_context_tokens: _Optional[int] = ..., max_document_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_answers: _Optional[int] = ..., compression: _Optional[_Union[CompressionOptions, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "prompt_tokens", "leaves", "levels", "merges", "subtrees", "uncalibrated", "level_nodes", "context_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    SUBTREES_FIELD_NUMBER: _ClassVar[int]
    UNCALIBRATED_FIELD_NUMBER: _ClassVar[int]
    LEVEL_NODES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_tokens: int
    leaves: int
    levels: int
    merges: int
    subtrees: int
    uncalibrated: bool
    level_nodes: _containers.RepeatedScalarFieldContainer[int]
    context_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., leaves: _Optional[int] = ..., levels: _Optional[int] = ..., merges: _Optional[int] = ..., subtrees: _Optional[int] = ..., uncalibrated: _Optional[bool] = ..., level_nodes: _Optional[_Iterable[int]] = ..., context_tokens: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("kind", "height", "index", "worker", "leaves_done", "leaves_total", "merges_done", "merges_total", "context_tokens_in", "context_tokens_out", "seconds", "context_start", "context_end")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Progress.Kind]
        KIND_LEAF: _ClassVar[Progress.Kind]
        KIND_MERGE: _ClassVar[Progress.Kind]
        KIND_GATHER: _ClassVar[Progress.Kind]
    KIND_UNSPECIFIED: Progress.Kind
    KIND_LEAF: Progress.Kind
    KIND_MERGE: Progress.Kind
    KIND_GATHER: Progress.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LEAVES_DONE_FIELD_NUMBER: _ClassVar[int]
    LEAVES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MERGES_DONE_FIELD_NUMBER: _ClassVar[int]
    MERGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_OUT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_START_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_END_FIELD_NUMBER: _ClassVar[int]
    kind: Progress.Kind
    height: int
    index: int
    worker: str
    leaves_done: int
    leaves_total: int
    merges_done: int
    merges_total: int
    context_tokens_in: int
    context_tokens_out: int
    seconds: float
    context_start: int
    context_end: int
    def __init__(self, kind: _Optional[_Union[Progress.Kind, str]] = ..., height: _Optional[int] = ..., index: _Optional[int] = ..., worker: _Optional[str] = ..., leaves_done: _Optional[int] = ..., leaves_total: _Optional[int] = ..., merges_done: _Optional[int] = ..., merges_total: _Optional[int] = ..., context_tokens_in: _Optional[int] = ..., context_tokens_out: _Optional[int] = ..., seconds: _Optional[float] = ..., context_start: _Optional[int] = ..., context_end: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "text", "answer", "logprob", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    answer: int
    logprob: _sampling_pb2.TokenLogprob
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., answer: _Optional[int] = ..., logprob: _Optional[_Union[_sampling_pb2.TokenLogprob, _Mapping]] = ..., top_logprobs: _Optional[_Iterable[_Union[_sampling_pb2.TokenLogprob, _Mapping]]] = ...) -> None: ...

class StageSeconds(_message.Message):
    __slots__ = ("queue", "leaves", "merges", "gather", "time_to_first_token", "decode", "total")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    GATHER_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    queue: float
    leaves: float
    merges: float
    gather: float
    time_to_first_token: float
    decode: float
    total: float
    def __init__(self, queue: _Optional[float] = ..., leaves: _Optional[float] = ..., merges: _Optional[float] = ..., gather: _Optional[float] = ..., time_to_first_token: _Optional[float] = ..., decode: _Optional[float] = ..., total: _Optional[float] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("request_id", "prompt_tokens", "leaves", "kept_tokens", "generated_tokens", "finish_reason", "seconds", "moved_bytes", "kept_context_indices", "token_ids", "text", "nodes_by_worker", "evidence", "answers")
    class NodesByWorkerEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_CONTEXT_INDICES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NODES_BY_WORKER_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_tokens: int
    leaves: int
    kept_tokens: int
    generated_tokens: int
    finish_reason: _sampling_pb2.FinishReason
    seconds: StageSeconds
    moved_bytes: int
    kept_context_indices: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    nodes_by_worker: _containers.ScalarMap[str, int]
    evidence: Evidence
    answers: _containers.RepeatedCompositeFieldContainer[AnswerSummary]
    def __init__(self, request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., leaves: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ..., seconds: _Optional[_Union[StageSeconds, _Mapping]] = ..., moved_bytes: _Optional[int] = ..., kept_context_indices: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., nodes_by_worker: _Optional[_Mapping[str, int]] = ..., evidence: _Optional[_Union[Evidence, _Mapping]] = ..., answers: _Optional[_Iterable[_Union[AnswerSummary, _Mapping]]] = ...) -> None: ...

class AnswerSummary(_message.Message):
    __slots__ = ("generated_tokens", "finish_reason", "token_ids", "text")
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    generated_tokens: int
    finish_reason: _sampling_pb2.FinishReason
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    def __init__(self, generated_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("levels", "nodes", "passages", "token_start_steps")
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_STEPS_FIELD_NUMBER: _ClassVar[int]
    levels: _containers.RepeatedCompositeFieldContainer[LevelEvidence]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeEvidence]
    passages: _containers.RepeatedCompositeFieldContainer[Passage]
    token_start_steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, levels: _Optional[_Iterable[_Union[LevelEvidence, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeEvidence, _Mapping]]] = ..., passages: _Optional[_Iterable[_Union[Passage, _Mapping]]] = ..., token_start_steps: _Optional[_Iterable[int]] = ...) -> None: ...

class LevelEvidence(_message.Message):
    __slots__ = ("nodes", "layer_start", "layer_end", "context_tokens_in", "context_tokens_out")
    NODES_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_OUT_FIELD_NUMBER: _ClassVar[int]
    nodes: int
    layer_start: int
    layer_end: int
    context_tokens_in: int
    context_tokens_out: int
    def __init__(self, nodes: _Optional[int] = ..., layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., context_tokens_in: _Optional[int] = ..., context_tokens_out: _Optional[int] = ...) -> None: ...

class NodeEvidence(_message.Message):
    __slots__ = ("height", "index", "worker", "seconds", "context_start", "context_end", "context_tokens_in", "context_tokens_out", "kept_runs")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_START_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_END_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_OUT_FIELD_NUMBER: _ClassVar[int]
    KEPT_RUNS_FIELD_NUMBER: _ClassVar[int]
    height: int
    index: int
    worker: str
    seconds: float
    context_start: int
    context_end: int
    context_tokens_in: int
    context_tokens_out: int
    kept_runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, height: _Optional[int] = ..., index: _Optional[int] = ..., worker: _Optional[str] = ..., seconds: _Optional[float] = ..., context_start: _Optional[int] = ..., context_end: _Optional[int] = ..., context_tokens_in: _Optional[int] = ..., context_tokens_out: _Optional[int] = ..., kept_runs: _Optional[_Iterable[int]] = ...) -> None: ...

class Passage(_message.Message):
    __slots__ = ("token_start", "token_end", "char_start", "char_end", "text")
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    CHAR_START_FIELD_NUMBER: _ClassVar[int]
    CHAR_END_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_start: int
    token_end: int
    char_start: int
    char_end: int
    text: str
    def __init__(self, token_start: _Optional[int] = ..., token_end: _Optional[int] = ..., char_start: _Optional[int] = ..., char_end: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerWorker(_message.Message):
    __slots__ = ("name", "address", "device", "ready", "requests", "state_bytes", "kv_shard_bytes", "state", "resident_bytes", "accelerator_bytes", "memory_budget_bytes", "reserved_bytes", "leaves_done", "merges_done", "generated_tokens", "clock_ahead_seconds", "metrics_address", "problem", "loaded_layers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEAVES_DONE_FIELD_NUMBER: _ClassVar[int]
    MERGES_DONE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_AHEAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LOADED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    device: str
    ready: bool
    requests: int
    state_bytes: int
    kv_shard_bytes: int
    state: WorkerState
    resident_bytes: int
    accelerator_bytes: int
    memory_budget_bytes: int
    reserved_bytes: int
    leaves_done: int
    merges_done: int
    generated_tokens: int
    clock_ahead_seconds: float
    metrics_address: str
    problem: str
    loaded_layers: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., ready: _Optional[bool] = ..., requests: _Optional[int] = ..., state_bytes: _Optional[int] = ..., kv_shard_bytes: _Optional[int] = ..., state: _Optional[_Union[WorkerState, str]] = ..., resident_bytes: _Optional[int] = ..., accelerator_bytes: _Optional[int] = ..., memory_budget_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., leaves_done: _Optional[int] = ..., merges_done: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., clock_ahead_seconds: _Optional[float] = ..., metrics_address: _Optional[str] = ..., problem: _Optional[str] = ..., loaded_layers: _Optional[int] = ...) -> None: ...

class RequestStatus(_message.Message):
    __slots__ = ("request_id", "stage", "prompt_tokens", "leaves_done", "leaves_total", "merges_done", "merges_total", "generated_tokens", "seconds")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_DONE_FIELD_NUMBER: _ClassVar[int]
    LEAVES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MERGES_DONE_FIELD_NUMBER: _ClassVar[int]
    MERGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    stage: RequestStage
    prompt_tokens: int
    leaves_done: int
    leaves_total: int
    merges_done: int
    merges_total: int
    generated_tokens: int
    seconds: float
    def __init__(self, request_id: _Optional[str] = ..., stage: _Optional[_Union[RequestStage, str]] = ..., prompt_tokens: _Optional[int] = ..., leaves_done: _Optional[int] = ..., leaves_total: _Optional[int] = ..., merges_done: _Optional[int] = ..., merges_total: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("model", "homer_version", "num_layers", "model_window", "max_context_tokens", "max_chunk_len", "target_len", "warmup_layers", "calibrated", "workers", "running_requests", "queued_requests", "queued_tokens", "requests", "metrics_address")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HOMER_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_WINDOW_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_LEN_FIELD_NUMBER: _ClassVar[int]
    TARGET_LEN_FIELD_NUMBER: _ClassVar[int]
    WARMUP_LAYERS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    model: str
    homer_version: str
    num_layers: int
    model_window: int
    max_context_tokens: int
    max_chunk_len: int
    target_len: int
    warmup_layers: int
    calibrated: bool
    workers: _containers.RepeatedCompositeFieldContainer[ServerWorker]
    running_requests: int
    queued_requests: int
    queued_tokens: int
    requests: _containers.RepeatedCompositeFieldContainer[RequestStatus]
    metrics_address: str
    def __init__(self, model: _Optional[str] = ..., homer_version: _Optional[str] = ..., num_layers: _Optional[int] = ..., model_window: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., max_chunk_len: _Optional[int] = ..., target_len: _Optional[int] = ..., warmup_layers: _Optional[int] = ..., calibrated: _Optional[bool] = ..., workers: _Optional[_Iterable[_Union[ServerWorker, _Mapping]]] = ..., running_requests: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RequestStatus, _Mapping]]] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("request_id", "outcome", "prompt_tokens", "leaves", "merges", "generated_tokens", "queued_unix_seconds", "started_unix_seconds", "first_token_unix_seconds", "ended_unix_seconds", "now_unix_seconds", "slices")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NOW_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    outcome: str
    prompt_tokens: int
    leaves: int
    merges: int
    generated_tokens: int
    queued_unix_seconds: float
    started_unix_seconds: float
    first_token_unix_seconds: float
    ended_unix_seconds: float
    now_unix_seconds: float
    slices: _containers.RepeatedCompositeFieldContainer[TraceSlice]
    def __init__(self, request_id: _Optional[str] = ..., outcome: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., leaves: _Optional[int] = ..., merges: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., queued_unix_seconds: _Optional[float] = ..., started_unix_seconds: _Optional[float] = ..., first_token_unix_seconds: _Optional[float] = ..., ended_unix_seconds: _Optional[float] = ..., now_unix_seconds: _Optional[float] = ..., slices: _Optional[_Iterable[_Union[TraceSlice, _Mapping]]] = ...) -> None: ...

class TraceNode(_message.Message):
    __slots__ = ("height", "index")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    height: int
    index: int
    def __init__(self, height: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class TraceSlice(_message.Message):
    __slots__ = ("kind", "worker", "node", "children", "started_unix_seconds", "seconds", "tokens_in", "tokens_out", "received_bytes", "lost")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[TraceSlice.Kind]
        KIND_LEAF: _ClassVar[TraceSlice.Kind]
        KIND_MERGE: _ClassVar[TraceSlice.Kind]
        KIND_TRANSFER: _ClassVar[TraceSlice.Kind]
        KIND_GATHER: _ClassVar[TraceSlice.Kind]
        KIND_REFRESH: _ClassVar[TraceSlice.Kind]
        KIND_DECODE: _ClassVar[TraceSlice.Kind]
    KIND_UNSPECIFIED: TraceSlice.Kind
    KIND_LEAF: TraceSlice.Kind
    KIND_MERGE: TraceSlice.Kind
    KIND_TRANSFER: TraceSlice.Kind
    KIND_GATHER: TraceSlice.Kind
    KIND_REFRESH: TraceSlice.Kind
    KIND_DECODE: TraceSlice.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_OUT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    kind: TraceSlice.Kind
    worker: str
    node: TraceNode
    children: _containers.RepeatedCompositeFieldContainer[TraceNode]
    started_unix_seconds: float
    seconds: float
    tokens_in: int
    tokens_out: int
    received_bytes: int
    lost: bool
    def __init__(self, kind: _Optional[_Union[TraceSlice.Kind, str]] = ..., worker: _Optional[str] = ..., node: _Optional[_Union[TraceNode, _Mapping]] = ..., children: _Optional[_Iterable[_Union[TraceNode, _Mapping]]] = ..., started_unix_seconds: _Optional[float] = ..., seconds: _Optional[float] = ..., tokens_in: _Optional[int] = ..., tokens_out: _Optional[int] = ..., received_bytes: _Optional[int] = ..., lost: _Optional[bool] = ...) -> None: ...
