"""The figures of an evaluation: curves, points and histograms, each from plain values to a PNG."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dualxda_jax.report.canvas import INK, MUTED, RULE
from dualxda_jax.report.extra import need
from dualxda_jax.report.figures import Figure

_DPI, _DENSITY = 96, 2
_OURS = ("#b3202c", "#e2711d", "#8a1c5c")
_OTHERS = ("#1f5fa8", "#2a9d8f", "#6a4c93", "#5b7f2b", "#0f8fb8", "#a17c00", "#7a7a82", "#355070", "#3d3d43", "#9c6644")

_AGREEMENT = (
    ("class", "class detection"),
    ("kendall_tau", "Kendall’s τ of logits"),
    ("matthews", "Matthews correlation"),
    ("logit_correlation", "correlation of logits"),
    ("weight_cosine", "cosine of weights"),
)


def styles(methods: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each row, the same in every figure; DualDA's in warm colours and solid."""
    ours = other = 0
    found = {}
    for row in sorted(methods, key=lambda row: row["name"]):
        if row["control"]:
            found[row["name"]] = {"color": "#a0a0a8", "marker": "x", "linestyle": ":"}
        elif row["method"] == "dualda":
            found[row["name"]] = {"color": _OURS[ours % 3], "marker": "o", "linestyle": "-"}
            ours += 1
        else:
            marker, line = "sD^vP*Xhp<>"[other % 11], ("--", "-.")[other % 2]
            found[row["name"]] = {"color": _OTHERS[other % 10], "marker": marker, "linestyle": line}
            other += 1
    return found


def runtime_figure(results: dict[str, Any]) -> Figure | None:
    """Average rank against seconds to explain all queries, on a logarithmic axis; None without two such points."""
    rows = [r for r in results["methods"] if r["average_rank"] is not None and r["cost"]]
    if len(rows) < 2:
        return None
    look = styles(results["methods"])
    with _figure(760, 430) as (figure, png):
        axes = _axes(figure, (0.085, 0.135, 0.885, 0.83))
        points = []
        for row in rows:
            seconds, style = row["cost"]["explain_seconds"], look[row["name"]]
            axes.plot(
                seconds,
                row["average_rank"],
                marker=style["marker"],
                color=style["color"],
                markersize=9,
                linestyle="none",
            )
            points.append((seconds, row["average_rank"], row["name"], style["color"]))
        axes.set_xscale("log")
        low, high = min(p[0] for p in points), max(p[0] for p in points)
        axes.set_xlim(low / 2.5, high * 6)
        best, worst = min(p[1] for p in points), max(p[1] for p in points)
        room = max(0.4, 0.08 * (worst - best))
        axes.set_ylim(worst + room, best - room)  # the best at the top
        _label_points(axes, points)
        axes.set_xlabel(
            f"seconds to explain {rows[0]['cost']['queries']:,} queries (logarithmic)", fontsize=10, color=INK
        )
        axes.set_ylabel("average rank (1 is best)", fontsize=10, color=INK)
        return Figure(png(), 760, 430)


def curves_figure(results: dict[str, Any]) -> Figure | None:
    """Share of the mislabelled samples found against the share inspected."""
    if not results["curves"]:
        return None
    look, height = styles(results["methods"]), _high_enough(430, len(results["curves"]))
    with _figure(760, height) as (figure, png):
        axes = _axes(figure, (0.085, 0.135, 0.60, 0.83))
        for name, curve in results["curves"].items():
            style = look[name]
            axes.plot(
                np.linspace(0, 1, len(curve)),
                curve,
                color=style["color"],
                linestyle=style["linestyle"],
                linewidth=1.7,
                label=name,
            )
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, zorder=0)
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        axes.set_xlabel("training samples inspected", fontsize=10, color=INK)
        axes.set_ylabel("mislabelled samples found", fontsize=10, color=INK)
        _percent(axes)
        _legend(figure, axes)
        return Figure(png(), 760, height)


def selection_figure(results: dict[str, Any]) -> Figure | None:
    """Cross-entropy of retrained networks against the share of samples kept and removed."""
    kinds = [name for name in ("coreset", "pruning") if results["selection"].get(name)]
    if not kinds:
        return None
    look, width = styles(results["methods"]), 980 if len(kinds) == 2 else 700
    height = _high_enough(400, max(len(results["selection"][kind]) for kind in kinds))
    with _figure(width, height) as (figure, png):
        span = 0.325 if len(kinds) == 2 else 0.65
        for i, kind in enumerate(kinds):
            axes = _axes(figure, (0.055 + i * 0.385 if len(kinds) == 2 else 0.09, 0.14, span, 0.76))
            for name, curve in results["selection"][kind].items():
                style = look[name]
                axes.plot(curve["fractions"], curve["values"], color=style["color"], linestyle=style["linestyle"],
                          marker=style["marker"], markersize=4.5, linewidth=1.5, label=name)  # fmt: skip
            axes.set_xlabel("share of samples " + ("kept" if kind == "coreset" else "removed"), fontsize=10, color=INK)
            better = "higher" if results["metrics"][kind]["higher"] else "lower"
            title = f"{results['metrics'][kind]['title']} ({better} is better)"
            axes.set_title(title, fontsize=10, loc="left", color=INK)
            axes.xaxis.set_major_formatter(_share)
            # What differs by little where it is small, and by much where it is large.
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain)
            axes.yaxis.set_minor_formatter(_plain)
            axes.tick_params(axis="y", which="both", labelsize=8, colors=MUTED)
            if i == 0:
                axes.set_ylabel("cross-entropy (logarithmic)", fontsize=10, color=INK)
        _legend(figure, axes)
        return Figure(png(), width, height)


def lds_figure(results: dict[str, Any], *, columns: int = 4) -> Figure | None:
    """A histogram of the queries' LDS for each method, all on one scale."""
    rows = [row["name"] for row in results["methods"] if results["lds"].get(row["name"])]
    if not rows:
        return None
    look, deep = styles(results["methods"]), -(-len(rows) // columns)
    height = 12 + 146 * deep
    values = {name: np.array([v for v in results["lds"][name] if v is not None], float) for name in rows}
    edges = np.linspace(-1, 1, 41)
    counts = {name: np.histogram(v, edges)[0] / max(1, len(v)) for name, v in values.items()}
    most = max(float(c.max()) for c in counts.values()) * 1.12 or 1.0
    with _figure(980, height) as (figure, png):
        for i, name in enumerate(rows):
            column, line = i % columns, i // columns
            left, bottom = 0.025 + column * 0.245, 1 - (146 * (line + 1) - 18) / height
            axes = _axes(figure, (left, bottom, 0.215, 98 / height))
            axes.bar(edges[:-1], counts[name], width=np.diff(edges), align="edge", color=look[name]["color"], alpha=0.8)
            axes.axvline(0, color=MUTED, linewidth=0.8)
            mean = values[name].mean() if len(values[name]) else np.nan
            axes.set(xlim=(-1, 1), ylim=(0, most), yticks=[], xticks=[-1, 0, 1])
            axes.set_title(f"{name}   mean {mean:.3f}".replace("-0.", "−0."), fontsize=9, loc="left", color=INK)
        return Figure(png(), 980, height)


def sparsity_figure(results: dict[str, Any]) -> Figure | None:
    """DualDA over a path of costs: sparsity on the left, faithfulness and class detection on the right."""
    path = results["sparsity"]
    if not path:
        return None
    with _figure(980, 380) as (figure, png):
        left, right = _axes(figure, (0.06, 0.15, 0.345, 0.75)), _axes(figure, (0.465, 0.15, 0.325, 0.75))
        for name, words, colour, line in (
            ("support", "support vectors", _OURS[0], "-"),
            ("nonzero", "non-zero coefficients", _OTHERS[0], "--"),
        ):
            left.plot(path["cost"], path[name], color=colour, linestyle=line, marker="o", markersize=4.5, label=words)
        left.set_title("Sparsity", fontsize=10, loc="left", color=INK)
        left.legend(frameon=False, fontsize=9)
        left.set_ylim(0, 1.03)
        left.yaxis.set_major_formatter(_share)
        for i, (name, words) in enumerate(_AGREEMENT):
            colour = (_OURS[0], *_OTHERS)[i]
            values, low, high = (_known(path.get(name + end)) for end in ("", "_low", "_high"))
            if low is not None and high is not None:
                right.fill_between(path["cost"], low, high, color=colour, alpha=0.12, linewidth=0)
            right.plot(
                path["cost"],
                values,
                color=colour,
                linestyle=("-", "--", "-.", ":", "--")[i],
                marker="osD^v"[i],
                markersize=4.5,
                label=words,
            )
        right.set_title("Agreement with the network", fontsize=10, loc="left", color=INK)
        _legend(figure, right)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("C (logarithmic)", fontsize=10, color=INK)
        return Figure(png(), 980, 380)


def _known(values: Sequence[float | None] | None) -> list[float] | None:
    """Numbers to draw, nan where there is none."""
    return None if values is None else [np.nan if v is None else v for v in values]


def _label_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the points, moved about where they would cover a marker or each other; a line leads to far ones."""
    axes.figure.canvas.draw()
    to_pixels = axes.transData.transform
    places = [to_pixels((x, y)) / _DENSITY for x, y, _, _ in points]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    frame = axes.get_window_extent()
    left, right, bottom, top = (v / _DENSITY for v in (frame.x0, frame.x1, frame.y0, frame.y1))
    for (x, y, name, colour), (px, py) in sorted(zip(points, places, strict=True), key=lambda p: (p[0][1], p[0][0])):
        width = 6.6 * len(name) + 2

        def box(shift: Any, px: float = px, py: float = py, width: float = width) -> Any:
            start = px + shift[0] if shift[0] > 0 else px + shift[0] - width
            return start, py + shift[1] - 6.5, start + width, py + shift[1] + 6.5

        def badness(shift: Any, box: Any = box) -> float:
            here = box(shift)
            covered = sum(
                max(0.0, min(here[2], t[2]) - max(here[0], t[0])) * max(0.0, min(here[3], t[3]) - max(here[1], t[1]))
                for t in taken
            )
            outside = here[0] < left or here[2] > right or here[1] < bottom or here[3] > top
            return covered + 1e4 * outside

        shift = min(_SHIFTS, key=badness)  # the first of equals
        taken.append(box(shift))
        axes.annotate(
            name,
            (x, y),
            xytext=(shift[0] * 0.75, shift[1] * 0.75),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            ha="left" if shift[0] > 0 else "right",
            va="center",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 5} if shift[2] else None,
        )


_SHIFTS = [
    (side * across, up, far)
    for across, ups, far in ((11, (0, 8, -8), False), (24, (0, 16, -16, 28, -28, 42, -42, 58, -58, 76, -76), True))
    for up in ups
    for side in (1, -1)
]
"""Where a name may stand from its point, in CSS pixels, the best first; and whether a line leads to it."""


def _share(value: float, _: Any = None) -> str:
    return f"{100 * value:.0f}%"


def _plain(value: float, _: Any = None) -> str:
    """A tick of a logarithmic axis; only those with the leading digit 1, 2 or 5, so that they stand apart."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _percent(axes: Any) -> None:
    axes.xaxis.set_major_formatter(_share)
    axes.yaxis.set_major_formatter(_share)


def _high_enough(height: int, names: int) -> int:
    """Pixels that a figure needs for a legend of so many names; no less than `height`."""
    return max(height, round((19 * names + 12) / 0.9))


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    box = axes.get_position()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(box.x1 + 0.008, box.y1 + 0.015),
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )


def _axes(figure: Any, place: tuple[float, float, float, float]) -> Any:
    axes = figure.add_axes(place)
    axes.grid(True, color="#ececf0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.minorticks_off()
    return axes


@contextmanager
def _figure(width: int, height: int) -> Iterator[tuple[Any, Any]]:
    """A figure of this size in CSS pixels, whatever style a user has set, and what turns it into a PNG."""
    need("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Drawing(figsize=(width / _DPI, height / _DPI), dpi=_DPI * _DENSITY, facecolor="white")
        canvas = FigureCanvasAgg(figure)

        def png() -> bytes:
            out = io.BytesIO()
            canvas.print_png(out, metadata={"Software": None})
            return out.getvalue()

        yield figure, png
