"""The shipped demo model: answers inside its window, and far beyond it with Homer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from transformers import AutoTokenizer

from homer import HomerModel
from homer.bias import find_bias, load_bias
from homer.demo import MODEL_DIR, tasks
from homer.demo.train import SETTINGS, WINDOW

FIRST_SEED = 10_000


class Asked(NamedTuple):
    """A sample's prompt, as token ids."""

    sample: tasks.Sample
    prefix: torch.Tensor
    context: torch.Tensor
    suffix: torch.Tensor


@pytest.fixture(scope="module")
def model() -> HomerModel:
    torch.set_num_threads(1)
    return HomerModel.from_pretrained(MODEL_DIR, device="cpu")


class Asker:
    """Makes prompts and reads answers with the shipped tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def ids(self, text: str, *, special: bool = False) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    def ask(self, task: tasks.Task, tokens: int, number: int) -> Asked:
        sample = tasks.make_sample(
            task, tokens, lambda text: len(self.ids(text)), FIRST_SEED + number
        )
        prefix = self.ids(sample.prefix, special=True)
        return Asked(sample, prefix, self.ids(sample.context), self.ids(sample.suffix))

    def is_right(self, asked: Asked, answer: torch.Tensor) -> bool:
        return asked.sample.is_right(str(self.tokenizer.decode(answer, skip_special_tokens=True)))


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker()


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_plain_model_answers_inside_its_window(
    model: HomerModel, asker: Asker, task: tasks.Task
) -> None:
    right = 0
    for number in range(12):
        asked = asker.ask(task, WINDOW - 40, number)
        prompt = torch.cat((asked.prefix, asked.context, asked.suffix))[None]
        out = model.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10
        )
        right += asker.is_right(asked, out[0, prompt.shape[1] :])
    assert right >= 11


@pytest.mark.parametrize("task", tasks.TASKS)
def test_homer_answers_at_eight_windows(model: HomerModel, asker: Asker, task: tasks.Task) -> None:
    right = 0
    for number in range(6):
        asked = asker.ask(task, 8 * WINDOW, number)
        context = model.compress(asked.prefix, asked.context, asked.suffix)
        assert len(context.position_ids) <= SETTINGS.target_len
        right += asker.is_right(asked, model.generate(context, max_new_tokens=10))
    assert right >= 5


def test_what_is_shipped_fits_together_and_is_small(model: HomerModel) -> None:
    assert model.config == SETTINGS
    bias_file = find_bias(MODEL_DIR)
    assert bias_file is not None
    layers = model.stack.num_layers
    bias = load_bias(bias_file, num_layers=layers, hidden_size=model.stack.hidden_size)
    # Every distance that a chunk of the whole window can have.
    assert bias.shape[1] >= WINDOW - len(tasks.PREFIX.split()) - 4
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 8e6
