"""The methods that are compared do what their names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from homer.bench.methods import Answerer, Method, Prompt, choose_methods
from homer.bench.plain import plain_context
from homer.config import HomerConfig
from homer.errors import ConfigError
from homer.loading import load_model
from tests.homer.bench.demo_llama import WINDOW

BASE = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=1, fan_in=4)
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir, device="cpu")


def prompt_of(context_len: int) -> Prompt:
    ids = torch.randint(3, 400, (12 + context_len,), generator=torch.Generator().manual_seed(1))
    return Prompt(ids[:4], ids[12:], ids[4:12])


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    """The model's own generate, with transformers' cache; an end-of-sequence token left out."""
    out = model.generate(
        ids[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    new: list[int] = out[0, len(ids) :].tolist()
    return new[:-1] if new[-1] == model.generation_config.eos_token_id else new


def method(name: str) -> Method:
    return choose_methods([name], [], BASE)[0]


def test_plain_is_the_model_on_the_whole_prompt(model: Any) -> None:
    prompt = prompt_of(3 * WINDOW)
    answer = Answerer(model, None).answer(method("plain"), prompt, NEW_TOKENS)
    assert answer.ids == greedy(model, prompt.ids)
    assert answer.context_indices.tolist() == list(range(3 * WINDOW))


def test_truncation_sees_the_tail_alone(model: Any) -> None:
    prompt = prompt_of(3 * WINDOW)
    answer = Answerer(model, None).answer(method("truncation"), prompt, NEW_TOKENS)
    room = WINDOW - 12 - NEW_TOKENS
    assert answer.context_indices.tolist() == list(range(3 * WINDOW - room, 3 * WINDOW))
    seen = torch.cat((prompt.prefix, prompt.context[-room:], prompt.suffix))
    assert len(seen) + NEW_TOKENS == WINDOW
    assert answer.ids == greedy(model, seen)
    changed = prompt.context.clone()
    changed[: 3 * WINDOW - room] = 7
    other = Prompt(prompt.prefix, changed, prompt.suffix)
    assert Answerer(model, None).answer(method("truncation"), other, NEW_TOKENS).ids == answer.ids
    assert Answerer(model, None).answer(method("plain"), other, NEW_TOKENS).ids != answer.ids


def test_truncation_leaves_a_prompt_that_fits_alone(model: Any) -> None:
    prompt = prompt_of(100)
    plain = Answerer(model, None).answer(method("plain"), prompt, NEW_TOKENS)
    truncated = Answerer(model, None).answer(method("truncation"), prompt, NEW_TOKENS)
    assert truncated.ids == plain.ids
    assert truncated.context_indices.tolist() == list(range(100))


def test_yarn_equals_a_model_loaded_with_these_rope_parameters(model: Any, model_dir: Path) -> None:
    prompt = prompt_of(3 * WINDOW)
    rope = {
        **model.config.rope_parameters,
        "rope_type": "yarn",
        "factor": (len(prompt) + NEW_TOKENS) / WINDOW,
        "original_max_position_embeddings": WINDOW,
    }
    scaled = AutoModelForCausalLM.from_pretrained(model_dir, rope_parameters=rope).eval()
    answer = Answerer(model, None).answer(method("yarn"), prompt, NEW_TOKENS)
    assert answer.ids == greedy(scaled, prompt.ids)
    plain = Answerer(model, None).answer(method("plain"), prompt, NEW_TOKENS)
    assert plain.ids == greedy(model, prompt.ids), "the model is as it was before"
    assert not torch.equal(
        plain_context(model, prompt.ids).logits, plain_context(scaled, prompt.ids).logits
    )


def test_yarn_changes_nothing_inside_the_window(model: Any) -> None:
    prompt = prompt_of(100)
    yarn = Answerer(model, None).answer(method("yarn"), prompt, NEW_TOKENS)
    assert yarn.ids == greedy(model, prompt.ids)


def test_homer_and_paper_keep_a_target_full(model: Any) -> None:
    prompt = prompt_of(3 * WINDOW)
    for name in ("homer", "paper"):
        answer = Answerer(model, None).answer(method(name), prompt, NEW_TOKENS)
        assert len(answer.context_indices) == BASE.target_len - 12, name


def test_paper_takes_lengths_from_the_base_and_all_else_from_the_authors() -> None:
    config = method("paper").config
    assert config == HomerConfig.paper(max_chunk_len=64, target_len=48, warmup_layers=1)


def test_variants_change_fields_of_the_base() -> None:
    variants = ["wide:plan=paper,fan_in=8", "tired:refresh_suffix=false,fan_in=None"]
    wide, tired = choose_methods([], variants, BASE)
    assert wide.name == "wide"
    assert wide.config == BASE.replace(plan="paper", fan_in=8)
    assert tired.config == BASE.replace(refresh_suffix=False, fan_in=None)


def test_scores_are_variants_and_uncalibrated_is_without_the_bias(model: Any) -> None:
    homer, plain, other = choose_methods(["homer", "uncalibrated"], [], BASE, ["softmax_mean"])
    assert (other.name, other.config) == ("softmax_mean", BASE.replace(score="softmax_mean"))
    assert plain.config == homer.config
    assert plain.settings != homer.settings
    with pytest.raises(ConfigError, match="score is 'best'"):
        choose_methods([], [], BASE, ["best"])
    prompt = prompt_of(3 * WINDOW)
    bias = torch.linspace(0, 50, WINDOW).expand(model.config.num_hidden_layers, -1)
    kept = [
        Answerer(model, given).answer(method, prompt, 1).context_indices.tolist()
        for given, method in ((bias, homer), (bias, plain), (None, homer))
    ]
    assert kept[0] != kept[1] == kept[2]


@pytest.mark.parametrize("variant", ["wide", "wide:", "wide:width=3", ":fan_in=4", "wide:fan_in"])
def test_a_variant_that_cannot_be_read_is_refused(variant: str) -> None:
    with pytest.raises(ConfigError, match="name:field=value"):
        choose_methods([], [variant], BASE)


def test_unknown_and_doubled_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose from homer, paper"):
        choose_methods(["hommer"], [], BASE)
    with pytest.raises(ConfigError, match="name of its own"):
        choose_methods(["homer"], ["homer:fan_in=2"], BASE)
