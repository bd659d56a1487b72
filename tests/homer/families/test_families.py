"""The matrix: every family against transformers for prompts that fit, and against a slow
independent implementation for prompts that don't.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from homer import HomerConfig, HomerModel
from homer.calibration import measure_bias
from homer.config import ScoreKind
from homer.decode import DecodeCache, decode_step
from homer.errors import ConfigError
from homer.families import FAMILIES
from tests.homer.families.descriptions import DESCRIPTIONS
from tests.homer.families.reference import Reference, State
from tests.homer.families.zoo import MODELS, load_plain, model_dir, prompt

FITS = HomerConfig(max_chunk_len=200, target_len=200, warmup_layers=2)
LENGTHS = (3, 150, 5)
CHUNK, TARGET, WARMUP = 64, 48, 2
TOKENS = 8


@cache
def load(name: str) -> HomerModel:
    return HomerModel.from_pretrained(model_dir(name), FITS, device="cpu", dtype="float32")


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
    context = hm.compress(*parts)
    assert torch.equal(context.logits, out.logits[0, -1])
    for (keys, values), layer in zip(context.layers, out.past_key_values.layers, strict=True):
        assert torch.equal(keys, layer.keys[0])
        assert torch.equal(values, layer.values[0])
    new = answer[0, ids.shape[1] :]
    if name == "llama-dynamic":
        # There transformers rotates each new key of an answer by other frequencies than those
        # before it; ours keep those of the prompt.
        assert hm.generate(context, max_new_tokens=TOKENS)[0] == new[0]
        return
    assert hm.generate(context, max_new_tokens=TOKENS).tolist() == new.tolist()
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


@pytest.mark.parametrize("refresh", [False, True], ids=["averaged", "refreshed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_does_not_fit_equals_the_slow_implementation(
    name: str, refresh: bool
) -> None:
    compare(name, refresh)


@pytest.mark.parametrize("score", ["softmax_mean", "query_window", "key_norm"])
@pytest.mark.parametrize("name", ["deepseek-v2", "gemma3", "gpt-neox", "llama3", "llama4"])
def test_other_scores_equal_the_slow_implementation(name: str, score: ScoreKind) -> None:
    assert compare(name, refresh=True, score=score) != compare(name, refresh=True)


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
            hidden, _, score = slow.run_layer(layer, hidden, positions, None, [], len(ids))
            scores.append(score[len(prefix) :].flip(0))
        rows.append(torch.stack(scores))
    bias = measure_bias(stack, chunks, prefix)
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_score_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="score is 'best'; set it to one of"):
        FITS.replace(score="best")


def test_random_scores_are_the_same_each_time_and_about_nothing() -> None:
    config = HomerConfig(max_chunk_len=CHUNK, target_len=TARGET, warmup_layers=WARMUP)
    hm = HomerModel(load("llama3").model, config.replace(score="random"))
    first, second = (hm.compress(*prompt(*LENGTHS)).context_indices.tolist() for _ in range(2))
    assert first == second
    other = HomerModel(load("llama2").model, config.replace(score="random"))
    assert other.compress(*prompt(*LENGTHS)).context_indices.tolist() == first


@torch.inference_mode()
def compare(name: str, refresh: bool, score: ScoreKind = "max_logit") -> list[int]:
    """Compress, generate and score both ways; the indices that were kept."""
    config = HomerConfig(
        max_chunk_len=CHUNK,
        target_len=TARGET,
        warmup_layers=WARMUP,
        plan="paper",
        refresh_suffix=refresh,
        score=score,
    )
    slow, parts = reference(name), prompt(*LENGTHS)
    slow.score_kind, slow.suffix_len = score, LENGTHS[2]
    hm = HomerModel(load(name).model, config)
    context = hm.compress(*parts)
    state, logits, next_position = slow.compress(
        *(part.tolist() for part in parts),
        chunk=CHUNK,
        target=TARGET,
        warmup=WARMUP,
        refresh=refresh,
    )
    assert context.next_position == next_position
    assert_same(context, state, tolerance=2e-4)
    torch.testing.assert_close(context.logits.double(), logits, rtol=0, atol=2e-4)

    answer = hm.generate(context, max_new_tokens=TOKENS)
    positions = list(range(next_position, next_position + TOKENS))
    rest, _ = slow.run_on(
        answer.tolist(), positions, state.cache, state.positions, span=next_position
    )
    expected = torch.cat((logits[None], rest[:-1]))
    assert expected.argmax(-1).tolist() == answer.tolist()
    torch.testing.assert_close(hm.score(context, answer).double(), expected, rtol=0, atol=2e-4)
    return state.indices


@pytest.mark.parametrize("name", MODELS)
def test_answers_decoded_together_are_those_decoded_alone(name: str) -> None:
    """Each answer has its own cache, its own length and its own window."""
    hm = HomerModel(load(name).model, FITS.replace(max_chunk_len=CHUNK, target_len=TARGET))
    contexts = [hm.compress(*prompt(3, length, 5)) for length in (20, 150, 90)]
    alone = [hm.generate(context, max_new_tokens=TOKENS).tolist() for context in contexts]
    caches = [DecodeCache.copy_of(context, TOKENS) for context in contexts]
    answers = [[int(context.logits.argmax())] for context in contexts]
    for _ in range(TOKENS - 1):
        logits = decode_step(hm.stack, [answer[-1] for answer in answers], caches)
        for answer, token in zip(answers, logits.argmax(-1).tolist(), strict=True):
            answer.append(token)
    assert answers == alone
