"""Plots as SVG inside a page: in the page's own colours and fonts, the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the colour of the page's text, which only the reader's browser knows
COLORS = ("#2f7fd1", "#d9731a", "#2f9e57", "#b04fc4")  # distinguishable on white, on black and in grey
SIZE = (4.6, 3.1)  # inches: about as wide as a phone, so that the text keeps its size there
MOST_CELLS = 300  # of a heat map, on each side
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif", "font.size": 9, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK,
    "grid.alpha": 0.15, "lines.linewidth": 1.5, "lines.markersize": 3, "legend.frameon": False,
}  # fmt: skip

Points = tuple[Sequence[float], Sequence[float]]


class Plots:
    """Draws the figures of one page. Each method returns an `<svg>` element; their ids do not clash."""

    def __init__(self) -> None:
        self._drawn = 0

    def lines(
        self, title: str, x_label: str, y_label: str, series: Mapping[str, Points],
        sparse: Sequence[str] = (), whole_x: bool = False,
    ) -> str:  # fmt: skip
        """A line for each series of x and y; those named `sparse` show their points. `whole_x`: x is a
        count."""

        def draw(axes: Axes) -> None:
            for color, (name, (x, y)) in zip(COLORS, series.items(), strict=False):
                marker = "o" if name in sparse or len(x) < 30 else None
                axes.plot(x, y, marker=marker, color=color, label=name)
            if whole_x:
                from matplotlib.ticker import MaxNLocator

                axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if len(series) > 1:  # above the curves, which fill the whole area
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=len(series))

        return self._figure(title, x_label, y_label, draw)

    def reliability(self, title: str, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Observed frequency against probability; the larger a point, the more decisions it stands for.
        `tables` are those of `ft.analysis.calibration.reliability`."""

        def draw(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
            for color, (name, table) in zip(COLORS, tables.items(), strict=False):
                x, y, count = (np.array([row[k] for row in table]) for k in ("probability", "share", "count"))
                axes.plot(x, y, color=color, linewidth=1, label=name)
                axes.scatter(x, y, s=6 + 70 * count / count.max(), color=color, alpha=0.75, linewidths=0)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
            axes.legend(loc="upper left")

        return self._figure(title, "probability", "share that happened", draw)

    def thresholds(self, title: str, curve: Mapping[str, np.ndarray], used: Sequence[float]) -> str:
        """Precision, recall and F1 against the threshold, with lines at those in use."""

        def draw(axes: Axes) -> None:
            for color, name in zip(COLORS, ("precision", "recall", "f1"), strict=False):
                axes.plot(curve["threshold"], curve[name], color=color, label=name)
            for number, threshold in enumerate(sorted(set(used))):
                axes.axvline(
                    threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)),
                    alpha=1 if len(set(used)) == 1 else 0.4, label=None if number else "in use",
                )  # fmt: skip
            axes.set(xlim=(0, 1), ylim=(-0.03, 1.03))
            axes.legend(loc="best")

        return self._figure(title, "threshold", "share", draw)

    def confusion(self, title: str, matrix: np.ndarray) -> str:
        """A heat map of a confusion matrix (true classes, predicted classes), each row as shares of the true
        class; with more than `MOST_CELLS` classes, neighbours are merged."""
        counts = np.asarray(matrix, dtype=np.float64)
        classes = len(counts)
        step = -(-classes // MOST_CELLS)
        for axis in (0, 1):
            counts = np.add.reduceat(counts, np.arange(0, classes, step), axis=axis)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

        def draw(axes: Axes) -> None:
            axes.grid(False)
            axes.spines[:].set_visible(True)
            axes.imshow(_shaded(shares), interpolation="none", extent=(0, classes, classes, 0))

        return self._figure(title, "predicted class", "true class", draw, (4.6, 4.4))

    def agreement(self, title: str, truth: np.ndarray, predicted: np.ndarray) -> str:
        """A heat map of the rows by target (rows,) and prediction (rows,), with its diagonal."""
        low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        counts, _, _ = np.histogram2d(truth, predicted, bins=40, range=((low, high), (low, high)))
        shares = np.sqrt(counts.T / max(counts.max(), 1))  # so that a single row is visible beside many

        def draw(axes: Axes) -> None:
            image = _shaded(shares)
            axes.imshow(
                image, interpolation="none", origin="lower", extent=(low, high, low, high), aspect="auto"
            )
            axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=(0, (4, 3)))

        return self._figure(title, "target", "prediction", draw, (4.6, 4.0))

    def _figure(
        self, title: str, x_label: str, y_label: str, draw: Any, size: tuple[float, float] = SIZE
    ) -> str:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._drawn += 1
        with rc_context({**STYLE, "svg.hashsalt": "ft"}):
            figure = Figure(figsize=size)
            FigureCanvasSVG(figure)
            # Fixed margins: fitting them to the labels takes longer than the rest.
            axes = figure.add_axes((0.19, 0.5 / size[1], 0.78, 1 - 0.75 / size[1]))
            axes.set(xlabel=x_label, ylabel=y_label)
            draw(axes)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _inline(buffer.getvalue(), title, f"f{self._drawn}-")


def _shaded(shares: np.ndarray) -> np.ndarray:
    """Shares from 0 to 1 as (.., 4) colours: from transparent to opaque, on any background."""
    color = [int(COLORS[0][place : place + 2], 16) / 255 for place in (1, 3, 5)]
    image = np.empty((*shares.shape, 4))
    image[..., :3] = color
    image[..., 3] = shares
    return image


def _inline(svg: str, title: str, prefix: str) -> str:
    """matplotlib's file as an element of an HTML page: without what belongs to a file, with ids that begin
    with `prefix`, scaled by the page, labelled for screen readers."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = svg.replace(INK, "currentColor")
    return re.sub(r"^<svg", f'<svg role="img" aria-label="{escape(title)}"', svg)
