"""The training script: learns, goes on from a checkpoint unchanged, writes a usable model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from homer.demo import tasks
from homer.demo.batches import Stage
from homer.demo.train import SETTINGS, WINDOW, Trainer, learning_rate
from homer.shape import homer_defaults

CPU = torch.device("cpu")
STAGES = (
    Stage(2, 2, 64, 160, keys=3, questions=2, chunks=(1,), guide=0.3),
    Stage(2, 2, 64, 160, keys=3, questions=2, chunks=(2,), guide=0.0),
)


@pytest.fixture(scope="module")
def trained() -> Trainer:
    trainer = Trainer(0, STAGES, CPU)
    trainer.run(None)
    return trainer


def test_going_on_from_a_checkpoint_changes_nothing(trained: Trainer, tmp_path: Path) -> None:
    first = Trainer(0, STAGES, CPU)
    first.run(tmp_path / "checkpoint.pt", stop_at=3)
    assert first.step == 3
    second = Trainer(0, STAGES, CPU)
    second.run(tmp_path / "checkpoint.pt")
    assert second.step == trained.step == 4
    for ours, theirs in zip(second.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_loss_falls_on_a_batch_seen_again(trained: Trainer) -> None:
    trainer = Trainer(1, (Stage(40, 2, 64, 160, 3, 2, (1,), guide=0.3),), CPU)
    batch = trainer.maker.draw(trainer.stage())
    trainer.maker.draw = lambda stage: batch  # type: ignore[method-assign]
    history = []
    with trainer.training():
        while trainer.step < 16:
            history.append(trainer.train_step())
    for name in ("answer", "text", "survive", "guide"):
        assert history[-1][name] < 0.9 * history[0][name], name


def test_what_is_written_loads_as_a_plain_checkpoint(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homer.demo.train.CALIBRATION_CHUNKS", 2)
    trained.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.max_position_embeddings == WINDOW
    assert homer_defaults(tmp_path) == SETTINGS
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 8e6
    assert tokenizer(tasks.PREFIX).input_ids == trained.tokenizer(tasks.PREFIX).input_ids
    for name, value in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert 0 < peak < 100
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)
