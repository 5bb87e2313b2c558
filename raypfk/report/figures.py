"""The report's figures: arrays in, a matplotlib Figure out. Small, so that their letters can be read on a phone too.

Shapes: S seeds, B rounds, D classes, N images.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from raypfk.report import published
from raypfk.report.gather import Curves, Embedding

DPI = 150
WIDTH, HEIGHT = 4.6, 2.9
"""Inches; the height without a legend."""
GREY = "0.55"
FEW = 20
"""Classes whose names and numbers can be shown."""

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a class may be called "$x"
}


class Look(NamedTuple):
    color: str
    marker: str


_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#7F7F7F"),
)
_MARKERS = "os^DvPX*hd"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker for each cell: Okabe and Ito's colours, which the colour-blind can tell apart, without
    yellow, then two of Tol's and grey. After ten the colours come again with other markers.
    """
    return {
        name: Look(_COLORS[i % len(_COLORS)], _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)])
        for i, name in enumerate(names)
    }


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


# ------------------------------------------------------------------------------------------------------------ curves


@_styled
def curves(
    cells: list[Curves],
    solid: tuple[str, str],
    dashed: tuple[str, str] | None,
    title: str,
    look: dict[str, Look],
) -> Figure:
    """Columns of results over labels bought, in percent: means over seeds, and of the solid one a deviation's band.

    solid, dashed: (column, what the legend calls it). A hollow marker: not all of the cell's seeds are there yet.
    """
    figure, axes = _axes(cells, title)
    for cell in cells:
        _mean_line(axes, cell, solid[0], look[cell.name])
        if dashed:
            mean_B, _ = cell.summary(dashed[0])
            axes.plot(cell.bought_B, 100 * mean_B, color=look[cell.name].color, linewidth=1, linestyle=(0, (4, 2)))
    kinds = [Line2D([], [], color=GREY, label=solid[1])]
    if dashed:
        kinds.append(Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (4, 2)), label=dashed[1]))
    _legend(figure, [_handle(cell.name, look[cell.name]) for cell in cells], kinds)
    return figure


@_styled
def beside_published(cells: list[Curves], figure_there: published.Figure, look: dict[str, Look]) -> Figure:
    """Our last and best epochs, and the paper's curves: a cell's own in its colour, other methods' in grey."""
    figure, axes = _axes(cells, "test accuracy (%)", height=4.0)
    last = max(cell.bought_B[-1] for cell in cells)
    owners = {cell.published: cell for cell in cells if cell.published}
    ends = []
    for curve in figure_there.curves:
        inside = [(x, 100 * y) for x, y in zip(curve.labels, curve.accuracy, strict=True) if x <= last * 1.001]
        if not inside:
            continue
        owner = owners.get(curve.method)
        color = look[owner.name].color if owner else GREY
        axes.plot(*zip(*inside, strict=True), color=color, marker=".", linewidth=1, linestyle=":", zorder=1.5)
        ends.append((*inside[-1], curve.method, color if owner else "0.4"))
    for name, accuracy in figure_there.limits.items():
        axes.axhline(100 * accuracy, color=GREY, linewidth=0.8, zorder=1)
        ends.append((last, 100 * accuracy, name, "0.4"))
    for cell in cells:
        _mean_line(axes, cell, "test_accuracy", look[cell.name])
        mean_B, _ = cell.summary("best_epoch_accuracy")
        axes.plot(cell.bought_B, 100 * mean_B, color=look[cell.name].color, linewidth=1, linestyle=(0, (4, 2)))
    _name_ends(axes, ends)
    kinds = [
        Line2D([], [], color=GREY, label="ours, last epoch"),
        Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (4, 2)), label="ours, best on test"),
        Line2D([], [], color=GREY, linewidth=1, linestyle=":", marker=".", label="published (best on test)"),
    ]
    _legend(figure, [_handle(cell.name, look[cell.name]) for cell in cells], kinds)
    return figure


def _axes(cells: list[Curves], title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="labels bought", title=title)
    axes.grid(True)
    longest_B = max((cell.bought_B for cell in cells), key=len)
    step = -(-len(longest_B) // 6)
    axes.set_xticks(longest_B[(len(longest_B) - 1) % step :: step])  # of rounds, the last among them
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def _mean_line(axes: Axes, cell: Curves, column: str, look: Look) -> None:
    mean_B, deviation_B = (100 * y_B for y_B in cell.summary(column))
    whole_B = np.isfinite(cell.values[column]).all(0)
    axes.plot(cell.bought_B, mean_B, color=look.color)
    for subset_B, face in ((whole_B, look.color), (~whole_B, "white")):
        style = {"marker": look.marker, "markersize": 5, "markerfacecolor": face, "linestyle": "none"}
        axes.plot(cell.bought_B[subset_B], mean_B[subset_B], color=look.color, **style)
    low_B, high_B = (np.clip(mean_B + sign * deviation_B, 0, 100) for sign in (-1, 1))
    axes.fill_between(cell.bought_B, low_B, high_B, color=look.color, alpha=0.15, linewidth=0)


def _handle(name: str, look: Look) -> Line2D:
    return Line2D([], [], color=look.color, marker=look.marker, markersize=5, label=_short(name, 40))


def _legend(figure: Figure, cells: list[Line2D], kinds: list[Line2D]) -> None:
    """Below the axes, where it hides nothing: the cells, then what the kinds of lines are. The figure grows by it."""
    handles = [*cells, *kinds]
    columns = _columns([handle.get_label() for handle in handles])
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.2 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns)


def _columns(labels: list[str]) -> int:
    """How many columns of a legend fit: each as wide as its longest label."""
    for columns in (3, 2):
        longest = [max(map(len, part), default=0) for part in np.array_split(labels, columns)]
        if sum(0.6 + 0.072 * length for length in longest) <= WIDTH:
            return columns
    return 1


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names right of the axes at their curves' ends, (x, y, name, color), moved apart where they would overlap."""
    axes.figure.draw_without_rendering()  # the limits, and how high a letter is in them
    low, high = axes.get_ylim()
    gap = 12 / 72 / axes.get_window_extent().height * axes.figure.dpi * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    for (x, y, name, color), at in zip(ends, apart([end[1] for end in ends], gap), strict=True):
        place = {"xytext": (1.03, at), "textcoords": axes.get_yaxis_transform()}
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
        axes.annotate(name, (x, y), **place, color=color, fontsize=8.5, va="center", arrowprops=arrow)
    axes.set_ylim(low, high)


def apart(y: Sequence[float], gap: float) -> list[float]:
    """Ascending numbers, moved as little as it takes (by least squares) to lie at least `gap` apart.

    Numbers that touch are a block, which lies at the mean of what its members want.
    """
    blocks: list[tuple[float, int]] = []  # where the first of a block lies, and how many they are
    for wanted in y:
        start, count = wanted, 1
        while blocks and blocks[-1][0] + blocks[-1][1] * gap > start:
            before, members = blocks.pop()
            start = (members * before + count * (start - members * gap)) / (members + count)
            count += members
        blocks.append((start, count))
    return [start + i * gap for start, count in blocks for i in range(count)]


# ----------------------------------------------------------------------------------------------------------- classes


@_styled
def confusion(counts_DD: np.ndarray, names: list[str], title: str) -> Figure:
    """Rows: true classes, shaded by their shares; columns: what was predicted."""
    figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    shares_DD = counts_DD / np.maximum(counts_DD.sum(1, keepdims=True), 1)
    axes.imshow(shares_DD, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true class", title=title)
    axes.spines[:].set_visible(True)
    _name_classes(axes, names, "x")
    _name_classes(axes, names, "y")
    if len(names) <= FEW:
        for (i, j), count in np.ndenumerate(counts_DD):
            if count:
                color = "white" if shares_DD[i, j] > 0.5 else "black"
                size = 8 if len(names) <= 12 else 6
                axes.text(j, i, f"{count}", ha="center", va="center", fontsize=size, color=color)
    return figure


@_styled
def embedding(found: Embedding, names: list[str], title: str) -> Figure:
    """Dots are classified right; larger ones with a rim are misses (as in the paper's Figure 6). Colour: true class."""
    figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "turbo"]
    color_D = colors(np.arange(len(names)) if len(names) <= FEW else np.linspace(0, 1, len(names)))
    for missed, style in ((False, {"s": 6}), (True, {"s": 34, "edgecolors": "black", "linewidths": 0.6})):
        of = found.missed_N == missed
        axes.scatter(*found.points_N2[of].T, color=color_D[found.label_N[of]], **style)
    if len(names) <= FEW:
        for label in np.unique(found.label_N):
            x, y = np.median(found.points_N2[found.label_N == label], axis=0)
            box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": color_D[label], "alpha": 0.9}
            axes.text(x, y, _short(names[label]), ha="center", va="center", fontweight="bold", fontsize=9, bbox=box)
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(True)
    right, wrong = (~found.missed_N).sum(), found.missed_N.sum()
    dots = {"color": GREY, "marker": "o", "linestyle": "none"}
    handles = [
        Line2D([], [], markersize=3, label=f"right ({right:,})", **dots),
        Line2D([], [], markersize=6, markeredgecolor="black", label=f"misses ({wrong:,})", **dots),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_styled
def class_counts(counts: dict[str, np.ndarray], names: list[str], rare: list[int]) -> Figure:
    """Images of each class, a panel for each of `counts`; the classes that were made rare in another colour."""
    figure = Figure(figsize=(WIDTH, 0.5 + 1.5 * len(counts) + _room(names)), layout="constrained")
    panels = figure.subplots(len(counts), squeeze=False, sharex=True)[:, 0]
    colors = [_COLORS[1] if label in rare else _COLORS[0] for label in range(len(names))]
    for axes, (title, counts_D) in zip(panels, counts.items(), strict=True):
        bars = axes.bar(np.arange(len(names)), counts_D, color=colors, width=0.8 if len(names) <= FEW else 1)
        axes.set(title=f"{title}: {counts_D.sum():,}", ylabel="images")
        if len(names) <= 12:
            axes.bar_label(bars, fontsize=8 if counts_D.max() < 1000 else 6.5, padding=1)
            axes.margins(y=0.15)
    _name_classes(panels[-1], names, "x")
    panels[-1].set_xlabel("class (orange: made rare)" if rare else "class")
    return figure


@_styled
def bought(counts_BD: np.ndarray, names: list[str], title: str) -> Figure:
    """Labels bought of each class, round on round."""
    figure = Figure(figsize=(WIDTH, HEIGHT + _room(names)), layout="constrained")
    axes = figure.subplots()
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.05, 0.95, len(counts_BD)))
    below_D = np.zeros(len(names))
    for number, (counts_D, shade) in enumerate(zip(counts_BD, shades, strict=True), 1):
        width = 0.8 if len(names) <= FEW else 1
        axes.bar(np.arange(len(names)), counts_D, width, below_D, color=shade, label=f"{number}")
        below_D += counts_D
    axes.set(title=title, xlabel="class", ylabel="labels bought")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _name_classes(axes, names, "x")
    handles, labels = axes.get_legend_handles_labels()
    shown = slice(None, None, -(-len(handles) // 20))
    figure.legend(handles[shown], labels[shown], title="round", loc="outside right upper", reverse=True)
    return figure


def _name_classes(axes: Axes, names: list[str], which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if len(names) > FEW:
        axis.set_major_locator(MaxNLocator(5, integer=True))
        return
    slanted = which == "x" and _slanted(names)
    place = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axis.set_ticks(range(len(names)), [_short(name) for name in names], **place)


def _slanted(names: list[str]) -> bool:
    """Whether names do not fit side by side."""
    return len(names) <= FEW and max(map(len, names), default=0) > 2


def _room(names: list[str]) -> float:
    """Inches that slanted names take."""
    return 0.06 * max(len(_short(name)) for name in names) if _slanted(names) else 0.0


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
