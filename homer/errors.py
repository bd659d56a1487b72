"""The errors that Homer raises for a mistake of its user or a fault of its surroundings.

Each message says what is wrong and what to change. This module knows nothing about transports:
doors map these types to gRPC codes and HTTP statuses.
"""

from __future__ import annotations


class HomerError(Exception):
    """Base of all errors that Homer raises on purpose."""


class ConfigError(HomerError, ValueError):
    """A setting is out of its range, or settings contradict each other."""


class PlanError(HomerError, ValueError):
    """No merge plan exists for these lengths with these settings."""


class PromptError(HomerError, ValueError):
    """The prompt itself cannot be used: wrong shapes, token ids outside the vocabulary."""


class BiasError(HomerError, ValueError):
    """A calibration bias does not fit the model or the plan, or its file is damaged."""


class ModelError(HomerError):
    """The model cannot be loaded, or Homer does not know how to drive it."""


class CheckpointError(ModelError):
    """A model's files are missing, damaged, or another model's: trying again needs other files."""


class StateError(HomerError, RuntimeError):
    """States or KV rows that should be there are missing or do not fit together."""


class Cancelled(HomerError):  # noqa: N818  (not a fault)
    """The caller asked to stop."""
