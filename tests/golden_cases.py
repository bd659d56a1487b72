"""The reference numbers in `tests/golden/`, made by the authors' code; see the README there.

Reads files only: importing this module imports neither torch nor the code under test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from homer import HomerConfig, MergePlan

if TYPE_CHECKING:
    import torch

GOLDEN = Path(__file__).parent / "golden"

DEVIATING = ("a_lpc0", "a_warmup_all")
"""Cases in which the authors' code ignores the target in silence; we do better on purpose."""


@dataclass(frozen=True)
class GoldenCase:
    """One recorded run: its arguments, its tree, what went in and what came out."""

    name: str
    case: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> GoldenCase:
        return cls(name, json.loads((GOLDEN / name / "case.json").read_text()))

    @property
    def model_dir(self) -> Path:
        return model_dir(self.case["model"])

    @property
    def config(self) -> HomerConfig:
        return paper_config(self.case)

    @cached_property
    def num_layers(self) -> int:
        return read_num_layers(self.case["model"])

    @cached_property
    def plan(self) -> MergePlan:
        case = self.case
        return MergePlan.build(
            case["prefix_len"],
            case["context_len"],
            case["suffix_len"],
            self.num_layers,
            self.config,
        )

    @property
    def model_options(self) -> dict[str, Any]:
        """What `from_pretrained` needs beside the path: YaRN, where the case has it."""
        yarn = self.case["yarn"]
        if yarn is None:
            return {}
        theta = json.loads((self.model_dir / "config.json").read_text())["rope_theta"]
        return {
            "max_position_embeddings": yarn["max_position_embeddings"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": float(yarn["scale"]),
                "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            },
        }

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return _tensors(GOLDEN / self.name / "inputs.safetensors")

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids of prefix, context and suffix, each of shape (1, n)."""
        return self.inputs["prefix_ids"], self.inputs["context_ids"], self.inputs["suffix_ids"]

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        return _tensors(GOLDEN / self.name / "expected.safetensors")

    @cached_property
    def bias(self) -> torch.Tensor:
        """Calibration bias of the model, shape (layers, 4096)."""
        return _tensors(self.model_dir / "bias.safetensors")["bias"]

    @cached_property
    def projection(self) -> torch.Tensor:
        """Shape (kv_heads * head_dim, 4); K and V of every case are recorded under it."""
        return _tensors(self.model_dir / "proj.safetensors")["proj"]


def model_dir(name: str) -> Path:
    """Folder of golden model A, B, G or M."""
    return GOLDEN / "models" / name


def read_num_layers(model: str) -> int:
    return int(json.loads((model_dir(model) / "config.json").read_text())["num_hidden_layers"])


def paper_config(case: dict[str, Any]) -> HomerConfig:
    """The authors' arguments as our settings, in paper mode."""
    initial = case["max_initial_chunk_len"]
    return HomerConfig.paper(
        max_chunk_len=case["max_chunk_len"],
        target_len=case["target_len"],
        warmup_layers=case["layers_warmup"],
        max_initial_chunk_len=None if initial == -1 else initial,
    )


def case_names() -> list[str]:
    """Names of all cases, the deviating ones included."""
    return [entry["name"] for entry in json.loads((GOLDEN / "index.json").read_text())]


def faithful_names() -> list[str]:
    """Names of the cases that paper mode reproduces exactly: all but the deviating ones."""
    return [name for name in case_names() if name not in DEVIATING]


def crash_cases() -> dict[str, dict[str, Any]]:
    """Inputs on which the authors' code raises or misbehaves, with controls, by name."""
    crashes = json.loads((GOLDEN / "crashes.json").read_text())
    return {crash["name"]: crash for crash in crashes}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
