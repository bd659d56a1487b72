"""Flash attention: what is refused, and what of the layers' attention goes to its package.

The package needs a GPU. Elsewhere transformers' own code calls a slow function with the signature
and the contract that the package documents: (batch, tokens, heads, numbers), the queries last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward

from homer import HomerConfig, HomerModel
from homer.doctor import examine_model
from homer.errors import ConfigError, ModelError
from homer.flash import missing_flash
from homer.load_options import FLASH_PACKAGES
from homer.loading import load_model
from tests.homer.families.zoo import model_dir, prompt

CONFIG = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
PARTS = prompt(3, 150, 5)
TOKENS = 6
NEEDS_GPU = "flash-attn and a GPU for it are not here"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """What flash-attn says that it computes, written out."""
    assert (causal, dropout_p, window_size) == (True, 0.0, (-1, -1))
    assert softmax_scale is not None
    tokens, rows, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    keys, values = (states.repeat_interleave(groups, dim=2) for states in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, keys) * softmax_scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    seen = torch.arange(rows) <= torch.arange(tokens)[:, None] + rows - tokens
    logits = logits.masked_fill(~seen, -torch.inf)
    if learnable_sink is not None:
        sink = learnable_sink[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


def without_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap)


def with_flash(
    name: str, package: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[dict[str, Any]]]:
    """A model as transformers leaves it behind its check, and the calls that the package gets."""
    calls: list[dict[str, Any]] = []

    def counted(*states: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(options)
        return package(*states, **options)

    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    # The second one, by whose signature transformers goes, is for several prompts at once.
    monkeypatch.setattr(
        flash_utils, "_lazy_imports", lambda *_, **__: (counted, package, None, None, None)
    )
    # What was wrapped for another package.
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "flash_attention_2", flash_attention_forward
    )
    model = load_model(model_dir(name), dtype="float32")
    model.config._attn_implementation_internal = "flash_attention_2"
    return model, calls


@pytest.mark.parametrize(
    ("name", "package", "extras"),
    [
        ("llama3", flash_attn_func, set()),
        ("gemma2", flash_attn_func, {"softcap"}),
        ("gpt-oss", flash_attn_func, {"learnable_sink"}),
        # The family's own function does what the package cannot.
        ("gpt-oss", without_sinks, None),
        ("deepseek-v3", flash_attn_func, set()),
    ],
)
def test_flash_attention_answers_as_sdpa(
    name: str,
    package: Callable[..., Any],
    extras: set[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = HomerModel(load_model(model_dir(name), dtype="float32"), CONFIG)
    expected = plain.compress(*PARTS)
    model, calls = with_flash(name, package, monkeypatch)
    flash = HomerModel(model, CONFIG)

    got = flash.compress(*PARTS)
    in_compression = len(calls)
    tokens = flash.generate(got, max_new_tokens=TOKENS, ignore_eos=True)

    assert torch.equal(got.context_indices, expected.context_indices)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, plain.generate(expected, max_new_tokens=TOKENS, ignore_eos=True))
    if extras is None:
        assert not calls
    else:
        assert 0 < in_compression < len(calls)
        assert all(extras <= call.keys() for call in calls)


def test_outside_of_homer_flash_attention_is_transformers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.cat(PARTS)[None]
    with torch.inference_mode():
        expected = load_model(model_dir("llama3"), dtype="float32")(ids).logits
        model, calls = with_flash("llama3", flash_attn_func, monkeypatch)
        HomerModel(model, CONFIG)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == model.config.num_hidden_layers
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("attention", missing_flash())
def test_flash_attention_that_is_not_here_is_refused_before_weights_are_read(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.modeling_utils.safe_open", None)
    with pytest.raises(
        ModelError, match=rf"Install {FLASH_PACKAGES[attention]} on .* or use attention sdpa"
    ):
        load_model(model_dir("llama3"), dtype="bfloat16", attention=attention)
    assert attention not in examine_model(model_dir("llama3")).attentions


def test_flash_attention_in_full_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model is in float32; use dtype bfloat16"):
        load_model(model_dir("llama3"), attention="flash_attention_2")


@pytest.mark.skipif("flash_attention_2" in missing_flash(), reason=NEEDS_GPU)
def test_the_package_answers_as_sdpa_on_a_gpu() -> None:
    fits = PARTS[0], PARTS[1][:40], PARTS[2]
    models = [
        load_model(model_dir("llama3"), device="cuda:0", dtype="bfloat16", attention=attention)
        for attention in ("sdpa", "flash_attention_2")
    ]
    plain, flash = (HomerModel(model, CONFIG) for model in models)
    for parts in (fits, PARTS):
        # Bits of half precision decide which tokens survive, so the longer one only has to run.
        expected, got = plain.compress(*parts), flash.compress(*parts)
        assert torch.isfinite(got.logits).all()
        assert len(flash.generate(got, max_new_tokens=TOKENS, ignore_eos=True)) == TOKENS
        if parts is fits:
            spread = expected.logits.std().item()
            torch.testing.assert_close(got.logits, expected.logits, atol=0.1 * spread, rtol=0.05)
