"""Settings of the method. Knows nothing about models, tensors or machines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from homer.errors import ConfigError

PlanKind = Literal["balanced", "paper"]
ScoreKind = Literal["max_logit", "softmax_mean", "query_window", "key_norm", "random"]


@dataclass(frozen=True, kw_only=True)
class HomerConfig:
    """Settings of hierarchical context merging.

    The default is what measured best: a balanced tree, and the suffix refreshed at the root.
    `HomerConfig.paper` is the authors' method to the letter.

    Parameters
    ----------
    max_chunk_len : int
        Longest input of any node in tokens, prefix and suffix included. Half of the model's window
        is usual: it leaves the other half to the answer.
    target_len : int
        Most tokens in the final cache, prefix and suffix included.
    warmup_layers : int
        Lower layers that run on the leaves before any merging. About 3/8 of the model's layers is
        usual.
    max_initial_chunk_len : int, optional
        Longest leaf in tokens, prefix and suffix included, where it should differ from
        `max_chunk_len`.
    plan : "balanced" or "paper"
        "paper" rounds the number of leaves up to a power of two and gives the layers that do not
        divide evenly to the leaves. "balanced" takes as few leaves as the context needs, spreads it
        evenly over them, and gives those layers to the top of the tree: less work everywhere.
    fan_in : int, optional
        Most children per merge. By default 2, or the least that leaves every level of the tree at
        least one layer.
    refresh_suffix : bool
        Run the suffix once more at the root, over the surviving context, instead of using the
        average of all chunks' suffix states.
    score : "max_logit", "softmax_mean", "query_window", "key_norm" or "random"
        What decides which tokens are kept (`homer.significance`). "max_logit" is the paper's, and
        the only one that a calibration bias is measured for; others are used without.

    Raises
    ------
    ConfigError
        When a setting is out of its range.

    References
    ----------
    HOMER, arXiv 2404.10308, sections 3.1 to 3.3.
    """

    max_chunk_len: int
    target_len: int
    warmup_layers: int
    max_initial_chunk_len: int | None = None
    plan: PlanKind = "balanced"
    fan_in: int | None = None
    refresh_suffix: bool = True
    score: ScoreKind = "max_logit"

    def __post_init__(self) -> None:
        whole = ("max_chunk_len", "target_len", "warmup_layers", "max_initial_chunk_len", "fan_in")
        for field in whole:
            value = getattr(self, field)
            if type(value) is not int and (value is not None or field in whole[:3]):
                raise ConfigError(f"{field} is {value!r}; set it to a whole number")
        if type(self.refresh_suffix) is not bool:
            raise ConfigError(f"refresh_suffix is {self.refresh_suffix!r}; set it to true or false")
        for field, least in (("max_chunk_len", 2), ("target_len", 1), ("warmup_layers", 0)):
            value = getattr(self, field)
            if value < least:
                raise ConfigError(f"{field} is {value}; set it to {least} or more")
        if self.max_initial_chunk_len is not None and self.max_initial_chunk_len < 2:
            raise ConfigError(
                f"max_initial_chunk_len is {self.max_initial_chunk_len}; set it to 2 or more, or "
                f"leave it out"
            )
        if self.plan not in get_args(PlanKind):
            raise ConfigError(f"plan is {self.plan!r}; set it to one of {get_args(PlanKind)}")
        if self.score not in get_args(ScoreKind):
            raise ConfigError(f"score is {self.score!r}; set it to one of {get_args(ScoreKind)}")
        if self.fan_in is not None and self.fan_in < 2:
            raise ConfigError(f"fan_in is {self.fan_in}; set it to 2 or more, or leave it out")

    @classmethod
    def paper(cls, **settings: Any) -> HomerConfig:
        """The authors' method to the letter: their plan, suffix states averaged, no refresh."""
        return cls(**{"plan": "paper", "refresh_suffix": False, **settings})

    @property
    def wants_bias(self) -> bool:
        """Whether a calibration bias is used: it is the mean of the paper's scores, no others."""
        return self.score == "max_logit"

    def replace(self, **changes: Any) -> HomerConfig:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)
