"""Device maps: what `from_pretrained` is told of them, and what accelerate leaves undone.

Knows nothing about how a model is run.
"""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import get_max_memory

from homer.devices import placing_hooks
from homer.errors import ConfigError
from homer.load_options import LoadOptions

_OUTSIDE = ("cpu", "disk")


def placement_arguments(options: LoadOptions) -> dict[str, Any]:
    """What `from_pretrained` is told of a device map.

    Raises
    ------
    ConfigError
        When it names a GPU that is not there, or any beside device cpu.
    """
    placement, limits = options.placement, options.memory_limits
    gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
    for name, places in (
        ("device_map", placement.values() if isinstance(placement, dict) else ()),
        ("max_memory", limits or ()),
    ):
        if missing := [str(place) for place in places if not _is_there(place, gpus)]:
            raise ConfigError(
                f"{name} names {', '.join(sorted(set(missing)))}, but this process has {gpus} GPUs "
                "to use: name GPUs by their numbers from 0 on (with device cpu there are none), "
                "cpu or disk"
            )
    if limits is None and not gpus and isinstance(placement, str):
        # accelerate would take the GPUs that there are.
        limits = {"cpu": get_max_memory()["cpu"]}
    arguments = {"device_map": placement, "max_memory": limits}
    if options.offload_folder is not None:
        arguments["offload_folder"] = options.offload_folder
    return arguments


def _is_there(place: int | str, gpus: int) -> bool:
    number = str(place).removeprefix("cuda:")
    return place in _OUTSIDE or (number.isdigit() and int(number) < gpus)


def check_modules(model: torch.nn.Module, device_map: Any) -> None:
    """Refuse a map of modules that the model has not: accelerate would leave them out in silence.

    Raises
    ------
    ConfigError
        Which they are.
    """
    if not isinstance(device_map, dict):
        return
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    if unknown := sorted(device_map.keys() - known):
        children = [name for name, _ in model.named_children()]
        raise ConfigError(
            f"device_map names {', '.join(unknown)}, which {type(model).__name__} does not have; "
            f"its parts are {', '.join(children)}, and theirs"
        )


def mend_tied_head(model: Any) -> None:
    """Let an output head outside have the embeddings' weights, where it is tied to them.

    accelerate looks for them under the head's own name, under which no file has them.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for hook in placing_hooks(head) if head is not None else ():
        if hook.offload and not _has_weight(hook):
            inside = {"weight": embeddings.weight}
            outside = [one.weights_map for one in placing_hooks(embeddings) if one.offload]
            hook.weights_map = ChainMap(*(outside or [inside]), hook.weights_map)


def _has_weight(hook: AlignDevicesHook) -> bool:
    try:
        return hook.weights_map["weight"] is not None
    except KeyError:
        return False
