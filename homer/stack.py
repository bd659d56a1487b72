"""A transformers causal LM as a stack of layers that can be run piece by piece.

The layers are transformers' own modules. Knows nothing about plans or trees.
"""

from __future__ import annotations

from typing import Any

import torch

from homer import attention
from homer.attention import LayerPass
from homer.errors import ModelError, PromptError


class LayerStack:
    """Embedding, decoder layers and output head of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only causal LM with rotary positions. Its attention implementation is wrapped,
        which changes nothing for other callers.

    Raises
    ------
    ModelError
        When the model has no layer stack that Homer can drive.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_decoder()
        missing = [name for name in ("layers", "rotary_emb", "norm") if not hasattr(base, name)]
        if missing:
            raise ModelError(
                f"{type(model).__name__} has no {', '.join(missing)}; Homer needs a decoder-only "
                f"model with rotary position embeddings"
            )
        attention.install(model)
        self.model = model
        self.layers = base.layers
        self._rotary = base.rotary_emb
        self._norm = base.norm
        if not getattr(model, "_homer_hooks", False):
            for layer in self.layers:
                attention.run_mlp_on_kept_rows(layer.mlp)
            model._homer_hooks = True

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_kv_heads(self) -> int:
        return int(self.model.config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        config = self.model.config
        return int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def check_ids(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """`ids` of shape (n,) or (1, n) as int64 of shape (n,), checked against the vocabulary."""
        ids = torch.as_tensor(ids)
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.is_floating_point():
            raise PromptError(
                f"{name} must be integer token ids of shape (n,) or (1, n), not {ids.dtype} of "
                f"shape {tuple(ids.shape)}"
            )
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise PromptError(
                f"{name} has token ids from {int(ids.min())} to {int(ids.max())}, but the "
                f"model's vocabulary has {self.vocab_size} entries; use the model's own tokenizer"
            )
        return ids.to(device=self.device, dtype=torch.int64)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings of shape (tokens, hidden_size)."""
        return self.model.get_input_embeddings()(ids)

    def run(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, layers: range, layer_pass: LayerPass
    ) -> torch.Tensor:
        """Run `layers` on `hidden` of shape (tokens, hidden_size).

        Returns the rows that `layer_pass` chose, or all of them.
        """
        states = hidden[None]
        positions = position_ids[None]
        rotary = self._rotary(states, positions)
        layer_pass.tokens = len(hidden)
        with layer_pass:
            for layer in layers:
                layer_pass.layer = layer
                layer_pass.is_last_layer = layer == layers[-1]
                states = self.layers[layer](
                    states,
                    attention_mask=None,
                    position_ids=positions,
                    past_key_values=None,
                    use_cache=False,
                    position_embeddings=rotary,
                )
        rows = layer_pass.rows
        return states[0] if rows is None else states[0].index_select(0, rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output logits in float32 of the last layer's `hidden`, shape (..., vocab)."""
        return self.model.get_output_embeddings()(self._norm(hidden)).float()
