"""Makes samples and has them answered, in one process. Knows nothing about what is already done."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from homer.bench.methods import Answerer, Method, Prompt
from homer.bench.quality_run import QualityRun
from homer.bench.results import Record
from homer.bias import find_bias, load_bias
from homer.demo import prose, tasks
from homer.errors import ConfigError
from homer.loading import load_model


class Trial(NamedTuple):
    """One sample, and the methods that have not answered it yet."""

    length: int
    seed: int
    methods: tuple[Method, ...]


class Examiner:
    """One process's model and tokenizer; makes samples and has them answered."""

    def __init__(self, run: QualityRun) -> None:
        self.run = run
        self.tokenizer: Any = AutoTokenizer.from_pretrained(run.model)
        model = load_model(run.model, dtype=run.dtype, device=run.device)
        bias_file = find_bias(run.model)
        bias = None
        if bias_file is not None:
            bias = load_bias(
                bias_file,
                num_layers=model.config.num_hidden_layers,
                hidden_size=model.config.hidden_size,
            )
        self.answerer = Answerer(model, bias)
        # The longest question there is, so that a length means the same for all samples.
        questions = [tasks.question(place) for place in [None, *prose.PLACES]]
        self.affix_tokens = len(self._ids(tasks.PREFIX, special=True)) + max(
            map(self.count_tokens, questions)
        )

    def examine(self, trial: Trial) -> list[Record]:
        """Have one sample answered by each method of the trial."""
        if trial.length <= self.affix_tokens:
            raise ConfigError(
                f"prompts of {trial.length} tokens have no room beside prefix and question "
                f"({self.affix_tokens} tokens); ask for longer ones"
            )
        sample = tasks.make_sample(
            self.run.task,
            trial.length - self.affix_tokens,
            self.count_tokens,
            trial.seed,
            keys=self.run.keys,
        )
        prompt = Prompt(
            torch.tensor(self._ids(sample.prefix, special=True)),
            torch.tensor(self._ids(sample.context)),
            torch.tensor(self._ids(sample.suffix)),
        )
        key = self._key_tokens(sample)
        # The key's own tokens and one more, by which a wrong continuation shows.
        max_new_tokens = self.count_tokens(" " + sample.answer) + 1
        records = []
        for method in trial.methods:
            answer = self.answerer.answer(method, prompt, max_new_tokens)
            generated: str = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
            records.append(
                Record(
                    identity=self.run.identity(method),
                    task=sample.task,
                    method=method.name,
                    length=trial.length,
                    seed=trial.seed,
                    right=sample.is_right(generated),
                    key_kept=bool(torch.isin(key, answer.context_indices).all()),
                    answer=sample.answer,
                    generated=generated,
                    prompt_tokens=len(prompt),
                    seconds=round(answer.seconds, 4),
                )
            )
        return records

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return len(self._ids(text))

    def _key_tokens(self, sample: tasks.Sample) -> torch.Tensor:
        """Context indices of the tokens that spell the sample's key."""
        start = sample.context.index(sample.answer, sample.needle[0])
        end = start + len(sample.answer)
        encoded = self.tokenizer(
            sample.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = enumerate(encoded["offset_mapping"])
        return torch.tensor([i for i, (first, last) in spans if first < end and last > start])

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=special, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids


_examiner: Examiner | None = None


def start_process(run: QualityRun) -> None:
    """Make this process ready to examine."""
    global _examiner
    # Ctrl-C ends it at once: what is half done is done again by the next run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    disable_progress_bar()
    torch.set_num_threads(run.threads)
    _examiner = Examiner(run)


def examine(trial: Trial) -> list[Record]:
    """Examine in a process that `start_process` made ready."""
    assert _examiner is not None
    return _examiner.examine(trial)
