"""Hierarchical context merging (HOMER, arXiv 2404.10308) for models that were never trained for it.

Importing this package does not import torch: a plan can be made anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from homer.config import HomerConfig
from homer.errors import HomerError
from homer.plan import MergePlan

if TYPE_CHECKING:
    from homer.context import CompressedContext
    from homer.model import HomerModel

__version__ = "0.1.0"

__all__ = [
    "CompressedContext",
    "HomerConfig",
    "HomerError",
    "HomerModel",
    "MergePlan",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "HomerModel":
        from homer.model import HomerModel

        return HomerModel
    if name == "CompressedContext":
        from homer.context import CompressedContext

        return CompressedContext
    raise AttributeError(f"module 'homer' has no attribute {name!r}")
