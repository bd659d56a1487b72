"""Narrower types on the wire: only where asked for, few bytes, small errors."""

from __future__ import annotations

import pytest
import torch

from homer.errors import ConfigError
from homer.v1 import tensor_pb2
from tests.golden_cases import GoldenCase, model_dir
from tests.workers.processes import Prompt, release, run_across, running_workers
from tests.workers.test_across import plan_of
from workers.options import WIRE_DTYPES, WorkerOptions
from workers.tensor_stream import NamedTensor, Spec
from workers.wire_bench import measure
from workers.wire_format import WireFormat

# The largest error of one number, in terms of the largest number of its row.
WORST = {"auto": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float8": 2.0**-4}


def there_and_back(name: str, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """What comes out at the other end, and the bytes that travelled."""
    named = [NamedTensor(f"t{number}", tensor) for number, tensor in enumerate(tensors)]
    options = tensor_pb2.TransferOptions()
    WireFormat.named(name).ask(options)
    wire = WireFormat.asked_for(options)
    specs = [Spec.of(one) for one in named]
    travelling = wire.specs(specs)
    sent = list(wire.encode(specs, tensors))
    assert [Spec.of(NamedTensor(s.name, t)) for s, t in zip(travelling, sent, strict=True)] == (
        travelling
    )
    decoder = wire.decoder(tensors[0].dtype)
    out = [
        one.tensor
        for spec, tensor in zip(travelling, sent, strict=True)
        for one in decoder.take([NamedTensor(spec.name, tensor)])
    ]
    return out, sum(spec.nbytes for spec in travelling)


@pytest.mark.parametrize("name", WIRE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_come_back_as_near_as_their_type_allows(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [torch.randn(3, 40, 16).mul(100).to(dtype), torch.randn(5, 64).to(dtype)]
    given[0][1, 2] = 0
    received, wire_bytes = there_and_back(name, given)
    narrower = WireFormat.named(name).dtype
    for before, after in zip(given, received, strict=True):
        assert after.dtype == dtype
        largest = before.float().abs().amax(-1, keepdim=True)
        if narrower is None or narrower.itemsize >= dtype.itemsize:
            assert torch.equal(before, after)
        else:
            rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
            assert (
                (before.float() - after.float()).abs() <= largest * (WORST[name] + rounding)
            ).all()
            assert not torch.equal(before, after)
    numbers = sum(tensor.numel() for tensor in given)
    rows = sum(tensor.numel() // tensor.shape[-1] for tensor in given)
    width = min(dtype.itemsize, narrower.itemsize if narrower else 8)
    assert wire_bytes == numbers * width + (rows * 4 if width == 1 else 0)


@pytest.mark.parametrize("name", WIRE_DTYPES)
def test_indices_and_empty_tensors_travel_as_they_are(name: str) -> None:
    given = [torch.empty(2, 0, 4), torch.tensor(3.25), torch.arange(70_000, 70_009).int()]
    received, _ = there_and_back(name, given)
    assert all(torch.equal(a, b) for a, b in zip(given, received, strict=True))


def test_what_is_too_large_stays_finite() -> None:
    (received,), _ = there_and_back("float16", [torch.tensor([[1e30, -1e30, 1.0]])])
    assert received.tolist() == [[65504.0, -65504.0, 1.0]]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="wire_dtype"):
        WorkerOptions(model="m", wire_dtype="int4")


@pytest.mark.parametrize("name", ["bfloat16", "float8"])
def test_workers_that_ask_for_it_get_fewer_bytes(name: str) -> None:
    case = GoldenCase.load("a_16c")
    plan = plan_of(case, "refreshed")
    received = {}
    for wire_dtype in ("auto", name):
        with running_workers(model_dir("A"), "--wire-dtype", wire_dtype, count=2) as workers:
            prompt = Prompt.of(wire_dtype, plan, case.parts)
            answer = run_across(prompt, workers, 1, max_tokens=4)
            assert len(answer.tokens) == 4
            assert len(answer.ready.context_indices) == plan.root.context_out
            received[wire_dtype] = sum(worker.stats().received_bytes for worker in workers)
            release(prompt, workers)
    # Half, and positions and indices; a quarter, scales, and those.
    assert received[name] < received["auto"] * {"bfloat16": 0.56, "float8": 0.45}[name]


def test_the_bench_says_what_each_format_costs() -> None:
    auto, bfloat16, float16, float8 = measure(prompts=2, context_tokens=900, max_new_tokens=4)
    assert [cost.wire_dtype for cost in (auto, bfloat16, float16, float8)] == list(WIRE_DTYPES)
    assert (auto.worst_logit_difference, auto.token_agreement, auto.kept_agreement) == (0, 1, 1)
    assert auto.share_of_bytes == 1
    assert 0 < float16.mean_logit_difference < bfloat16.mean_logit_difference
    assert bfloat16.mean_logit_difference < float8.mean_logit_difference < 1
    assert bfloat16.share_of_bytes == float16.share_of_bytes < 0.52
    assert float8.share_of_bytes < 0.32
