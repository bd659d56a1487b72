"""Measurements: answers on long texts beside other methods, speed, memory.

Each module measures one thing and returns plain values; `show` draws them. Nothing here is imported
by the rest of the package.
"""

from __future__ import annotations
