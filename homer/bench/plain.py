"""The plain model as a yardstick: the whole prompt in one pass, no merging.

Knows nothing about tasks or measurements.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from homer.context import CompressedContext


@torch.inference_mode()
def plain_context(model: Any, ids: torch.Tensor) -> CompressedContext:
    """Prefill `ids` of shape (n,) with full attention; the answer is then generated as always.

    Only the last token's logits are made, and attention runs without a mask, so that memory grows
    with the length and not with its square.
    """
    ids = ids.to(model.get_input_embeddings().weight.device)
    out = model(input_ids=ids[None], use_cache=True, logits_to_keep=1)
    positions = torch.arange(len(ids), device=ids.device)
    return CompressedContext(
        context_indices=positions,
        position_ids=positions,
        next_position=len(ids),
        logits=out.logits[0, -1].float(),
        buffers=[(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers],
    )


@contextmanager
def yarn(model: Any, length: int) -> Iterator[None]:
    """Inside the block the model's positions are scaled by YaRN to `length` tokens.

    The same as loading it with these `rope_parameters`, without a second copy of the weights. A
    length within the window changes nothing.
    """
    window = model.config.max_position_embeddings
    if length <= window:
        yield
        return
    decoder = model.get_decoder()
    before = decoder.rotary_emb
    config = copy.deepcopy(model.config)
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "yarn",
        "factor": length / window,
        "original_max_position_embeddings": window,
    }
    device = before.inv_freq.device
    decoder.rotary_emb = type(before)(config=config).to(device)
    try:
        yield
    finally:
        decoder.rotary_emb = before
