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
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from homer.engines import Engine, check_engine
from homer.errors import ConfigError, ModelError
from homer.families import family_of
from homer.loading import load_model

DEEPSPEED_FAMILIES = frozenset(
    (
        "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt_neox",
        "granite", "granitemoe", "llama", "mistral", "mixtral", "phi", "qwen2", "qwen2_moe",
        "qwen3", "qwen3_moe", "smollm3",
    )
)  # fmt: skip
"""Families, by `model_type`, that DeepSpeed splits right. StableLM it splits wrong, in silence."""


def load_on_ranks(
    path_or_id: str | Path,
    engine: Engine,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "cpu",
) -> Any:
    """Load this rank's part of a model. Every rank of the default process group calls it.

    Parameters
    ----------
    path_or_id : str or Path
    engine : Engine
        `deepspeed-tp` and `transformers-tp` give each rank some of the heads and a part of the
        weights; `deepspeed-zero3` leaves the weights in parts, where `offload` says, and puts a
        layer together while it runs: every rank then does all of the work.
    device : str
        "cpu"; or the GPU of rank 0, like "cuda:0", and the others have those after it. "auto" is
        "cuda:0" where there is a GPU, else the CPU.
    dtype : str
        As for `homer.loading.load_model`.
    offload : str
        For ZeRO-3: "none" keeps the parts on the device, "cpu" in main memory, and anything else
        names a folder on a fast disk.

    Raises
    ------
    ModelError
        When the model cannot be loaded, or split so.
    ConfigError
        When there is no such engine, it is not installed, or there is no process group.
    """
    if engine == "torch":
        return load_model(path_or_id, device=device, dtype=dtype)
    if not distributed.is_initialized():
        raise ConfigError(
            f"engine {engine} needs a torch.distributed process group; call init_process_group "
            f"first, on every rank"
        )
    check_engine(engine, distributed.get_world_size())
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    number = distributed.get_rank()
    if device != "cpu":
        number += torch.device(device).index or 0
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    # Both libraries take the group that is there, and want to know the same from here too.
    os.environ["RANK"] = str(distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(distributed.get_world_size())
    os.environ["LOCAL_RANK"] = str(number)
    # DeepSpeed prints what it does; a program's output is its own.
    with redirect_stdout(sys.stderr):
        if engine == "deepspeed-zero3":
            return _load_in_parts(path_or_id, device, dtype, offload)
        return _load_split(path_or_id, engine, device, dtype)


def _load_split(path_or_id: str | Path, engine: Engine, device: str, dtype: str) -> Any:
    """Load by tensor parallelism."""
    _check_split(path_or_id, engine)
    if engine == "transformers-tp":
        from transformers.distributed.configuration_utils import DistributedConfig

        split = DistributedConfig(tp_size=distributed.get_world_size(), tp_plan="auto")
        return load_model(path_or_id, device=device, dtype=dtype, distributed_config=split)
    deepspeed = _import_deepspeed(device)
    model = load_model(path_or_id, device="cpu", dtype=dtype)
    return deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": distributed.get_world_size()},
        dtype=model.dtype,
        replace_with_kernel_inject=False,
    ).module


def _check_split(path_or_id: str | Path, engine: Engine) -> None:
    """Refuse what would be split wrong."""
    config = AutoConfig.from_pretrained(path_or_id).get_text_config(decoder=True)
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


def _load_in_parts(path_or_id: str | Path, device: str, dtype: str, offload: str) -> Any:
    """Load with ZeRO-3: no process ever holds the whole model."""
    deepspeed = _import_deepspeed(device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    if dtype == "auto":
        config = AutoConfig.from_pretrained(path_or_id)
        chosen = getattr(config, "dtype", None) or torch.float32
    else:
        chosen = getattr(torch, dtype)
    parameters: dict[str, Any] = {"device": offload}
    if offload not in ("none", "cpu"):
        parameters = _on_disk(Path(offload), path_or_id)
    if offload != "none":
        parameters["pin_memory"] = device != "cpu"
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
    # from_pretrained looks for it, and loads in parts.
    in_parts = HfDeepSpeedConfig(settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=chosen)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the model {str(path_or_id)!r}: {error}") from error
    engine = deepspeed.initialize(model=model, config=settings)[0]
    del in_parts
    return engine.module.eval()


def _on_disk(folder: Path, path_or_id: str | Path) -> dict[str, Any]:
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
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path_or_id))
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
