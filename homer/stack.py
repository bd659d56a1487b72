"""A transformers causal LM as a stack of layers that can be run piece by piece.

The layers are transformers' own modules. Knows nothing about plans or trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import distributed

from homer import attention
from homer.attention import LayerPass, NodePass
from homer.devices import execution_device, offloaded_parts, weights_cut, weights_held
from homer.errors import ModelError, PromptError
from homer.families import CacheRow, Window, cache_row, family_of, layer_windows
from homer.footprint import Footprint
from homer.heads import ALL_HEADS, HeadGroup
from homer.memory import least_memory
from homer.rotary import Rotary

_CHECK_TOKENS, _CHECK_PAST = 12, 4
# Half precision, added up in another order, is off by a few thousandths.
_CHECK_TOLERANCE = 0.02


def decoder_of(model: Any) -> Any:
    """The part of a causal LM that holds the layers."""
    base = model.get_decoder()
    return base.model if not hasattr(base, "layers") and hasattr(base, "model") else base


@dataclass
class LayerRun:
    """Some tokens on their way through layers.

    `hidden`, of shape (tokens, hidden_size), goes along: what went in, then what came out.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor
    layer_pass: LayerPass


class LayerStack:
    """Embedding, decoder layers and output head of a model.

    Its layers may lie on several devices, and their weights outside of them (accelerate's
    `device_map`), or in parts on several ranks (ZeRO-3). KV rows stay on the device of their layer;
    whatever else goes in and out is on `device`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only causal LM with rotary positions. Its attention implementation is wrapped,
        which changes nothing for other callers.

    Raises
    ------
    ModelError
        When Homer cannot drive the model, with the reason. A family that is not in the test matrix
        is held against its own forward pass.
    """

    def __init__(self, model: Any) -> None:
        base = decoder_of(model)
        self.config = base.config
        self.family = family_of(self.config)
        missing = [
            name for name in ("layers", "rotary_emb", self.family.norm) if not hasattr(base, name)
        ]
        if missing:
            raise ModelError(
                f"{type(model).__name__} has no {', '.join(missing)}; Homer needs a decoder-only "
                f"model with rotary position embeddings"
            )
        if not self.family.tested and not getattr(model, "_supports_attention_backend", False):
            raise ModelError(
                f"{type(model).__name__} does not go through transformers' attention interface, by "
                f"which Homer runs a model's layers"
            )
        attention.install(model)
        self.model = model
        self.heads = HeadGroup.of(model)
        self.layers = base.layers
        self.device = execution_device(model.get_input_embeddings())
        self.layer_devices = [execution_device(layer) for layer in self.layers]
        self._offloaded = [offloaded_parts(layer) for layer in self.layers]
        self._offloaded_embeddings = offloaded_parts(model.get_input_embeddings())
        self.windows: list[Window | None] = layer_windows(self.config)
        self.cache_row = cache_row(self.config, self.family)
        # Which of the heads of a row are here.
        self.cache_heads = ALL_HEADS
        self._rotary = Rotary(base.rotary_emb, self.config)
        self._norm = getattr(base, self.family.norm)
        if not getattr(model, "_homer_hooks", False):
            for layer in self.layers:
                for name in self.family.per_token_modules:
                    if hasattr(layer, name):
                        attention.run_on_kept_rows(getattr(layer, name))
            if not self.family.tested and self.device.type != "meta":
                self._check_against_own_forward()
            model._homer_hooks = True
        if self.heads.size > 1:
            self.cache_heads = self._find_cache_heads()

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def loaded_layers(self) -> int:
        """How many of the lowest layers are here; fewer than all can run leaves and no more."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one token's key and value in one layer, as far as they are here."""
        whole = self.cache_row.numbers * self.dtype.itemsize
        return whole // self.cache_heads.size

    @property
    def footprint(self) -> Footprint:
        """Bytes that a token takes while it runs."""
        config, hidden = self.config, self.hidden_size
        inner = max(getattr(config, "intermediate_size", None) or 4 * hidden, hidden)
        return Footprint(
            kv_row_bytes=self.kv_bytes_per_row,
            hidden_row_bytes=hidden * self.dtype.itemsize,
            # Residual, norms, queries, keys, values and attention in and out; then the MLP.
            running_row_bytes=(10 * hidden + 3 * inner) * self.dtype.itemsize
            + 3 * self.kv_bytes_per_row,
        )

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def devices(self) -> list[torch.device]:
        """All devices that compute, each once."""
        return list(dict.fromkeys((self.device, *self.layer_devices)))

    @property
    def offloads(self) -> bool:
        """Whether weights of layers are brought in each time that they are used."""
        return any(self._offloaded)

    def free_bytes(self) -> int:
        """Memory that is free for rows.

        Where each of several ranks has a part of the weights, and all rows, it is what the one with
        least has: all of them call this together, and then choose alike.
        """
        free = least_memory(self.devices).free_bytes
        parts = (part for layer in self._offloaded for part in layer)
        if any(map(weights_cut, parts)):
            least = torch.tensor(free, device=self.device)
            distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
            # On the CPU they take from the same memory.
            sharing = distributed.get_world_size() if self.device.type == "cpu" else 1
            free = int(least) // sharing
        return free

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def synchronize(self) -> None:
        """Wait until all devices have done what they were told to do."""
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

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

    def embeddings_held(self) -> AbstractContextManager[None]:
        """Inside, embeddings that are offloaded are brought in once."""
        return weights_held(self._offloaded_embeddings)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings of shape (tokens, hidden_size)."""
        embeddings = self.model.get_input_embeddings()(ids)
        if self.family.embedding_multiplier is not None:
            embeddings = embeddings * getattr(self.config, self.family.embedding_multiplier)
        return embeddings

    def score_layer(self, layers: range, first: int, last: int) -> int:
        """The layer of `layers` whose scores decide, for keys from position `first` and a query at
        `last`: the highest that sees them all, else the highest of all.
        """
        for layer in reversed(layers):
            window = self.windows[layer]
            if window is None or window.sees(last, first):
                return layer
        return layers[-1]

    def run(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, layers: range, layer_pass: LayerPass
    ) -> torch.Tensor:
        """Run `layers` on `hidden` of shape (tokens, hidden_size).

        Returns the rows that `layer_pass` chose, or all of them.
        """
        run = LayerRun(hidden, position_ids, layer_pass)
        self.run_together([run], layers)
        return run.hidden

    def run_together(self, runs: Sequence[LayerRun], layers: range) -> None:
        """Take each of `runs` through `layers`, as `run` does, one layer after the other.

        Within a layer they run one by one, so that each gets the numbers that it would get alone;
        weights that are offloaded are brought in once for all of them.
        """
        rotations = [
            self._rotary(run.hidden[None], run.position_ids[None], run.layer_pass.spans, layers)
            for run in runs
        ]
        for device, together in groupby(layers, key=self.layer_devices.__getitem__):
            for place, run in enumerate(runs):
                run.hidden = run.hidden.to(device)
                run.layer_pass.positions = run.position_ids.to(device)
                rotations[place] = send_to_device(rotations[place], device)
            for layer in together:
                with weights_held(self._offloaded[layer] if len(runs) > 1 else ()):
                    for run, by_kind in zip(runs, rotations, strict=True):
                        rotation = by_kind[self._rotary.kinds[layer]]
                        self._run_layer(run, rotation, layer, is_last=layer == layers[-1])
        for run in runs:
            rows = run.layer_pass.rows
            left = run.hidden if rows is None else run.hidden.index_select(0, rows)
            run.hidden = left.to(self.device)

    def _run_layer(self, run: LayerRun, rotation: Any, layer: int, *, is_last: bool) -> None:
        layer_pass = run.layer_pass
        layer_pass.heads = self.heads
        layer_pass.layer = layer
        layer_pass.window = self.windows[layer]
        layer_pass.is_last_layer = is_last
        with layer_pass:
            run.hidden = self.layers[layer](
                run.hidden[None],
                attention_mask=None,
                position_ids=layer_pass.positions[None],
                use_cache=True,
                position_embeddings=rotation,
                **{self.family.cache_argument: layer_pass},
            )[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output logits in float32 of the last layer's `hidden`, shape (..., vocab)."""
        family, config = self.family, self.config
        if self.loaded_layers < self.num_layers:
            raise ModelError(
                f"only {self.loaded_layers} of {self.num_layers} layers are loaded, and no output "
                f"head; load the whole model to get an answer"
            )
        # Layers that are split over ranks take a batch, and nothing else.
        logits = self.model.get_output_embeddings()(self._norm(hidden)[None])[0]
        if family.logits_multiplier is not None:
            logits = logits * getattr(config, family.logits_multiplier)
        if family.logits_divisor is not None:
            logits = logits / getattr(config, family.logits_divisor)
        cap = None if family.logits_softcap is None else getattr(config, family.logits_softcap)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float().to(self.device)

    @torch.inference_mode()
    def _find_cache_heads(self) -> HeadGroup:
        """Run a token, to see whether the cache is split as the model is."""
        node_pass = NodePass(span=1)
        ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        name = f"{type(self.model).__name__} ({self.config.model_type})"
        try:
            self.run(self.embed(ids), ids, range(1), node_pass)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{name} does not run in {self.heads.size} parts: {error}; use another engine, or "
                f"one process"
            ) from error
        here, whole = node_pass.kv[0][0].shape[0], self.cache_row.key[0]
        if here == whole:
            return ALL_HEADS
        if here * self.heads.size != whole:
            raise ModelError(
                f"{name} has {whole} heads of keys and values, and {here} of them on each of "
                f"{self.heads.size} ranks; Homer needs equal parts"
            )
        return self.heads

    @torch.inference_mode()
    def _check_against_own_forward(self) -> None:
        """Run a few tokens in two parts, layer by layer; refuse where the model itself differs."""
        name = f"{type(self.model).__name__} ({self.config.model_type})"
        ids = torch.arange(_CHECK_TOKENS, device=self.device) % self.vocab_size
        own = self.model(ids[None], use_cache=False)
        # A decoder alone ends with its norm.
        whole = self.loaded_layers == self.num_layers
        expected = (own.logits if whole else own.last_hidden_state)[0, _CHECK_PAST:].float()
        finish = self.logits if whole else self._norm
        positions = torch.arange(_CHECK_TOKENS, device=self.device)
        layers = range(self.loaded_layers)
        scored: list[int] = []
        first = NodePass(span=_CHECK_TOKENS)
        second = NodePass(
            span=_CHECK_TOKENS,
            past=first.kv.__getitem__,
            past_positions=positions[:_CHECK_PAST],
            on_scores=lambda layer, _: scored.append(layer),
        )
        try:
            self.run(self.embed(ids[:_CHECK_PAST]), positions[:_CHECK_PAST], layers, first)
            hidden = self.embed(ids[_CHECK_PAST:])
            logits = finish(self.run(hidden, positions[_CHECK_PAST:], layers, second)).float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"{name} cannot be run layer by layer: {error}") from error
        parts = self.cache_heads.size
        rows = {CacheRow(*((t.shape[0] * parts, t.shape[2]) for t in kv)) for kv in second.kv}
        if scored != list(layers) or len(second.kv) != len(layers):
            raise ModelError(
                f"{name} has layers whose attention does not go through transformers' attention "
                f"interface and cache, by which Homer runs a model's layers"
            )
        if rows != {self.cache_row}:
            raise ModelError(
                f"{name} caches {rows}, not {self.cache_row} in every layer; describe the family "
                f"in homer/families.py"
            )
        scale = expected.std().item()
        worst = (logits - expected).abs().max().item()
        if not worst <= _CHECK_TOLERANCE * scale:
            raise ModelError(
                f"{name} run layer by layer differs from its own forward pass (by {worst:.2g} in "
                f"logits that spread by {scale:.2g}): it does more around its layers than Homer "
                f"knows; describe the family in homer/families.py"
            )
