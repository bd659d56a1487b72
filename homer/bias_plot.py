"""A calibration bias as a picture. Draws with matplotlib; measures nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from homer.checkpoint import check_can_write
from homer.errors import ConfigError


def check_can_plot(path: Path) -> None:
    """Refuse a picture that could not be written to `path`.

    Raises
    ------
    ConfigError
        Without matplotlib, for a format that it does not know, or a folder that is not there.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"cannot draw {path}: end its name in one of {', '.join(known)}")
    check_can_write(path)


def plot_bias(path: Path, bias: torch.Tensor, title: str) -> None:
    """Write `bias` of shape (num_layers, distances), a line per layer over the distance.

    The ending of `path` chooses the format.

    Raises
    ------
    ConfigError
        As `check_can_plot` does.
    """
    check_can_plot(path)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    layers = bias.shape[0]
    palette = colormaps["viridis"].resampled(layers)
    norm = BoundaryNorm([layer - 0.5 for layer in range(layers + 1)], layers)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # Distance 0 is the last token itself, which has no place on a logarithmic axis.
    distances = range(1, bias.shape[1])
    for layer, values in enumerate(bias[:, 1:].tolist()):
        axes.plot(distances, values, color=palette(layer), linewidth=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distance to the last token, in tokens")
    axes.set_ylabel("mean significance (largest logit of all heads)")
    axes.set_title(title)
    step = -(-layers // 16)
    figure.colorbar(
        ScalarMappable(norm, palette), ax=axes, label="layer", ticks=range(0, layers, step)
    )
    figure.savefig(path, dpi=150)
