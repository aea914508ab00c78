"""The page of an evaluation: tables of methods against metrics, and what they cost, from the values of results.json."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualxda_jax._check import fail
from dualxda_jax.report import charts
from dualxda_jax.report.figures import Figure
from dualxda_jax.report.page import embedded, need_libraries

_MINUS = "\N{MINUS SIGN}"
_SETTINGS = {
    "clean": ("the data as they are", ("class",)),
    "grouped": ("classes merged in pairs", ("subclass",)),
    "marked": ("data with a mark in a share of one class", ("shortcut",)),
    "noisy": ("data with 30% of the labels flipped", ("mislabel",)),
    "part": ("a part, to be retrained on", ("lds", "coreset", "pruning")),
}
_PARTS = (
    "metrics", "methods", "curves", "lds", "selection", "sparsity", "dataset", "options", "sizes", "accuracy",
    "seconds", "reused", "stages", "environment", "definitions",
)  # fmt: skip
_RUNTIME = "runtime.png"
_FIGURES = (
    ("selection.png", charts.selection_figure, "Coreset selection and data pruning",
     "Mean cross-entropy, against the original network's predictions, of networks retrained on the samples that a "
     "method calls most important, and without them. All networks of a seed start from the same parameters."),
    ("mislabelling.png", charts.curves_figure, "Mislabelled samples found",
     "Training samples inspected by falling self-influence. The grey diagonal is chance; equal values are inspected "
     "in every order at once."),
    ("lds.png", charts.lds_figure, "LDS of each query",
     "How the queries' rank correlations spread; the line marks 0. All histograms share their axes. The networks of a "
     "seed start from the same parameters, so that they differ by their halves alone."),
    ("sparsity.png", charts.sparsity_figure, "DualDA: which C",
     "Left: how many training samples, and coefficients, have any say. Right: how closely the surrogate follows the "
     "network, and how often the top samples carry the predicted class, each over the same queries; shaded: 95% "
     "bootstrap intervals over the queries (of the weights: over the classes)."),
)  # fmt: skip


def write_evaluation(folder: str | os.PathLike[str], results: dict[str, Any]) -> Path:
    """Write `evaluation.html`'s page as index.html, and its figures beside it.

    Args:
        folder: made if it is not there.
        results: what `pipeline.evaluate` gathers, as plain values.

    Returns:
        Path of `index.html`.

    Raises:
        ImportError: Matplotlib or Jinja2 is missing; the message names the extra.
        ValueError: something else than results.
        OSError: the folder cannot be written.
    """
    need_libraries()
    if not isinstance(results, dict):
        fail("results", f"a {type(results).__name__}", "a dict, as in results.json")
    missing = [name for name in _PARTS if name not in results]
    if missing:
        fail("results", f"no {missing[0]!r}", f"with {', '.join(_PARTS)}, as in results.json")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Figure | None] = {_RUNTIME: charts.runtime_figure(results)}
    drawn |= {name: draw(results) for name, draw, _, _ in _FIGURES}
    for name, figure in drawn.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(figure.png)
    page, partial = folder / "index.html", folder / "index.html.partial"
    partial.write_text(_html(results, drawn), encoding="utf-8")
    partial.replace(page)
    return page


def remove_evaluation(folder: str | os.PathLike[str]) -> None:
    """Remove what `write_evaluation` has written to a folder, if it has."""
    for name in ("index.html", _RUNTIME, *(name for name, *_ in _FIGURES)):
        (Path(folder) / name).unlink(missing_ok=True)


def _html(results: dict[str, Any], drawn: dict[str, Figure | None]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("evaluation.html.j2").read_text(encoding="utf-8"))
    figures = [
        {**(embedded(drawn[name]) or {}), "title": title, "caption": caption, "alt": title + ", for each method."}
        for name, _, title, caption in _FIGURES
        if drawn[name] is not None
    ]
    options, costs = results["options"], _costs(results)
    seeds = f"{options['seeds']} seed" + ("s" if options["seeds"] > 1 else "")
    timed = next((s for name, s in results["sizes"].items() if name != "noisy"), {"queries": 0, "training": 0})
    return template.render(
        title=f"Attribution methods on {results['dataset']}",
        metrics=list(results["metrics"].values()),
        rows=_rows(results),
        costs=costs,
        cold=any("*" in c["prepare"] for c in costs),
        queries=f"{timed['queries']:,}",
        samples=f"{timed['training']:,}",
        runtime=embedded(drawn[_RUNTIME]),
        figures=figures,
        seeds=seeds,
        sizes=_sizes(results),
        measured=_measured(results),
        notes=_notes(results),
        options=[(r["name"], _words(r)) for r in results["methods"]],
        definitions=results["definitions"],
        environment=results["environment"],
    )


def number(value: float | None, digits: int = 3) -> str:
    """A value for a cell: fixed decimals, a true minus sign, a dash for none."""
    return "—" if value is None else f"{value:.{digits}f}".replace("-", _MINUS)


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    methods, metrics = results["methods"], results["metrics"]
    best = {name: _best(methods, name, metrics[name]["higher"]) for name in metrics}
    averages = [row["average_rank"] for row in methods if row["average_rank"] is not None]
    rows = []
    for row in methods:
        cells = []
        for name in metrics:
            found = row["values"].get(name)
            if found is None or found["mean"] is None:
                words = "—" if found is None else "failed" if name in row["failed"] else "undefined"
                cells.append({"mean": words, "interval": "", "rank": _place(row["ranks"].get(name)), "first": False})
                continue
            spread = "" if found["spread"] is None else f"±{number(found['spread'])}"
            first = not row["control"] and found["mean"] == best[name]
            cells.append(
                {
                    "mean": number(found["mean"]),
                    "interval": f"{number(found['low'])} … {number(found['high'])}",
                    "rank": " ".join(filter(None, (spread, _place(row["ranks"].get(name))))),
                    "first": first,
                }
            )
        average = row["average_rank"]
        rows.append(
            {"name": row["name"], "control": row["control"], "cells": cells, "average": number(average, 2),
             "first": average is not None and average == min(averages)}
        )  # fmt: skip
    return rows


def _best(methods: Sequence[dict[str, Any]], name: str, higher: bool) -> float | None:
    means = [r["values"][name]["mean"] for r in methods if not r["control"] and name in r["values"]]
    known = [m for m in means if m is not None]
    return (max if higher else min)(known) if known else None


def _place(rank: float | None) -> str:
    return "" if rank is None else f"#{rank:g}"


def _costs(results: dict[str, Any]) -> list[dict[str, str]]:
    rows = [r for r in results["methods"] if r["cost"]]
    ours = [r for r in rows if r["method"] == "dualda"]
    base = min(ours or rows, key=lambda r: r["cost"]["explain_seconds"], default=None)
    if base is None:
        return []
    found = []
    for row in sorted(rows, key=lambda r: r["cost"]["explain_seconds"]):
        cost = row["cost"]
        factor = cost["explain_seconds"] / base["cost"]["explain_seconds"]
        found.append(
            {
                "name": row["name"],
                "prepare": seconds(cost["prepare_seconds"]) + ("" if cost["without_compilation"] else " *"),
                "explain": seconds(cost["explain_seconds"]),
                "factor": f"{factor:,.2g}" if factor < 100 else f"{factor:,.0f}",
                "against": base["name"],
                "kept": megabytes(cost["kept_bytes"]),
            }
        )
    return found


def seconds(value: float) -> str:
    """Seconds with two significant digits or whole ones; less than a millisecond is just that."""
    if value < 1e-3:
        return "< 0.001"
    return f"{value:,.0f}" if value >= 10 else f"{value:#.2g}" if value >= 0.01 else f"{value:.3f}"


def megabytes(count: float) -> str:
    """Millions of bytes with one decimal; what would be 0.0 with one significant digit."""
    if 0 < count < 5e4:
        return f"{count / 1e6:.1g}" if count >= 1e3 else "< 0.001"
    return f"{count / 1e6:,.1f}"


def _sizes(results: dict[str, Any]) -> list[dict[str, str]]:
    titles = {name: metric["title"] for name, metric in results["metrics"].items()}
    rows = []
    for name, size in results["sizes"].items():
        says, metrics = _SETTINGS[name]
        accuracy = results["accuracy"][name]
        rows.append(
            {
                "says": says,
                "metrics": ", ".join(titles[m] for m in metrics if m in titles),
                "training": f"{size['training']:,}",
                "queries": "—" if name == "noisy" else _queries(size),
                "accuracy": " / ".join(f"{a:.1%}" for a in accuracy),
            }
        )
    return rows


def _queries(size: dict[str, Any]) -> str:
    """How many; of each seed where they differ, as the number of those that a mark misleads does."""
    each = size.get("queries_per_seed") or [size["queries"]]
    return " / ".join(f"{q:,}" for q in (each if len(set(each)) > 1 else each[:1]))


def _measured(results: dict[str, Any]) -> str:
    options = results["options"]
    words = [
        f"Preset {options['preset']}: network {options['network']}, {options['training_images']:,} training and "
        f"{options['test_images']:,} test images in the data set.",
        "A network's test accuracy is that on the test images as it meets them: classes merged, or each marked.",
    ]
    if "lds" in results["metrics"]:
        words.append(f"LDS: {options['subsets']} networks on random halves, {_steps(options)}.")
    if results["selection"]:
        shares = ", ".join(f"{100 * f:.0f}%" for f in options["fractions"])
        words.append(f"Coreset and pruning: {shares} of the samples, {_steps(options)}.")
    words.append(f"This run took {results['seconds']:,.0f} s")
    words.append(
        f"and reused {results['reused']} of {len(results['stages'])} stages." if results["reused"] else "from scratch."
    )
    return " ".join(words)


def _steps(options: dict[str, Any]) -> str:
    return f"{options['steps']:,} steps of {options['batch']} samples each"


def _notes(results: dict[str, Any]) -> list[tuple[str, str]]:
    notes = []
    for row in results["methods"]:
        for metric, why in row["skipped"].items():
            if metric in results["metrics"]:
                notes.append((row["name"], f"left out of {results['metrics'][metric]['title'].lower()}: {why}"))
        notes += [(row["name"], f"failed, so last in place: {why}") for why in sorted(set(row["failed"].values()))]
        notes += [(row["name"], remark) for remark in row["remarks"]]
        notes += [(row["name"], words) for words in _undefined(row, results["metrics"])]
    return notes


def _undefined(row: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    """What a mean in the table leaves out."""
    said = []
    for name, found in row["values"].items():
        left, of = (sum(seed[key] for seed in found["per_seed"]) for key in ("defined", "values"))
        if left < of:
            said.append(
                f"{metrics[name]['title']} has no value for {of - left:,} of {of:,} queries, which its mean leaves out"
            )
    return said


def _words(row: dict[str, Any]) -> str:
    given = ", ".join(f"{name} = {value}" for name, value in row["options"].items())
    return f"{row['method']}({given})" if given else f"{row['method']}, defaults"
