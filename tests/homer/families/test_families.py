"""The matrix: every family against transformers for prompts that fit, and against a slow
independent implementation for prompts that don't.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import pytest
import torch
from transformers import DynamicCache

from homer import HomerConfig, HomerModel, MergePlan
from homer.calibration import measure_bias
from homer.config import ScoreKind
from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step
from homer.errors import ConfigError
from homer.families import FAMILIES
from homer.stack import LayerStack
from tests.apart import assert_same_context, run_apart
from tests.homer.families.descriptions import DESCRIPTIONS
from tests.homer.families.reference import Node, Reference, State, paper_plan
from tests.homer.families.zoo import LAYERS, MODELS, load_plain, model_dir, prompt

FITS = HomerConfig(max_chunk_len=200, target_len=200, warmup_layers=2)
SHORT = FITS.replace(max_chunk_len=64, target_len=48)
PREFIX, CONTEXT, SUFFIX = LENGTHS = (3, 150, 5)
TOKENS = 8

PAPER = paper_plan(PREFIX + SUFFIX, CONTEXT, LAYERS, chunk=64, target=48, warmup=2)
# The balanced plan by hand. A chunk has room for 56 context tokens beside the affixes, and 40 of
# them stay in the end: three leaves of 50. The six layers above the warm-up are shared by the
# levels, and what is left over goes to the top.
BALANCED = Node(
    range(6, 8),
    40,
    [
        # An uneven tree: the first leaf is merged with nothing, and keeps all that it has.
        Node(range(4, 6), 28, [Node(range(4), 50, (0, 50))]),
        Node(range(4, 6), 28, [Node(range(4), 28, (50, 100)), Node(range(4), 28, (100, 150))]),
    ],
)
THREE_AT_ONCE = Node(
    range(5, 8),
    40,
    [
        Node(range(5), 18, (0, 50)),
        Node(range(5), 19, (50, 100)),
        Node(range(5), 19, (100, 150)),
    ],
)
PAPER_PLAN = SHORT.replace(plan="paper", refresh_suffix=False)
FAN_IN_3 = SHORT.replace(fan_in=3, refresh_suffix=False)


@cache
def load(name: str) -> HomerModel:
    return HomerModel.from_pretrained(model_dir(name), FITS, device="cpu", dtype="float32")


@cache
def compressed(name: str, config: HomerConfig, biased: bool = False) -> CompressedContext:
    """The prompt of `LENGTHS`, compressed by a whole model."""
    bias = random_bias() if biased else None
    return HomerModel(load(name).model, config, bias).compress(*prompt(*LENGTHS))


@cache
def answer_to(name: str, config: HomerConfig) -> list[int]:
    return load(name).generate(compressed(name, config), max_new_tokens=TOKENS).tolist()


def random_bias() -> torch.Tensor:
    """As large as scores are, so that it decides what stays."""
    generator = torch.Generator().manual_seed(7)
    return 3 * torch.randn(LAYERS, PREFIX + CONTEXT + SUFFIX, generator=generator)


def test_every_family_is_in_the_matrix() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == set(FAMILIES) == set(DESCRIPTIONS)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_fits_equals_the_plain_model(name: str) -> None:
    """To the last bit, local layers and all; the answer and the scores of it as well."""
    plain, hm, parts = load_plain(name), load(name), prompt(*LENGTHS)
    ids = torch.cat(parts)[None]
    with torch.inference_mode():
        out = plain(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        answer = plain.generate(ids, do_sample=False, max_new_tokens=TOKENS)
        whole = plain(answer).logits[0, ids.shape[1] - 1 : -1]
    context = compressed(name, FITS)
    assert torch.equal(context.logits, out.logits[0, -1])
    for (keys, values), layer in zip(context.layers, out.past_key_values.layers, strict=True):
        assert torch.equal(keys, layer.keys[0])
        assert torch.equal(values, layer.values[0])
    new = answer[0, ids.shape[1] :]
    if name == "llama-dynamic":
        # There transformers rotates each new key of an answer by other frequencies than those
        # before it; ours keep those of the prompt.
        assert answer_to(name, FITS)[0] == new[0]
        return
    assert answer_to(name, FITS) == new.tolist()
    torch.testing.assert_close(hm.score(context, new), whole, rtol=0, atol=1e-4)


@cache
def reference(name: str) -> Reference:
    # Kernels for experts side by side do not take float64.
    plain = load_plain(name, dtype=torch.float64, experts_implementation="eager")
    return Reference(plain, DESCRIPTIONS[plain.get_decoder().config.model_type])


def assert_same(context: Any, state: State, tolerance: float) -> None:
    assert context.context_indices.tolist() == state.indices
    assert context.position_ids.tolist() == state.positions
    for ours, theirs in zip(context.layers, state.cache, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_plan_equals_the_slow_implementation(name: str) -> None:
    compare(name, PAPER_PLAN, PAPER)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_plan_equals_the_slow_implementation(name: str) -> None:
    compare(name, SHORT, BALANCED)


@pytest.mark.parametrize("name", MODELS)
def test_any_fan_in_with_a_bias_equals_the_slow_implementation(name: str) -> None:
    compare(name, FAN_IN_3, THREE_AT_ONCE, bias=True, answer=False)


@pytest.mark.parametrize("score", [score for score in get_args(ScoreKind) if score != "max_logit"])
@pytest.mark.parametrize("name", MODELS)
def test_other_scores_equal_the_slow_implementation(name: str, score: ScoreKind) -> None:
    config = FAN_IN_3.replace(score=score)
    compare(name, config, THREE_AT_ONCE, answer=False)
    theirs, ours = compressed(name, FAN_IN_3, biased=True), compressed(name, config)
    assert not torch.equal(theirs.context_indices, ours.context_indices)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [SHORT, PAPER_PLAN], ids=["refreshed", "averaged"])
def test_models_of_two_workers_equal_one(name: str, config: HomerConfig) -> None:
    """Each loads its own, and sends the other what workers send."""
    here, there = load(name).stack, stack_of_another(name)
    plan = MergePlan.build(*LENGTHS, LAYERS, config)
    homes = {node.id: node.id.index % 2 for node in plan.nodes}
    apart = run_apart([here, there], plan, prompt(*LENGTHS), homes)
    whole = compressed(name, config)
    assert_same_context(apart, whole)


@cache
def stack_of_another(name: str) -> LayerStack:
    # Run once over a longer prompt: what a rotation remembers of it must not show.
    hm = HomerModel(load_plain(name), FITS)
    hm.compress(*prompt(1, 190, 5))
    return hm.stack


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_calibration_bias_is_the_mean_of_the_slow_scores(name: str) -> None:
    slow, stack = reference(name), load(name).stack
    slow.score_kind = "max_logit"
    prefix, *_ = prompt(3, 1, 1)
    chunks = [prompt(0, length, 30)[2] for length in (50, 60)]
    rows = []
    for chunk in chunks:
        ids = [*prefix.tolist(), *chunk.tolist()]
        hidden, positions = slow.embed(ids), list(range(len(ids)))
        scores = []
        for layer in range(stack.num_layers):
            hidden, _, seen = slow.run_layer(layer, hidden, positions, None, [], len(ids))
            scores.append(slow.score(*seen)[len(prefix) :].flip(0))
        rows.append(torch.stack(scores))
    bias = measure_bias(stack, chunks, prefix)
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_score_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="score is 'best'; set it to one of"):
        FITS.replace(score="best")


def test_random_scores_are_the_same_for_every_model() -> None:
    config = FAN_IN_3.replace(score="random")
    kept = {tuple(compressed(name, config).context_indices.tolist()) for name in MODELS}
    assert len(kept) == 1


@torch.inference_mode()
def compare(
    name: str, config: HomerConfig, plan: Node, bias: bool = False, answer: bool = True
) -> None:
    """Compress, generate and score both ways."""
    slow = reference(name)
    context = compressed(name, config, bias)
    state, logits, next_position = slow.compress(
        *(part.tolist() for part in prompt(*LENGTHS)),
        plan=plan,
        refresh=config.refresh_suffix,
        score=config.score,
        bias=random_bias().double() if bias else None,
    )
    assert context.next_position == next_position
    assert_same(context, state, tolerance=2e-4)
    torch.testing.assert_close(context.logits.double(), logits, rtol=0, atol=2e-4)
    if not answer:
        return
    tokens = answer_to(name, config)
    positions = list(range(next_position, next_position + TOKENS))
    rest, _ = slow.run_on(tokens, positions, state.cache, state.positions, span=next_position)
    expected = torch.cat((logits[None], rest[:-1]))
    assert expected.argmax(-1).tolist() == tokens
    scored = load(name).score(context, torch.tensor(tokens))
    torch.testing.assert_close(scored.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_answers_decoded_together_are_those_decoded_alone(name: str) -> None:
    """Each answer has its own cache, its own length and its own window."""
    configs = [FITS, SHORT, PAPER_PLAN]
    contexts = [compressed(name, config) for config in configs]
    caches = [DecodeCache.copy_of(context, TOKENS) for context in contexts]
    answers = [[int(context.logits.argmax())] for context in contexts]
    for _ in range(TOKENS - 1):
        tokens = [answer[-1] for answer in answers]
        logits = decode_step(load(name).stack, tokens, caches)
        for answer, token in zip(answers, logits.argmax(-1).tolist(), strict=True):
            answer.append(token)
    assert answers == [answer_to(name, config) for config in configs]
