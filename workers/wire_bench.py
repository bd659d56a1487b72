"""What narrower types on the wire cost in accuracy, and the bytes that they save.

`python -m workers.wire_bench`: the demo model answers pass-key prompts as two workers would, the
last child of the root on one and its other children on the other. What would travel goes through
each format; everything is compared with what travels as it is.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from homer.context import CompressedContext, KVRows
from homer.demo import MODEL_DIR, tasks
from homer.encode import TreeEncoder
from homer.model import HomerModel
from homer.state import NodeState
from workers.options import WIRE_DTYPES
from workers.staging import Places
from workers.tensor_stream import NamedTensor, Spec
from workers.wire import LayerRows, gather_tensors, read_state, state_tensors
from workers.wire_format import WireFormat


@dataclass(frozen=True)
class WireCost:
    """One format over all prompts, beside everything as it is.

    Differences are of the logits of the first token; agreement is the share of equal ones, at the
    same place, among greedy tokens and among the context tokens that were kept.
    """

    wire_dtype: str
    prompts: int
    travelled_bytes: int
    share_of_bytes: float
    worst_logit_difference: float
    mean_logit_difference: float
    token_agreement: float
    kept_agreement: float


@dataclass
class _Answer:
    kept: set[int]
    logits: torch.Tensor
    tokens: list[int]
    travelled_bytes: int


def measure(
    model: str = str(MODEL_DIR),
    dtype: str = "float32",
    prompts: int = 20,
    context_tokens: int = 2000,
    max_new_tokens: int = 16,
) -> list[WireCost]:
    """The cost of every format for `model`, run on the CPU as `dtype`."""
    homer = HomerModel.from_pretrained(model, device="cpu", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers: dict[str, list[_Answer]] = {name: [] for name in WIRE_DTYPES}
    for seed in range(prompts):
        parts = _prompt(tokenizer, context_tokens, seed)
        for name in WIRE_DTYPES:
            answers[name].append(_answer(homer, WireFormat.named(name), parts, max_new_tokens))
    return [_cost(name, answers[name], answers["auto"]) for name in WIRE_DTYPES]


def _prompt(tokenizer: object, context_tokens: int, seed: int) -> list[torch.Tensor]:
    def ids(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special)["input_ids"]  # type: ignore[operator]

    sample = tasks.make_sample("passkey", context_tokens, lambda text: len(ids(text)), seed)
    return [
        torch.tensor(ids(sample.prefix, special=True)),
        torch.tensor(ids(sample.context)),
        torch.tensor(ids(sample.suffix)),
    ]


def _answer(
    homer: HomerModel, wire: WireFormat, parts: Sequence[torch.Tensor], max_new_tokens: int
) -> _Answer:
    prefix, context_ids, suffix = parts
    plan = homer.plan(len(prefix), len(context_ids), len(suffix))
    encoder = TreeEncoder(homer.stack, plan, prefix, suffix, homer.bias)
    children = []
    for child in plan.root.children:
        node = plan.by_id[child]
        children.append(
            encoder.run_subtree(child, context_ids[node.context_start : node.context_end])
        )
    way = _Way(homer, wire)
    there = [copy.copy(state) for state in children[:-1]]
    merged = [*(way.state(state) for state in there), children[-1]]
    root = encoder.merge(plan.root.id, merged)
    shards = [shard for state in there for shard in state.shards]
    specs, tensors = gather_tensors(shards, root.context_indices, homer.stack)
    rows: dict[int, KVRows] = {}
    layers = LayerRows(Places.of(homer.stack))
    for named in way.bring(specs, tensors):
        complete = layers.take(named)
        if complete is not None:
            rows[complete[0]] = complete[1]
    context: CompressedContext = encoder.finish(root, lambda layer: [rows.pop(layer)])
    tokens = homer.generate(context, max_new_tokens=max_new_tokens, ignore_eos=True)
    return _Answer(
        kept=set(context.context_indices.tolist()),
        logits=context.logits,
        tokens=tokens.tolist(),
        travelled_bytes=way.travelled_bytes,
    )


class _Way:
    """From the one worker to the other."""

    def __init__(self, homer: HomerModel, wire: WireFormat) -> None:
        self._stack, self._wire = homer.stack, wire
        self.travelled_bytes = 0

    def state(self, state: NodeState) -> NodeState:
        named = state_tensors(state)
        came = self.bring([Spec.of(one) for one in named], [one.tensor for one in named])
        return read_state(state.node, came, Places.of(self._stack))

    def bring(self, specs: Sequence[Spec], tensors: Iterable[torch.Tensor]) -> list[NamedTensor]:
        travelling = self._wire.specs(specs)
        self.travelled_bytes += sum(spec.nbytes for spec in travelling)
        sent = self._wire.encode(specs, tensors)
        decoder = self._wire.decoder(self._stack.dtype)
        return decoder.take(
            [NamedTensor(spec.name, tensor) for spec, tensor in zip(travelling, sent, strict=True)]
        )


def _cost(name: str, answers: Sequence[_Answer], exact: Sequence[_Answer]) -> WireCost:
    pairs = list(zip(answers, exact, strict=True))
    difference = torch.cat([(one.logits - other.logits).abs().flatten() for one, other in pairs])
    travelled, whole = (sum(one.travelled_bytes for one in many) for many in (answers, exact))
    tokens = [
        token == other_token
        for one, other in pairs
        for token, other_token in zip(one.tokens, other.tokens, strict=True)
    ]
    kept = [index in other.kept for one, other in pairs for index in one.kept]
    return WireCost(
        wire_dtype=name,
        prompts=len(pairs),
        travelled_bytes=travelled,
        share_of_bytes=travelled / whole,
        worst_logit_difference=difference.max().item(),
        mean_logit_difference=difference.mean().item(),
        token_agreement=sum(tokens) / len(tokens),
        kept_agreement=sum(kept) / len(kept),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workers.wire_bench",
        description="What narrower types on the wire cost in accuracy, and the bytes they save.",
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="default: the demo model")
    parser.add_argument("--dtype", default="float32", help="type in which the model computes")
    parser.add_argument("--prompts", type=int, default=20, help="pass-key prompts")
    parser.add_argument("--context-tokens", type=int, default=2000, help="of each prompt")
    given = parser.parse_args()
    costs = measure(given.model, given.dtype, given.prompts, given.context_tokens)
    print(f"{given.prompts} pass-key prompts of {given.context_tokens} tokens, {given.dtype}")
    print("wire       bytes  logits: worst   mean     equal tokens  equal kept")
    for cost in costs:
        print(
            f"{cost.wire_dtype:9} {cost.share_of_bytes:6.1%}  {cost.worst_logit_difference:13.4f}  "
            f"{cost.mean_logit_difference:7.4f}  {cost.token_agreement:12.1%}  "
            f"{cost.kept_agreement:10.1%}"
        )


if __name__ == "__main__":
    main()
