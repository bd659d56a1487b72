"""Models over several processes: tensor parallelism by DeepSpeed or transformers, and ZeRO-3.

All processes of a torch.distributed group (its ranks) load the same checkpoint and then make the
same calls in the same order, on the same numbers; each keeps its own part. Knows nothing about
trees, or about who starts the ranks.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from homer.engines import Engine, check_engine, check_loading, check_quantization
from homer.errors import ConfigError, HomerError, ModelError
from homer.families import family_of
from homer.load_options import LoadOptions
from homer.loading import known_dtype, load_model
from homer.quantization import own_method
from homer.shape import load_config

DEEPSPEED_FAMILIES = frozenset(
    (
        "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt_neox",
        "granite", "granitemoe", "llama", "mistral", "mixtral", "phi", "qwen2", "qwen2_moe",
        "qwen3", "qwen3_moe", "smollm3",
    )
)  # fmt: skip
"""Families, by `model_type`, that DeepSpeed splits right. StableLM it splits wrong, in silence."""

_REASON_BYTES = 2000


def load_on_ranks(
    path_or_id: str | Path,
    engine: Engine,
    options: LoadOptions | None = None,
    *,
    offload: str = "cpu",
    **given: Any,
) -> Any:
    """Load this rank's part of a model. Every rank of the default process group calls it.

    Parameters
    ----------
    path_or_id : str or Path
    engine : Engine
        `deepspeed-tp` and `transformers-tp` give each rank some of the heads and a part of the
        weights; `deepspeed-zero3` leaves the weights in parts, where `offload` says, and puts a
        layer together while it runs: every rank then does all of the work.
    options : LoadOptions, optional
        `device` is "cpu"; or the GPU of rank 0, like "cuda:0", and the others have those after it.
        "auto" is "cuda:0" where there is a GPU, else the CPU.
    offload : str
        For ZeRO-3: "none" keeps the parts on the device, "cpu" in main memory, and anything else
        names a folder on a fast disk.
    **given
        Fields of `LoadOptions` that take the place of those of `options`.

    Raises
    ------
    ModelError
        When the model cannot be loaded, or split so.
    ConfigError
        When there is no such engine, it cannot do what `options` say, is not installed, or there
        is no process group.
    """
    options = LoadOptions.of(options, given)
    if engine == "torch":
        return load_model(path_or_id, options)
    if not distributed.is_initialized():
        raise ConfigError(
            f"engine {engine} needs a torch.distributed process group; call init_process_group "
            f"first, on every rank"
        )
    check_engine(engine, distributed.get_world_size())
    check_loading(engine, options)
    config = load_config(path_or_id, **options.hub)
    check_quantization(engine, own_method(config))
    device = options.device
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    number = distributed.get_rank()
    if device != "cpu":
        number += torch.device(device).index or 0
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    options = replace(options, device=device)
    # Both libraries take the group that is there, and want to know the same from here too.
    os.environ["RANK"] = str(distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(distributed.get_world_size())
    os.environ["LOCAL_RANK"] = str(number)
    # DeepSpeed prints what it does; a program's output is its own.
    with redirect_stdout(sys.stderr):
        if engine == "deepspeed-zero3":
            return _load_in_parts(path_or_id, config, options, offload)
        _check_split(config, engine)
        return _load_split(path_or_id, engine, options)


def _load_split(path_or_id: str | Path, engine: Engine, options: LoadOptions) -> Any:
    """Load by tensor parallelism."""
    if engine == "transformers-tp":
        from transformers.distributed.configuration_utils import DistributedConfig

        split = DistributedConfig(tp_size=distributed.get_world_size(), tp_plan="auto")
        return load_model(path_or_id, options, distributed_config=split)
    deepspeed = _import_deepspeed(options.device)
    # It is split on the CPU, and then each part goes to its device.
    model = load_model(path_or_id, replace(options, device="cpu"), runs_on=options.device)
    return deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": distributed.get_world_size()},
        dtype=model.dtype,
        replace_with_kernel_inject=False,
    ).module


def _check_split(config: Any, engine: Engine) -> None:
    """Refuse what would be split wrong."""
    config = config.get_text_config(decoder=True)
    family, ranks = family_of(config), distributed.get_world_size()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % ranks or (kv_heads % ranks and not family.latent_cache):
        raise ModelError(
            f"the model has {heads} query heads and {kv_heads} heads of keys and values; they "
            f"cannot be split evenly over {ranks} ranks: use a number of ranks that divides both"
        )
    if engine == "deepspeed-tp" and config.model_type not in DEEPSPEED_FAMILIES:
        raise ModelError(
            f"DeepSpeed does not split {config.model_type} right, or nobody has tried; use engine "
            f"transformers-tp. It does {', '.join(sorted(DEEPSPEED_FAMILIES))}"
        )
    if engine == "transformers-tp" and not getattr(config, "base_model_tp_plan", None):
        raise ModelError(
            f"transformers has no plan by which to split {config.model_type}; use one process, or "
            f"deepspeed-zero3"
        )


def _load_in_parts(path_or_id: str | Path, config: Any, options: LoadOptions, offload: str) -> Any:
    """Load with ZeRO-3: no process ever holds the whole model."""
    deepspeed = _import_deepspeed(options.device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    chosen = known_dtype(options, config) or torch.float32
    parameters: dict[str, Any] = {"device": offload}
    if offload not in ("none", "cpu"):
        parameters = _on_disk(Path(offload), config)
    if offload != "none":
        parameters["pin_memory"] = options.device != "cpu"
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": chosen is torch.bfloat16},
        "fp16": {"enabled": chosen is torch.float16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": parameters,
            # Also small weights stay in parts.
            "stage3_param_persistence_threshold": 0,
        },
    }
    # from_pretrained looks for it, and loads in parts, which go to their place by themselves.
    in_parts = HfDeepSpeedConfig(settings)
    placed = replace(options, device="cpu", dtype=str(chosen).removeprefix("torch."))
    with _all_or_none(path_or_id, options.device):
        model = load_model(path_or_id, placed, runs_on=options.device)
    engine = deepspeed.initialize(model=model, config=settings)[0]
    del in_parts
    return engine.module.eval()


@contextmanager
def _all_or_none(path_or_id: str | Path, device: str) -> Iterator[None]:
    """Where one rank fails inside, all do: only rank 0 reads weights, and sees what is wrong."""
    failed: HomerError | None = None
    try:
        yield
    except HomerError as error:
        failed = error
    mine = torch.zeros(_REASON_BYTES, dtype=torch.uint8)
    reason = str(failed or "").encode()[:_REASON_BYTES]
    mine[: len(reason)] = torch.tensor(list(reason), dtype=torch.uint8)
    all_of_them = [
        torch.empty_like(mine, device=device) for _ in range(distributed.get_world_size())
    ]
    distributed.all_gather(all_of_them, mine.to(device))
    if failed is not None:
        raise failed
    for one in all_of_them:
        if said := bytes(one.tolist()).rstrip(b"\0").decode(errors="replace"):
            raise ModelError(f"another rank cannot load {str(path_or_id)!r}: {said}")


def _on_disk(folder: Path, config: Any) -> dict[str, Any]:
    """DeepSpeed's settings for weights in a folder, which this process has for itself."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not folder.is_dir():
        raise ConfigError(
            f"{str(folder)!r} is no folder for weights; use none, cpu, or a folder on a fast disk"
        )
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "DeepSpeed cannot read weights from a disk here: it compiles that at first use, and "
            "needs a C++ compiler, ninja and libaio with its headers (libaio-dev); install them, "
            "or keep the weights in main memory (cpu)"
        )
    own = tempfile.mkdtemp(prefix="homer-zero-", dir=folder)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Room for the largest weight, in numbers.
    largest = max(parameter.numel() for parameter in model.parameters())
    return {"device": "nvme", "nvme_path": own, "buffer_size": largest}


def _import_deepspeed(device: str) -> Any:
    """DeepSpeed, ready to use the default process group."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            "DeepSpeed is not installed; pip install 'homer-context[deepspeed]', or use engine "
            "transformers-tp"
        ) from error
    from deepspeed.utils import logger

    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)
    # Its reduction through shared memory is compiled at first use, needs all ranks to be those of
    # one launcher, and crashes elsewhere.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
