"""The picture of activation spectra."""

from typing import Any

from torch import Tensor


def draw(
    decays: dict[str, list[Tensor]], ranks: dict[str, list[int]], share: float, bottleneck: int | None, title: str
) -> Any:
    """Above, how the singular values of each activation fall off, a line a layer, with what each layer's effective rank
    is; below, the effective ranks over the layers, with the full rank and the bottleneck's as lines.

    Args:
        decays: Of each activation, σ_i / σ_1 layer by layer.
        ranks: Of each activation, the effective rank layer by layer.
        share: α of the effective rank.
        bottleneck: Rank R of the projections, if they have one.
        title: Above it all.

    Returns:
        A matplotlib figure that belongs to no window.
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
            place = [(i + 1) / len(values) for i in range(len(values))]
            axes.plot(place, values.tolist(), color=colour, linewidth=1.2, label=f"layer {layer}")
            axes.plot(place[rank - 1], float(values[rank - 1]), "o", color=colour, markersize=4)
        axes.set_yscale("log")
        axes.set_xlim(0, 1)
        axes.set_ylim(1e-3, 1.3)
        axes.set_title(f"{name} ({len(decays[name][0])} values)", fontsize=9)
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel("σᵢ / σ₁")
        if index // columns == rows - 1:
            axes.set_xlabel("i / number of values; dot: effective rank")
    axes = figure.add_subplot(grid[rows, :])
    for name, values in ranks.items():
        axes.plot(range(len(values)), values, marker="o", markersize=4, linewidth=1.2, label=name)
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
    axes.set_ylim(0, 1.12 * max([*widths, bottleneck or 0]))
    axes.set_xticks(range(layers))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"effective rank r({share:g})")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
