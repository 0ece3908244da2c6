"""Draw activation spectra."""

from typing import Any

from torch import Tensor


def draw(
    decays: dict[str, list[Tensor]], ranks: dict[str, list[int]], share: float, bottleneck: int | None, title: str
) -> Any:
    """Draw singular values and effective ranks of activations, by layer.

    The upper part has a plot for each activation: its singular values, a line for each layer, with a dot at the
    effective rank. The lower part shows effective ranks over layers, with the full rank and the bottleneck as lines.

    Args:
        decays: For each activation, σ_i / σ_1 of each layer, each (min(N, W),).
        ranks: For each activation, the effective rank of each layer.
        share: α of the effective rank.
        bottleneck: Rank R of the projections; None if they have none, or several.
        title: Title of the figure.

    Returns:
        A matplotlib figure without a window.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(decays)
    layers = max(len(each) for each in decays.values())
    colours = matplotlib.colormaps["viridis"]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.5 * rows + 3.4), layout="constrained", dpi=80)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[2.5] * rows + [3.2])
    first = None
    for index, name in enumerate(names):
        axes = figure.add_subplot(grid[index // columns, index % columns], sharey=first)
        first = first or axes
        for layer, (values, rank) in enumerate(zip(decays[name], ranks[name], strict=True)):
            colour = colours(layer / max(1, layers - 1) * 0.9)
            name_of_ends = f"layer {layer}" if layer in (0, layers - 1) else None
            axes.plot(range(1, len(values) + 1), values.tolist(), color=colour, linewidth=1.2, label=name_of_ends)
            axes.plot(rank, float(values[rank - 1]), "o", color=colour, markersize=4)
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(1, len(decays[name][0]))
        axes.set_ylim(1e-3, 1.3)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel("σᵢ / σ₁")
        if index // columns == rows - 1:
            axes.set_xlabel("i (dot: effective rank)")
        if index == 0:
            axes.legend(fontsize=8, frameon=False)
    axes = figure.add_subplot(grid[rows, :])
    for name, of_layers in ranks.items():
        axes.plot(range(len(of_layers)), of_layers, marker="o", markersize=4, linewidth=1.2, label=name)
    widths = sorted({len(values) for each in decays.values() for values in each})
    for width in widths:
        if width != bottleneck:
            axes.axhline(width, color="black", linestyle="--", linewidth=1)
            axes.annotate(
                f"full rank {width}", (0.005, width), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
            )
    if bottleneck:
        axes.axhline(bottleneck, color="firebrick", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"bottleneck R = {bottleneck}", (0.005, bottleneck), xycoords=("axes fraction", "data"), va="bottom",
            fontsize=8, color="firebrick",
        )  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0.9, 1.6 * max([*widths, bottleneck or 0]))
    axes.set_xticks(range(layers))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"effective rank r({share:g})")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
