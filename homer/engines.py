"""What can run a model, by name. Plain data: imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from homer.errors import ConfigError
from homer.load_options import LoadOptions
from homer.quantization import method_of

Engine = Literal["torch", "deepspeed-tp", "transformers-tp", "deepspeed-zero3"]
"""torch in one process; tensor parallelism on several ranks; or weights in parts, by ZeRO-3."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
# transformers' quantizers that plan for their scales.
_SPLIT_QUANTIZED = ("fp8",)


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


def check_loading(engine: Engine, load: LoadOptions) -> None:
    """Refuse options for loading that an engine's library cannot do.

    Raises
    ------
    ConfigError
        Which one, why, and what to do.
    """
    if engine == "torch":
        return
    for name in ("device_map", "lower_layers"):
        if getattr(load, name) is not None:
            raise ConfigError(
                f"{name} is set, but engine {engine} has its own way to spread weights over ranks; "
                "use engine torch for it"
            )
    if load.quantization is not None:
        check_quantization(engine, method_of(load.quantization))
    if engine == "deepspeed-tp" and load.adapter is not None and not load.merge_adapter:
        raise ConfigError(
            f"the adapter {load.adapter!r} cannot stay beside the weights: DeepSpeed would split "
            "its layers too, and wrong; set merge_adapter, or use engine transformers-tp"
        )


def check_quantization(engine: Engine, method: str | None) -> None:
    """Refuse weights quantized by `method` (None: not at all) that `engine` cannot divide.

    Raises
    ------
    ConfigError
        What to use.
    """
    if engine == "torch" or method is None:
        return
    if engine == "transformers-tp" and method in _SPLIT_QUANTIZED:
        return
    raise ConfigError(
        f"engine {engine} cannot divide weights that are quantized by {method} over ranks: their "
        f"scales belong to whole weights; use engine torch, or weights that are not quantized "
        f"(transformers-tp takes {', '.join(_SPLIT_QUANTIZED)})"
    )
