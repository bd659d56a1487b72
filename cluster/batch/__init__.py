"""Many questions from a file, answered into a file: what `homer batch` does."""

from __future__ import annotations
