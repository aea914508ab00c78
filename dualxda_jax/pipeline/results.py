"""From the cells of an evaluation to its results, and results as a file."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dualxda_jax import evaluation
from dualxda_jax._check import fail
from dualxda_jax.evaluation import benchmark
from dualxda_jax.pipeline.lineup import CONTROL, Entry

FORMAT = "dualxda-evaluation-1"

Cells = dict[str, dict[str, dict[str, Any]]]
"""row -> case (or "selection") -> what `cells` returned."""


def assemble(
    entries: tuple[Entry, ...], metrics: tuple[str, ...], seeds: list[Cells], sparsity: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """The tables and curves of all seeds, as plain values for JSON; None where there is no value.

    A method's place in a metric is that of its mean over the seeds. The control is not ranked. A metric that a row was
    left out of does not count in its average place; one that has no value for it counts as a last place.

    Args:
        entries: the rows.
        metrics: the columns.
        seeds: the cells of each seed.
        sparsity: of each seed, over the path of costs; empty if it was not asked for.

    Returns:
        "metrics", "methods" (rows in the order of their average rank), "curves", "lds", "sparsity".
    """
    rows = [_row(entry, metrics, seeds) for entry in entries]
    _rank(rows, metrics)
    rows.sort(key=lambda row: (row["average_rank"] is None, row["average_rank"] or 0.0))
    return {
        "metrics": {name: dataclasses.asdict(benchmark.METRICS[name]) for name in metrics},
        "methods": rows,
        "curves": {
            e.name: _mean([s[e.name]["noisy"]["curve"] for s in seeds]) for e in entries if _has(seeds, e, "noisy")
        },
        "lds": {
            e.name: _plain(np.concatenate([s[e.name]["part"]["values"]["lds"] for s in seeds]))
            for e in entries
            if "lds" in metrics and _has(seeds, e, "part")
        },
        "selection": {
            name: {
                e.name: {k: _mean([s[e.name]["selection"][name][k] for s in seeds]) for k in ("fractions", "values")}
                for e in entries
                if _has(seeds, e, "selection")
            }
            for name in ("coreset", "pruning")
            if name in metrics
        },
        # A seed that an earlier version computed has no intervals.
        "sparsity": {
            name: _mean([s[name] for s in sparsity])
            for name in (sparsity[0] if sparsity else ())
            if all(name in s for s in sparsity)
        },
    }  # fmt: skip


def _has(seeds: list[Cells], entry: Entry, case: str) -> bool:
    return all(case in cells[entry.name] and "failed" not in cells[entry.name][case] for cells in seeds)


def _row(entry: Entry, metrics: tuple[str, ...], seeds: list[Cells]) -> dict[str, Any]:
    skips = dict(entry.skips)
    values = {}
    for name in metrics:
        if name in skips:
            continue
        per_seed = [_interval(_values(cells[entry.name], name), seed, name) for seed, cells in enumerate(seeds)]
        ends = {e: np.array([np.nan if v[e] is None else v[e] for v in per_seed]) for e in ("mean", "low", "high")}
        means = ends["mean"]
        values[name] = {
            **{end: _plain(numbers.mean()) for end, numbers in ends.items()},
            "spread": _plain(means.std(ddof=1)) if len(means) > 1 else None,
            "per_seed": per_seed,
        }
    costs = [c["cost"] for cells in seeds for c in cells[entry.name].values() if c.get("cost")]
    cost = None
    if costs:
        prepare, explain, queries, kept, compiled = (list(column) for column in zip(*costs, strict=True))
        cost = {
            "prepare_seconds": float(np.median(prepare)), "explain_seconds": float(np.median(explain)),
            "queries": int(queries[0]), "kept_bytes": int(kept[0]), "without_compilation": all(map(bool, compiled)),
        }  # fmt: skip
    failed = {
        metric: why
        for cells in seeds
        for c in cells[entry.name].values()
        for metric, why in c.get("failed", {}).items()
        if metric not in skips
    }
    remarks = sorted({r for cells in seeds for c in cells[entry.name].values() for r in c.get("remarks", ())})
    return {
        "name": entry.name, "method": entry.method, "options": dict(entry.options), "values": values, "cost": cost,
        "skipped": skips, "failed": failed, "remarks": remarks, "control": entry.name == CONTROL,
    }  # fmt: skip


def _values(cells: dict[str, dict[str, Any]], metric: str) -> np.ndarray:
    """[q] values, none where the case had no query."""
    if metric in ("coreset", "pruning"):
        return np.asarray(cells["selection"][metric]["per_query"]) if "selection" in cells else np.zeros(0)
    found = [cell["values"][metric] for cell in cells.values() if metric in cell.get("values", {})]
    return np.asarray(found[0]) if found else np.zeros(0)


def _interval(values: np.ndarray, seed: int, metric: str) -> dict[str, Any]:
    if not values.size:
        return {"mean": None, "low": None, "high": None, "defined": 0, "values": 0}
    key = jax.random.fold_in(jax.random.key(seed), list(benchmark.METRICS).index(metric))
    found = evaluation.bootstrap(values.astype(np.float32), key)
    ends = {name: _plain(getattr(found, name)) for name in ("mean", "low", "high")}
    return {**ends, "defined": int(found.defined), "values": int(values.size)}


def _rank(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> None:
    """Add "ranks" and "average_rank"."""
    for row in rows:
        row["ranks"], row["average_rank"] = {}, None
    for name in metrics:
        ranked = [row for row in rows if not row["control"] and name in row["values"]]
        means = [[np.nan if row["values"][name]["mean"] is None else row["values"][name]["mean"]] for row in ranked]
        if not ranked:
            continue
        places = benchmark.ranks(np.asarray(means, np.float64), [benchmark.METRICS[name].higher])[:, 0]
        for row, place in zip(ranked, places, strict=True):
            if not np.isnan(place):
                row["ranks"][name] = float(place)
    for row in rows:
        if row["ranks"]:
            row["average_rank"] = float(np.mean(list(row["ranks"].values())))


def save(path: Path, results: dict[str, Any]) -> None:
    """Write results in one step: a file that is there is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"format": FORMAT, "finished": True, **results}, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read results.

    Raises:
        ValueError: no such file, not results, of another version, or of a run that did not finish.
    """
    if not path.is_file():
        fail("results", f"no file {path}", "the results.json of a finished evaluation")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        made = found.get("format")
    except (ValueError, AttributeError):
        fail("results", f"{path}, which is no JSON object", "the results.json of a finished evaluation")
    if made != FORMAT:
        fail("results", f"{path} of format {made!r}", f"of format {FORMAT!r}: move it away or name another folder")
    if found.get("finished") is not True:
        fail("results", f"{path} of a run that did not finish", "of a finished run: run the evaluation again")
    return dict(found)


def _mean(arrays: list[Any]) -> list[Any]:
    return list(_plain(np.mean(np.stack([np.asarray(a, np.float64) for a in arrays]), axis=0)))


def _plain(value: Any) -> Any:
    """Python numbers rounded to what is worth reading; None for nan and infinities."""
    if np.ndim(value):
        return [_plain(v) for v in np.asarray(value)]
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
