"""What a measurement of answers consists of: task, lengths, methods, samples.

Knows nothing about how it is carried out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from homer import __version__
from homer.bench.methods import Method
from homer.demo import tasks
from homer.errors import ConfigError
from homer.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class QualityRun:
    """What to measure.

    Attributes
    ----------
    model : str
        Folder of a model with a tokenizer.
    task : "passkey" or "multikey"
    lengths : tuple of int
        Prompt tokens, prefix and question included; prompts come out at most that long.
    methods : tuple of Method
    samples : int
        Samples per length. All methods get the same ones.
    plain_samples : int, optional
        Samples per length beyond the window for the methods with full attention, whose time grows
        with the square of the length.
    plain_max_length : int, optional
        Longest prompt for those methods.
    keys : int
        How many keys a multi-key text states.
    first_seed : int
        Samples are numbered from here.
    dtype, device : str
        As `homer.loading.load_model` takes them.
    threads : int
        CPU threads of each process.
    """

    model: str
    task: tasks.Task
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    samples: int = 100
    plain_samples: int | None = None
    plain_max_length: int | None = None
    keys: int = tasks.DEFAULT_KEYS
    first_seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1

    @cached_property
    def window(self) -> int:
        """The model's window in tokens."""
        return ModelShape.load(self.model).window

    def wanted_samples(self, method: Method, length: int) -> int:
        """How many samples a method answers at a length."""
        if not method.is_full_attention:
            return self.samples
        if self.plain_max_length is not None and length > self.plain_max_length:
            return 0
        if self.plain_samples is not None and length > self.window:
            return min(self.plain_samples, self.samples)
        return self.samples

    def identity(self, method: Method) -> str:
        """Equal where a result at the same length and seed must be equal."""
        facts = {
            "homer": __version__,
            "model": self._fingerprint,
            "task": self.task,
            "keys": self.keys if self.task == "multikey" else None,
            "dtype": self.dtype,
            "method": method.name,
            **method.settings,
        }
        return xxhash.xxh64(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _fingerprint(self) -> str:
        """Of the model's files: weights, tokenizer and bias, whatever they are called."""
        digest = xxhash.xxh64()
        for file in sorted(Path(self.model).iterdir()):
            if file.suffix in (".safetensors", ".json", ".model", ".bin"):
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 24):
                        digest.update(block)
        return digest.hexdigest()


def parse_lengths(text: str, window: int) -> tuple[int, ...]:
    """Lengths such as `0.75x,8x,4096`: multiples of the window, or tokens.

    Raises
    ------
    ConfigError
        For what is neither.
    """
    lengths = []
    for part in text.split(","):
        try:
            length = int(float(part[:-1]) * window) if part.endswith("x") else int(part)
        except ValueError:
            length = 0
        if length < 1:
            raise ConfigError(
                f"{part!r} is no length; write multiples of the window or tokens: 0.75x,8x,4096"
            )
        lengths.append(length)
    return tuple(dict.fromkeys(lengths))
