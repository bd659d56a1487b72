"""Train the demo model from nothing and write it in Hugging Face format.

``python -m homer.demo.train --out DIR`` makes the tokenizer, trains through the stages below, and
saves weights, tokenizer and settings. With ``--checkpoint`` it saves its state now and then, and
goes on from there when started again. Knows nothing about merging beyond what ``batches``
simulates.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from homer.bias import BIAS_FILE, BiasInfo, save_bias
from homer.calibration import cut_chunks, measure_bias
from homer.config import HomerConfig
from homer.demo import MODEL_DIR, tasks
from homer.demo.batches import BatchMaker, Stage
from homer.demo.losses import FIRST_SCORED_LAYER, compute_losses, recording
from homer.demo.tokenizer import make_tokenizer
from homer.shape import DEFAULTS_FILE
from homer.stack import LayerStack

WINDOW = 512
LAYERS = 10
HIDDEN = 128
STAGES = (
    # Short rows full of keys: the heads that find and read a key by its name take shape.
    Stage(350, 12, 96, 320, 5, 4, (1,), guide=0.3),
    # Longer rows, in one or several chunks, anywhere in the window, neighbours pruned.
    Stage(300, 16, 192, 512, 5, 4, (1, 2, 4), guide=0.1),
    # The whole window, few keys.
    Stage(250, 8, 480, 512, 4, 4, (1, 2, 4, 8), guide=0.0),
)
SETTINGS = HomerConfig(
    max_chunk_len=WINDOW // 2, target_len=WINDOW // 2, warmup_layers=FIRST_SCORED_LAYER
)
CALIBRATION_CHUNKS = 200
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
TEXT_WEIGHT = 0.1
SURVIVE_WEIGHT = 0.3
LOG_EVERY = 25
CHECKPOINT_EVERY = 100


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of under 2 million parameters."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        initializer_range=HIDDEN**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Tokens begin well apart: digits that differ by little more than noise are not copied for long.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    # Heads that begin with equal maps for queries and keys look for tokens like the one that asks,
    # which is most of what finding a key by its name needs.
    for layer in model.model.layers[FIRST_SCORED_LAYER:]:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    return model


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LEARNING_RATE * warm * (0.05 + 0.95 * cosine)


class Trainer:
    """Everything that a checkpoint holds, and the loop over steps."""

    def __init__(self, seed: int, stages: tuple[Stage, ...], device: torch.device) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.device, self.stages = device, stages
        self.tokenizer = make_tokenizer(seed)
        self.model = make_model(self.tokenizer).to(device)  # type: ignore[arg-type]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=PEAK_LEARNING_RATE,
            betas=(0.9, 0.98),
        )
        self.maker = BatchMaker(self.tokenizer, seed)
        self.rng = random.Random(f"merge layers/{seed}")
        self.step = 0

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        done = self.step
        for stage in self.stages:
            if done < stage.steps:
                return stage
            done -= stage.steps
        return self.stages[-1]

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what to print about it."""
        stage = self.stage()
        batch = self.maker.draw(stage).to(self.device)
        merge_layer = self.rng.randint(FIRST_SCORED_LAYER + 1, LAYERS)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = compute_losses(self.model, batch, merge_layer, guided=stage.guide > 0)
        loss = (
            losses.answer
            + TEXT_WEIGHT * losses.text
            + SURVIVE_WEIGHT * losses.survive
            + stage.guide * losses.guide
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {
            "answer": losses.answer.item(),
            "text": losses.text.item(),
            "survive": losses.survive.item(),
            "guide": losses.guide.item(),
            "right": losses.right,
            "lost": losses.lost,
        }

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside the block ``train_step`` can be called."""
        with recording(self.model):
            yield

    def run(self, checkpoint: Path | None, stop_at: int | None = None) -> None:
        """Train to the end or to a step, from the checkpoint if there is one, saving to it."""
        end = self.steps if stop_at is None else stop_at
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
            print(f"going on from step {self.step} of {self.steps}", flush=True)
        begin, sums, since = time.monotonic(), dict[str, float](), self.step
        with self.training():
            while self.step < end:
                for name, value in self.train_step().items():
                    sums[name] = sums.get(name, 0.0) + value
                if self.step % LOG_EVERY == 0 or self.step == end:
                    parts = "  ".join(f"{k} {v / (self.step - since):.3f}" for k, v in sums.items())
                    elapsed = time.monotonic() - begin
                    print(f"step {self.step}/{self.steps}  {elapsed:.0f} s  {parts}", flush=True)
                    sums, since = {}, self.step
                at_mark = self.step % CHECKPOINT_EVERY == 0 or self.step == end
                if checkpoint is not None and at_mark:
                    self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Write a checkpoint; a run stopped in between leaves the one before whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": (self.rng.getstate(), self.maker.rng.getstate()),
            "stages": [asdict(stage) for stage in self.stages],
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint that this script wrote."""
        state = torch.load(path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"][0])
        self.maker.rng.setstate(state["rng"][1])
        self.step = state["step"]

    def export(self, out: Path) -> None:
        """Write the model in Hugging Face format, weights in bfloat16, with its settings."""
        model = copy.deepcopy(self.model).to("cpu", torch.bfloat16)
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=False,
        )
        model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        settings = {k: v for k, v in asdict(SETTINGS).items() if v is not None}
        (out / DEFAULTS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self._calibrate(model.float(), out)

    def _calibrate(self, model: LlamaForCausalLM, out: Path) -> None:
        """Measure the calibration bias on prose without keys and write it beside the model."""

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids

        prefix = self.tokenizer(tasks.PREFIX, return_tensors="pt").input_ids[0]
        length = WINDOW - len(prefix)
        text = tasks.plain_text(
            CALIBRATION_CHUNKS * length, lambda part: len(encode(part)), self.seed
        )
        chunks = cut_chunks(torch.tensor(encode(text)), length, CALIBRATION_CHUNKS)
        bias = measure_bias(LayerStack(model), chunks, prefix)
        info = BiasInfo("homer-demo", LAYERS, HIDDEN, length, len(chunks))
        save_bias(out / BIAS_FILE, bias, info)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the model")
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; all cores if not given")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(args.seed, STAGES, device)
    trainer.run(args.checkpoint)
    trainer.export(args.out)
    print(json.dumps({"written to": str(args.out), "steps": trainer.step}))


if __name__ == "__main__":
    main()
