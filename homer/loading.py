"""Loading a checkpoint in Hugging Face format: all of it, or the layers that leaves need.

transformers builds the model on the meta device and fills it weight by weight from the shards: on
the CPU with the pages of the files themselves, on a GPU each weight straight into it. So nothing is
there twice. Knows nothing about trees or machines.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM

from homer.adapters import add_adapter
from homer.checkpoint import check_generation_config, find_shards
from homer.device_map import check_modules, mend_tied_head, placement_arguments
from homer.errors import CheckpointError, ConfigError, HomerError, ModelError
from homer.flash import check_flash, is_flash
from homer.load_options import FLASH_PACKAGES, LoadOptions
from homer.load_progress import shown_by_shards
from homer.quantization import quantization_for
from homer.shape import load_config
from homer.stack import decoder_of

_log = logging.getLogger(__name__)
_STATUS = Path("/proc/self/status")
_FIELDS = frozenset(field.name for field in dataclasses.fields(LoadOptions))
_NAMED = 3
_DAMAGE = ("PytorchStreamReader", "no file named")


@dataclass(frozen=True)
class LoadReport:
    """What loading took: seconds, the bytes of the weights, and the most memory of the process.

    `peak_bytes` is what the process had resident at its most since it began, 0 where the system
    does not tell; pages of files count.
    """

    seconds: float
    weight_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, model: Any, seconds: float) -> LoadReport:
        """Of a model that was loaded just now."""
        return cls(seconds, _weight_bytes(model), _peak_bytes())


def load_model(
    path_or_id: str | Path,
    options: LoadOptions | None = None,
    runs_on: str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a causal LM for inference.

    Parameters
    ----------
    path_or_id : str or Path
        A folder in Hugging Face format, or a model id.
    options : LoadOptions, optional
    runs_on : str, optional
        The device to which something else brings the weights, where `options` say another.
    **kwargs
        Fields of `LoadOptions` take the place of those of `options`; others are passed on to
        `from_pretrained`.

    Returns
    -------
    transformers.PreTrainedModel
        With `options.lower_layers`, the decoder alone, whose `layers` are only those; its config
        still has the number of all.

    Raises
    ------
    ConfigError
        When options contradict each other, the checkpoint, or the devices that there are.
    CheckpointError
        When files are missing, damaged, or another model's.
    ModelError
        When the model cannot be loaded for another reason: a library is missing, memory.
    """
    started = time.perf_counter()
    given = {name: kwargs.pop(name) for name in _FIELDS & kwargs.keys()}
    if isinstance(given.get("dtype"), torch.dtype):
        given["dtype"] = str(given["dtype"]).removeprefix("torch.")
    options = LoadOptions.of(options, given)
    config = load_config(path_or_id, **options.hub)
    check_generation_config(path_or_id, options.revision)
    shards = find_shards(path_or_id)
    with _explained(path_or_id, options.attention):
        target = _choose_device(options)
        if is_flash(options.attention):
            check_flash(
                options.attention, known_dtype(options, config), torch.device(runs_on or target)
            )
        kwargs = {**_arguments(options, config, target), **kwargs}
        if "distributed_config" in kwargs:
            # Each rank's part goes to its own device.
            kwargs.pop("device_map", None)
        with shown_by_shards(shards):
            if options.lower_layers is None:
                model = _fill(AutoModelForCausalLM, path_or_id, kwargs)
            else:
                model = _load_lower(path_or_id, config, options.lower_layers, kwargs)
    if options.device_map is not None:
        mend_tied_head(model)
    if options.adapter is not None:
        add_adapter(model, options)
    report = LoadReport.of(model, time.perf_counter() - started)
    _log.info(
        "loaded %s in %.1f s: %.1f MiB of weights on %s; the process had %.1f MiB at its most",
        path_or_id, report.seconds, report.weight_bytes / (1 << 20), target,
        report.peak_bytes / (1 << 20),
    )  # fmt: skip
    return model.eval()


def _arguments(options: LoadOptions, config: Any, target: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    arguments: dict[str, Any] = {**options.hub, "dtype": options.dtype}
    if options.local_files_only:
        # Else transformers asks the hub, again and again, whether the model is an adapter.
        arguments["adapter_kwargs"] = {"local_files_only": True}
    if options.attention != "auto":
        arguments["attn_implementation"] = options.attention
    if options.device_map is not None:
        arguments.update(placement_arguments(options))
    elif target.type != "cpu":
        # Each weight goes there as it is read, with no copy of the model on the CPU.
        arguments["device_map"] = {"": str(target)}
    quantization = quantization_for(config, options.quantization)
    if quantization is not None:
        arguments["quantization_config"] = quantization
    return arguments


def _fill(kind: Any, path_or_id: str | Path, arguments: dict[str, Any]) -> Any:
    """A model of `kind` with every weight that it has; weights for which it has no place are left.

    transformers would give missing weights random numbers, and say so in a warning.
    """
    model, info = kind.from_pretrained(path_or_id, output_loading_info=True, **arguments)
    check_modules(model, arguments.get("device_map"))
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{str(path_or_id)!r} lacks {len(missing)} weights of {type(model).__name__}, like "
            f"{', '.join(missing[:_NAMED])}: its config.json is another model's, or its files are "
            "not complete"
        )
    return model


def _load_lower(path_or_id: str | Path, config: Any, layers: int, arguments: dict[str, Any]) -> Any:
    """The decoder with its lowest `layers`: nothing of the others is read, nor the output head."""
    lower = copy.deepcopy(config)
    # Of a model that also sees or hears, its text part.
    whole, part = (one.get_text_config(decoder=True) for one in (config, lower))
    every = whole.num_hidden_layers
    if layers >= every:
        raise ConfigError(f"lower_layers is {layers}, but the model has {every}; use less")
    # Whatever is listed layer by layer: kinds of attention, rotations.
    listed = {
        name: value
        for name, value in vars(whole).items()
        if isinstance(value, list) and len(value) == every
    }
    vars(part).update({name: value[:layers] for name, value in listed.items()})
    vars(part)["num_hidden_layers"] = layers
    with _quiet():
        model = decoder_of(_fill(AutoModel, path_or_id, {**arguments, "config": lower}))
    vars(model.config).update(listed, num_hidden_layers=every)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of weights that are not used: here those are meant."""
    logger = transformers.utils.logging
    before = logger.get_verbosity()
    logger.set_verbosity_error()
    try:
        yield
    finally:
        logger.set_verbosity(before)


def known_dtype(options: LoadOptions, config: Any) -> torch.dtype | None:
    """The type that weights will have; None where only they tell."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return getattr(config, "dtype", None) or getattr(
        config.get_text_config(decoder=True), "dtype", None
    )


@contextmanager
def _explained(path_or_id: str | Path, attention: str) -> Iterator[None]:
    name = str(path_or_id)
    try:
        yield
    except HomerError:
        # Some are ValueErrors too; they have said it all.
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"a file of {name!r} is damaged: {error}; copy or download it again"
        ) from error
    except ImportError as error:
        advice = ""
        if package := FLASH_PACKAGES.get(attention):
            advice = f" Install {package} on a machine with a GPU, or use attention sdpa"
        raise ModelError(f"loading {name!r} needs a package: {error}{advice}") from error
    except KeyError as error:
        raise CheckpointError(
            f"the config.json of {name!r} names {error}, which transformers "
            f"{transformers.__version__} does not know"
        ) from error
    except (UnpicklingError, EOFError) as error:
        # Their texts advise to load what is no file of weights all the same.
        raise CheckpointError(
            f"a file of {name!r} holds no weights ({type(error).__name__}); a file that git LFS "
            "has not fetched, or an interrupted copy, looks so: copy or download it again"
        ) from error
    except (JSONDecodeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"a file of {name!r} cannot be used: {error}; copy or download it again"
        ) from error
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        if any(sign in str(error) for sign in _DAMAGE):
            raise CheckpointError(
                f"the files of {name!r} are damaged or not complete: {error}; copy or download "
                "them again"
            ) from error
        if "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error):
            raise CheckpointError(
                f"the weights of {name!r} have other sizes than its config.json says: one of them "
                f"is another model's ({error})"
            ) from error
        raise ModelError(f"cannot load the model {name!r}: {error}") from error


def _choose_device(options: LoadOptions) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise ConfigError(f"device is {options.device!r}; use auto, cpu or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"device is {options.device!r}, but torch finds {count} GPUs here; use another, or cpu"
        )
    return device


def _weight_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_bytes() -> int:
    if not _STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else 0
