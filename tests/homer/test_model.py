"""`HomerModel` beside the plain model, its answers, and every message it refuses with."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from homer import HomerConfig, HomerModel
from homer.context import CompressedContext
from homer.errors import BiasError, ConfigError, ModelError, PlanError, PromptError
from homer.generation import FinishReason, generate_tokens
from homer.sampling import SamplingParams, TokenSampler
from tests.golden_cases import model_dir
from tests.homer.tiny import random_ids

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FITS = HomerConfig(max_chunk_len=256, target_len=256, warmup_layers=1)
MERGES = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=0)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VOCAB = 128


@cache
def load(
    name: str = "A", config: HomerConfig = MERGES, dtype: str = "float32", device: str = "cpu"
) -> HomerModel:
    return HomerModel.from_pretrained(model_dir(name), config, dtype=dtype, device=device)


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prompt(prefix_len: int, context_len: int, suffix_len: int) -> Parts:
    prefix, context, suffix = (
        random_ids(n, seed=n, vocab=VOCAB) for n in (prefix_len, context_len, suffix_len)
    )
    return prefix, context, suffix


def load_plain(name: str, **options: Any) -> Any:
    """The model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(model_dir(name), **options).eval()


@cache
def merged() -> CompressedContext:
    """A context of model A that took merging and pruning."""
    return load().compress(*prompt(3, 500, 6))


# Prompts that fit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["A", "G", "M"])
@pytest.mark.parametrize("prefix_len", [0, 5])
def test_a_prompt_that_fits_equals_the_plain_model_to_the_last_bit(
    name: str, dtype: str, device: str, prefix_len: int
) -> None:
    plain = load_plain(name, dtype=getattr(torch, dtype)).to(device)
    parts = prompt(prefix_len, 150, 7)
    ids = torch.cat(parts)[None].to(device)
    hm = load(name, FITS, dtype, device)
    context = hm.compress(*parts)
    with torch.inference_mode():
        out = plain(ids, logits_to_keep=1, use_cache=True)
        greedy = plain.generate(ids, do_sample=False, max_new_tokens=24)
    assert torch.equal(context.logits, out.logits[0, -1].float())
    for (keys, values), layer in zip(context.layers, out.past_key_values.layers, strict=True):
        assert torch.equal(keys, layer.keys[0])
        assert torch.equal(values, layer.values[0])
    assert context.context_indices.tolist() == list(range(150))
    assert hm.generate(context, max_new_tokens=24).tolist() == greedy[0, ids.shape[1] :].tolist()


def test_a_prompt_that_fits_equals_the_plain_model_under_yarn() -> None:
    options: dict[str, Any] = {"max_position_embeddings": 256, "rope_parameters": YARN}
    plain = load_plain("A", **options)
    parts = prompt(4, 180, 5)
    context = HomerModel.from_pretrained(model_dir("A"), FITS, device="cpu", **options).compress(
        *parts
    )
    with torch.inference_mode():
        expected = plain(torch.cat(parts)[None], logits_to_keep=1).logits[0, -1]
        without = load("A", FITS).compress(*parts).logits
    assert torch.equal(context.logits, expected)
    assert not torch.allclose(context.logits, without, atol=1e-2)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_score_of_a_prompt_that_fits_is_the_plain_models(length: int) -> None:
    plain = load_plain("A")
    parts = prompt(5, 150, 7)
    continuation = random_ids(length, seed=1, vocab=VOCAB)
    hm = load("A", FITS)
    scores = hm.score(hm.compress(*parts), continuation)
    with torch.inference_mode():
        out = plain(torch.cat([*parts, continuation])[None]).logits[0, 161:-1]
    assert scores.shape == (length, 256)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, out, rtol=0, atol=1e-5)


# The refreshed suffix


@pytest.mark.parametrize("name", ["A", "G", "M"])
def test_the_refreshed_suffix_is_the_plain_model_over_the_surviving_rows(name: str) -> None:
    """Checked with transformers' own forward pass over a cache of prefix and survivors."""
    parts = prompt(3, 500, 6)
    hm = load(name, MERGES)
    context = hm.compress(*parts)
    rest = context.cache_len - 6
    rows = [(k[None, :, :rest], v[None, :, :rest]) for k, v in context.layers]
    plain = load_plain(name)
    with torch.inference_mode():
        out = plain(
            parts[2][None],
            past_key_values=DynamicCache(rows),
            position_ids=context.position_ids[None, -6:],
            attention_mask=torch.ones(1, context.cache_len, dtype=torch.int64),
            use_cache=True,
        )
    torch.testing.assert_close(context.logits, out.logits[0, -1], rtol=0, atol=1e-5)
    for (keys, values), layer in zip(context.layers, out.past_key_values.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values, layer.values[0], rtol=0, atol=1e-5)


def test_refreshing_changes_the_suffix_and_nothing_else() -> None:
    parts = prompt(3, 500, 6)
    refreshed = load().compress(*parts)
    averaged = load("A", MERGES.replace(refresh_suffix=False)).compress(*parts)
    assert torch.equal(refreshed.context_indices, averaged.context_indices)
    assert torch.equal(refreshed.position_ids, averaged.position_ids)
    for ours, theirs in zip(refreshed.layers, averaged.layers, strict=True):
        assert torch.equal(ours[0][:, :-6], theirs[0][:, :-6])
        assert torch.equal(ours[1][:, :-6], theirs[1][:, :-6])
    assert not torch.allclose(refreshed.layers[-1][1][:, -6:], averaged.layers[-1][1][:, -6:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_merges_too(dtype: str, device: str) -> None:
    hm = load("G", MERGES, dtype, device)
    context = hm.compress(*prompt(3, 500, 6))
    assert context.cache_len == 64
    assert context.layers[0][0].dtype == getattr(torch, dtype)
    exact = load("G").compress(*prompt(3, 500, 6))
    assert torch.nn.functional.cosine_similarity(context.logits.cpu(), exact.logits, dim=0) > 0.9


# Using a context


def test_a_context_can_be_used_many_times() -> None:
    hm, context = load(), merged()
    before = [(keys.clone(), values.clone()) for keys, values in context.layers]
    continuation = random_ids(10, vocab=VOCAB)
    first = hm.generate(context, max_new_tokens=20), hm.score(context, continuation)
    second = hm.generate(context, max_new_tokens=20), hm.score(context, continuation)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert len(first[0]) == 20
    for old, new in zip(before, context.layers, strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1], new[1])


def test_compressing_twice_gives_the_same() -> None:
    again = load().compress(*prompt(3, 500, 6))
    assert torch.equal(merged().context_indices, again.context_indices)
    assert torch.equal(merged().logits, again.logits)


def test_ids_may_have_a_batch_dimension_of_one() -> None:
    prefix, context_ids, suffix = prompt(3, 500, 6)
    context = load().compress(prefix[None], context_ids[None], suffix[None])
    assert torch.equal(context.logits, merged().logits)


def test_score_follows_the_greedy_answer() -> None:
    hm = load()
    answer = hm.generate(merged(), max_new_tokens=12)
    assert hm.score(merged(), answer).argmax(-1).tolist() == answer.tolist()


def test_the_model_runs_as_before_outside_homer() -> None:
    """The registered attention function is the plain one when no node runs."""
    plain = load_plain("A")
    ids = random_ids(100, vocab=VOCAB)[None]
    with torch.inference_mode():
        assert torch.equal(load().model(ids).logits, plain(ids).logits)


# Choosing tokens


def greedy() -> list[int]:
    return load().generate(merged(), max_new_tokens=16).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 5.0, "top_k": 1, "seed": 1},
        {"temperature": 5.0, "top_p": 1e-6, "seed": 2},
        {"temperature": 5.0, "min_p": 1.0, "seed": 3},
    ],
)
def test_settings_that_leave_one_choice_are_greedy(sampling: dict[str, Any]) -> None:
    assert load().generate(merged(), max_new_tokens=16, **sampling).tolist() == greedy()


def test_a_seed_repeats_an_answer_and_another_seed_does_not() -> None:
    answers = [
        tuple(load().generate(merged(), max_new_tokens=16, temperature=2.0, seed=seed).tolist())
        for seed in (1, 1, 2, 3, 4)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 4
    assert len({answer[0] for answer in answers}) > 1, "the first token is sampled as well"


def test_sampled_tokens_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = TokenSampler(SamplingParams(temperature=1.5, seed=0))
    draws = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(4000)]))
    torch.testing.assert_close(draws / 4000, torch.softmax(logits / 1.5, dim=0), rtol=0, atol=0.025)


def test_repetition_penalty_ends_repeats() -> None:
    answer = load().generate(merged(), max_new_tokens=40, repetition_penalty=1e6).tolist()
    assert len(set(answer)) == 40
    assert answer[0] == greedy()[0]


def finish(params: SamplingParams, stop_after: int | None = None) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    stream = generate_tokens(
        load().stack,
        merged(),
        params,
        None if stop_after is None else lambda: len(tokens) >= stop_after,
    )
    while True:
        try:
            tokens.append(next(stream))
        except StopIteration as end:
            return tokens, end.value


def test_an_answer_ends_at_the_end_of_sequence_token(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy()
    first_seen = {token: expected.index(token) for token in expected}
    for token, at in first_seen.items():
        monkeypatch.setattr(load().model.generation_config, "eos_token_id", [token, VOCAB - 1])
        assert finish(SamplingParams(max_new_tokens=16)) == (expected[:at], "stop")
    ignoring = finish(SamplingParams(max_new_tokens=16, ignore_eos=True))
    assert ignoring == (expected, "length")


def test_an_answer_ends_at_its_length_or_when_it_is_stopped() -> None:
    assert finish(SamplingParams(max_new_tokens=1)) == (greedy()[:1], "length")
    assert finish(SamplingParams(max_new_tokens=16), stop_after=5) == (greedy()[:5], "cancelled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or more; got -1.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_k": -1}, "top_k must be 0 .off. or more; got -1"),
        ({"min_p": 1.5}, "min_p must be from 0 .off. to 1; got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0; got 0.0"),
    ],
)
def test_sampling_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**settings)


# Mistakes


@pytest.mark.parametrize(
    ("part", "ids", "message"),
    [
        (1, torch.tensor([0.5]), "context_ids must be integer token ids"),
        (
            1,
            torch.zeros(2, 30, dtype=torch.int64),
            "context_ids must be integer token ids of shape",
        ),
        (2, torch.tensor([1, 256]), "suffix_ids has token ids from 1 to 256.*256 entries"),
        (0, torch.tensor([-1]), "prefix_ids has token ids from -1"),
    ],
)
def test_ids_that_the_model_cannot_read_are_refused(
    part: int, ids: torch.Tensor, message: str
) -> None:
    parts = list(prompt(3, 100, 6))
    parts[part] = ids
    prefix, context, suffix = parts
    with pytest.raises(PromptError, match=message):
        load().compress(prefix, context, suffix)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((3, 0, 6), "the context is empty"),
        ((3, 100, 0), "the suffix is empty"),
        ((60, 100, 6), "raise max_chunk_len above 66"),
    ],
)
def test_lengths_without_a_plan_are_refused(lengths: tuple[int, int, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load().compress(*prompt(*lengths))


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(PromptError, match="the continuation is empty"):
        load().score(merged(), torch.zeros(0, dtype=torch.int64))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    model = load().model
    with pytest.raises(BiasError, match=r"shape \(6, 100\).*8 layers"):
        HomerModel(model, MERGES, bias=torch.zeros(6, 100))
    with pytest.raises(BiasError, match=r"shape \(100,\).*8 layers"):
        HomerModel(model, MERGES, bias=torch.zeros(100))
    with pytest.raises(BiasError, match="reaches distance 31, but chunks of this plan reach"):
        HomerModel(model, MERGES, bias=torch.zeros(8, 32)).compress(*prompt(3, 500, 6))
    with pytest.raises(BiasError, match="not finite"):
        HomerModel(model, MERGES, bias=torch.full((8, 100), torch.nan)).compress(*prompt(3, 500, 6))


def test_the_bias_decides_what_is_kept() -> None:
    """One that grows with the distance keeps the end of the chunk; one that falls, its start."""
    slope = torch.arange(64, dtype=torch.float32).expand(8, -1) * 1e3
    config = HomerConfig(max_chunk_len=64, target_len=32, warmup_layers=0)
    parts = prompt(3, 50, 6)
    kept = {
        sign: HomerModel(load().model, config, bias=sign * slope).compress(*parts).context_indices
        for sign in (1, -1)
    }
    assert kept[1].tolist() == list(range(27, 50))
    assert kept[-1].tolist() == list(range(23))


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        HomerModel.from_pretrained(tmp_path, MERGES)
    with pytest.raises(ConfigError, match="device is 'nowhere'; use auto, cpu or cuda:N"):
        HomerModel.from_pretrained(model_dir("A"), MERGES, device="nowhere")
    with pytest.raises(ConfigError, match="dtype is 'int3'; use auto, float32"):
        HomerModel.from_pretrained(model_dir("A"), MERGES, dtype="int3")


def test_a_model_without_rotary_positions_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(ModelError, match="gpt2 has no rotary position embeddings"):
        HomerModel(gpt2, MERGES)


# Files beside a model


def test_settings_and_bias_beside_a_model_are_used(tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors", "bias.safetensors"):
        shutil.copy(model_dir("A") / file, tmp_path / file)
    derived = HomerModel.from_pretrained(tmp_path)
    assert derived.config == HomerConfig(max_chunk_len=2048, target_len=2048, warmup_layers=3)
    assert derived.bias is not None
    assert derived.bias.shape == (8, 4096)
    (tmp_path / "homer.json").write_text(
        '{"max_chunk_len": 64, "target_len": 60, "warmup_layers": 1}'
    )
    (tmp_path / "bias.safetensors").unlink()
    given = HomerModel.from_pretrained(tmp_path, bias=model_dir("A") / "bias.safetensors")
    assert given.config == HomerConfig(max_chunk_len=64, target_len=60, warmup_layers=1)
    assert torch.equal(torch.as_tensor(given.bias), derived.bias)
    assert HomerModel.from_pretrained(tmp_path).bias is None
