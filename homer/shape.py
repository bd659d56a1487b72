"""A model's dimensions and recommended settings, from the files beside its weights.

Configs are read by transformers, which knows what a family's config leaves out; it is imported only
where a config leaves something out. Knows nothing about trees or machines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homer.checkpoint import model_folder, read_json
from homer.config import HomerConfig
from homer.errors import CheckpointError, ConfigError, ModelError
from homer.families import active_mlp_width, cache_row, describe_window, family_of, usable_window
from homer.plain_config import plain_config

DEFAULTS_FILE = "homer.json"
BIAS_FILE = "bias.safetensors"
UNCALIBRATED = (
    "no calibration bias: tokens may be kept for where they stand, not for what they say. The "
    "paper's answers are worse without; the demo model's are not (docs/benchmarks.md). Measure one "
    "with homer calibrate --model MODEL --text FILE"
)
_LEAST = {"max_chunk_len": 2, "target_len": 1, "warmup_layers": 0}
_VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What costs depend on. The defaults are those of Llama-2-7B in half precision.

    `window` is how many positions the model can tell apart, scaling included; `window_source` says
    where that comes from. `intermediate_size` counts the experts that a token takes.
    `cached_numbers` is what one token takes in one layer's cache, where that is not a key and a
    value for each of `num_kv_heads`; `value_bytes` is the size of one number of it.
    """

    num_layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000
    window: int = 4096
    value_bytes: int = 2
    cached_numbers: int | None = None
    window_source: str = "given"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{field.name} is {value}; set it to 1 or more")

    @classmethod
    def load(cls, path_or_id: str | Path, **hub: Any) -> ModelShape:
        """Read the dimensions of a checkpoint in Hugging Face format; its weights are not touched.

        `hub` is as `LoadOptions.hub` gives it.

        Raises
        ------
        ModelError
            When there is no config, or Homer cannot run such a model.
        """
        file = Path(path_or_id) / "config.json"
        plain = plain_config(read_json(file)) if file.is_file() else None
        return cls._of_decoder(plain) if plain else cls.of(load_config(path_or_id, **hub))

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The dimensions that a transformers config says, of a decoder or of what holds one."""
        return cls._of_decoder(config.get_text_config(decoder=True))

    @classmethod
    def _of_decoder(cls, config: Any) -> ModelShape:
        family = family_of(config)
        row = cache_row(config, family)
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=active_mlp_width(config),
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            window=usable_window(config),
            value_bytes=_VALUE_BYTES.get(str(config.dtype).removeprefix("torch."), 4),
            cached_numbers=row.numbers,
            window_source=describe_window(config),
        )

    def recommended_config(self, **given: Any) -> HomerConfig:
        """Half of the window and 3/8 of the layers, but for what is `given`."""
        half = self.window // 2
        derived = {
            "max_chunk_len": half,
            "target_len": half,
            "warmup_layers": self.num_layers * 3 // 8,
        }
        return HomerConfig(**{**derived, **given})

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one token's key and value in one layer."""
        numbers = self.cached_numbers or 2 * self.num_kv_heads * self.head_dim
        return numbers * self.value_bytes


def homer_defaults(
    path_or_id: str | Path, *, hub: Mapping[str, Any] | None = None, **overrides: Any
) -> HomerConfig:
    """The settings for a model: those in `homer.json` beside it, others from its dimensions.

    `overrides` that are None are left out; `hub` is as `LoadOptions.hub` gives it.

    Raises
    ------
    ModelError
        When the model's config cannot be read.
    ConfigError
        When `homer.json` has unknown or wrong settings.
    """
    hub = hub or {}
    shape = ModelShape.load(path_or_id, **hub)
    return defaults_for(path_or_id, shape, hub.get("revision"), **overrides)


def defaults_for(
    path_or_id: str | Path, shape: ModelShape, revision: str | None = None, **overrides: Any
) -> HomerConfig:
    """`homer_defaults` for a model of this `shape`."""
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = _settings_beside(path_or_id, revision)
    return shape.recommended_config(**{**settings, **given})


def find_bias(path_or_id: str | Path, revision: str | None = None) -> Path | None:
    """The bias file beside a model's files, if there is one: of a model id in the hub's cache."""
    folder = model_folder(path_or_id, revision)
    path = None if folder is None else folder / BIAS_FILE
    return path if path is not None and path.is_file() else None


def settings_sources(
    path_or_id: str | Path | None, revision: str | None = None, **given: Any
) -> dict[str, str]:
    """Where the settings that are derived when nobody gives them come from, by name."""
    settings = {} if path_or_id is None else _settings_beside(path_or_id, revision)
    derived = {
        "max_chunk_len": "half of the window",
        "target_len": "half of the window",
        "warmup_layers": "3/8 of the layers",
    }
    return {
        name: "given" if name in given else DEFAULTS_FILE if name in settings else source
        for name, source in derived.items()
    }


def load_config(path_or_id: str | Path, **hub: Any) -> Any:
    """A model's config as transformers reads it; weights are not touched.

    `hub` is as `LoadOptions.hub` gives it.

    Raises
    ------
    ModelError
        When it cannot be fetched.
    CheckpointError
        When there is none, or transformers cannot read it.
    """
    file = Path(path_or_id) / "config.json"
    if file.is_file():
        read_json(file)
    elif Path(path_or_id).is_dir():
        raise CheckpointError(
            f"{str(path_or_id)!r} has no config.json; give a Hugging Face model folder"
        )
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(path_or_id, **hub)
    except OSError as error:
        if cached := model_folder(path_or_id, hub.get("revision")):
            read_json(cached / "config.json")
        raise ModelError(
            f"{str(path_or_id)!r} is no folder, and its config cannot be fetched: {error}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read the config of "
            f"{str(path_or_id)!r}: {error}"
        ) from error
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if layers < 1:
        raise CheckpointError(
            f"the config of {str(path_or_id)!r} says {layers} layers; take the model's own config"
        )
    return config


def _settings_beside(path_or_id: str | Path, revision: str | None) -> dict[str, Any]:
    """The settings in `homer.json`: none where there is no such file."""
    folder = model_folder(path_or_id, revision)
    file = None if folder is None else folder / DEFAULTS_FILE
    if file is None or not file.is_file():
        return {}
    try:
        settings = read_json(file)
    except CheckpointError as error:
        # Its user wrote it, and workers do not read it.
        raise ConfigError(str(error)) from error
    known = {field.name for field in dataclasses.fields(HomerConfig)}
    if unknown := settings.keys() - known:
        raise ConfigError(
            f"{file} has unknown settings {sorted(unknown)}; known are {sorted(known)}"
        )
    try:
        HomerConfig(**{**_LEAST, **settings})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return settings
