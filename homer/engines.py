"""What can run a model, by name. Plain data: imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from homer.errors import ConfigError

Engine = Literal["torch", "deepspeed-tp", "transformers-tp", "deepspeed-zero3"]
"""torch in one process; tensor parallelism on several ranks; or weights in parts, by ZeRO-3."""

ENGINES: tuple[Engine, ...] = get_args(Engine)


def check_engine(engine: str, ranks: int) -> None:
    """Refuse engines that there are not, or not with so many ranks.

    Raises
    ------
    ConfigError
        What to use.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; use one of {', '.join(ENGINES)}")
    if ranks < 1:
        raise ConfigError(f"ranks is {ranks}; use 1 or more")
    if engine == "torch" and ranks > 1:
        raise ConfigError(
            f"engine torch runs in one process, not on {ranks} ranks; use deepspeed-tp, "
            f"transformers-tp or deepspeed-zero3"
        )
    if engine.endswith("-tp") and ranks == 1:
        raise ConfigError(f"engine {engine} splits the model over ranks; use 2 ranks or more")
