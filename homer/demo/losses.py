"""The losses that the demo model is trained with, and the forward pass that they need.

Besides the usual next-token losses there is one on the *significance* itself: in every layer that
may prune, the tokens of the key asked for must outscore all others. Large models get by without:
they have retrieval heads in most layers, a model of this size only where it is made to. Knows
nothing about where batches come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, LlamaForCausalLM

from homer.demo.batches import IGNORE, Batch

ATTENTION = "homer_demo_training"
FIRST_SCORED_LAYER = 2
READING_LAYERS = (4, 6, 8)
MARGIN = 3.0
"""How far, in units of the significance, the key's tokens are pushed above all others together."""


@dataclass
class Recorder:
    """Collects rotated queries and keys while a model runs."""

    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)


def _recording_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    recorder: Recorder,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    recorder.queries.append(query)
    recorder.keys.append(key)
    # Written out: on CPUs the backward pass of the fused kernel takes three times as long.
    weights = (query * scaling) @ key.transpose(-1, -2) + attention_mask
    return (weights.softmax(-1).to(value.dtype) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def recording(model: LlamaForCausalLM) -> Iterator[None]:
    """Let the model's attention take a ``recorder`` inside the block."""
    AttentionInterface.register(ATTENTION, _recording_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass
class Losses:
    """The parts of the loss, and how well the batch was answered."""

    answer: torch.Tensor
    text: torch.Tensor
    survive: torch.Tensor
    guide: torch.Tensor
    right: float
    """Share of answers of which every token is the most likely one."""
    lost: float
    """Share of key tokens that, in the worst layer, do not score in the upper quarter."""


def compute_losses(
    model: LlamaForCausalLM, batch: Batch, merge_layer: int, *, guided: bool
) -> Losses:
    """Run a batch with chunks apart below ``merge_layer`` and merged from there on."""
    recorder = Recorder()
    base = model.model
    work_type = torch.get_autocast_dtype(batch.ids.device.type)
    hidden = base.embed_tokens(batch.ids).to(work_type)
    rope = tuple(part.to(work_type) for part in base.rotary_emb(hidden, batch.positions))
    low, high = (
        torch.zeros_like(mask, dtype=work_type).masked_fill(~mask, torch.finfo(work_type).min)
        for mask in (batch.low, batch.high)
    )
    for index, layer in enumerate(base.layers):
        hidden = layer(
            hidden,
            attention_mask=low if index < merge_layer else high,
            position_embeddings=rope,
            recorder=recorder,
        )
    hidden = base.norm(hidden)
    answers = batch.labels != IGNORE
    logits = model.lm_head(hidden[answers]).float()
    answer = functional.cross_entropy(logits, batch.labels[answers])
    context = hidden[:, batch.context][:, ::4]
    labels = batch.text_labels[:, ::4].reshape(-1)
    text_logits = model.lm_head(context.reshape(-1, context.shape[-1])).float()
    text = functional.cross_entropy(text_logits, labels, ignore_index=IGNORE)
    survive, lost = _significance_loss(recorder, batch)
    guide = _guide_loss(recorder, batch) if guided else torch.zeros((), device=hidden.device)
    with torch.no_grad():
        hits = torch.ones_like(answers)
        hits[answers] = logits.argmax(-1) == batch.labels[answers]
        right = _share_of_right_answers(hits, answers, batch.asking)
    return Losses(answer, text, survive, guide, right, lost)


def _significance_loss(recorder: Recorder, batch: Batch) -> tuple[torch.Tensor, float]:
    """Each key token against the log-sum of all tokens that are not of this key, per layer."""
    rows = torch.arange(batch.ids.shape[0], device=batch.ids.device)[:, None]
    wanted = batch.needle & batch.judged[:, :, None]
    total = torch.zeros((), device=batch.ids.device)
    lost = 0.0
    layers = range(FIRST_SCORED_LAYER, len(recorder.keys))
    for index in layers:
        query = recorder.queries[index].transpose(1, 2)[rows, batch.asking]  # (b, q, h, d)
        keys = recorder.keys[index][:, :, batch.context]  # (b, h, n, d)
        scores = torch.einsum("bqhd,bhnd->bqhn", query, keys).float().amax(2)
        scores = scores * query.shape[-1] ** -0.5
        others = scores.masked_fill(batch.needle, float("-inf")).logsumexp(-1, keepdim=True)
        total = total + functional.softplus(others - scores + MARGIN)[wanted].mean()
        with torch.no_grad():
            bar = scores.quantile(0.75, dim=-1, keepdim=True)
            lost = max(lost, (scores < bar)[wanted].float().mean().item())
    return total / len(layers), lost


def _guide_loss(recorder: Recorder, batch: Batch) -> torch.Tensor:
    """Attention of some heads against where they should look.

    Head 0 of layer 0 looks at the previous token, of layer 1 from a key back to its name, and of
    every layer in ``READING_LAYERS`` from an answer to the stated token that it copies next.
    """
    s = batch.ids.shape[1]
    slot = torch.arange(s, device=batch.ids.device)
    before = (slot - 1).clamp(min=0).expand_as(batch.ids)
    # The slot before is the previous token only where the mask shows it.
    visible = batch.low[:, 0].gather(2, before[:, :, None])[:, :, 0]
    before = torch.where(visible & (slot > 0), before, IGNORE)
    targets = {0: before, 1: batch.name_of}
    targets |= dict.fromkeys(READING_LAYERS, batch.read_from)
    loss = torch.zeros((), device=batch.ids.device)
    for layer, target in targets.items():
        query, key = recorder.queries[layer][:, 0], recorder.keys[layer][:, 0]
        guided = target != IGNORE
        scores = (query @ key.transpose(1, 2))[guided].float() * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~batch.low[:, 0][guided], -1e9)
        loss = loss + functional.cross_entropy(scores, target[guided])
    return loss


def _share_of_right_answers(
    hits: torch.Tensor, answers: torch.Tensor, asking: torch.Tensor
) -> float:
    """Share of questions whose answer slots are all hits; answers follow their question's slot."""
    s = hits.shape[1]
    starts = torch.zeros_like(answers, dtype=torch.long)
    starts.scatter_(1, asking, 1)
    question = starts.cumsum(1)
    number = torch.arange(hits.shape[0], device=hits.device)[:, None] * s + question
    wrong = torch.zeros(hits.shape[0] * s, device=hits.device)
    wrong.scatter_add_(0, number.reshape(-1), (~hits).float().reshape(-1))
    asked = torch.zeros_like(wrong)
    asked.scatter_add_(0, number.reshape(-1), answers.float().reshape(-1))
    return (wrong[asked > 0] == 0).float().mean().item()
