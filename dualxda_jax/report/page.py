"""The page: one HTML file with every picture inside, and the pictures beside it."""

import base64
import os
from pathlib import Path
from typing import Any

from dualxda_jax.report import figures
from dualxda_jax.report.canvas import AGAINST, FOR, INK, MUTED, RULE
from dualxda_jax.report.content import Query, Report, check
from dualxda_jax.report.extra import need

_OVERVIEW_ROWS = 4


def write(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write a report.

    Makes `index.html`, one `query-NN.png` a query, and `overview.png` and `suspects.png` where there is something to
    show. The page holds its own copy of every picture and loads nothing, so it can be sent or moved alone. Of an
    earlier report in the folder, figures that are no longer made are removed.

    Args:
        folder: made if it is not there.
        report: what to show.

    Returns:
        Path of `index.html`.

    Raises:
        ImportError: Matplotlib or Jinja2 is missing; the message names the extra.
        ValueError: an image, a map or a label that cannot be shown; the message names its place.
        OSError: the folder cannot be written.
    """
    need_libraries()
    check(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(report)
    earlier = [*folder.glob("query-[0-9][0-9]*.png"), folder / "overview.png", folder / "suspects.png"]
    for path in earlier:
        if path.name not in drawn:
            path.unlink(missing_ok=True)
    for name, figure in drawn.items():
        (folder / name).write_bytes(figure.png)
    page, partial = folder / "index.html", folder / "index.html.partial"
    partial.write_text(_html(report, drawn), encoding="utf-8")
    partial.replace(page)
    return page


def need_libraries() -> None:
    """Check that a report can be made here, so that long work can ask before it starts.

    Raises:
        ImportError: names the missing library and the extra that brings it.
    """
    need("matplotlib", "jinja2")


def _draw(report: Report) -> dict[str, figures.Figure]:
    drawn = {}
    if report.queries:
        chosen = _for_overview(report.queries)
        drawn["overview.png"] = figures.overview_figure(chosen, report.class_names)
        counts = [(1, 1), *((len(q.proponents), len(q.opponents)) for q in report.queries)]
        slots = (max(p for p, _ in counts), max(o for _, o in counts))
        for i, query in enumerate(report.queries):
            drawn[_name(i)] = figures.query_figure(query, report.class_names, slots=slots)
    if report.suspects:
        drawn["suspects.png"] = figures.suspects_figure(report.suspects, report.class_names)
    return drawn


def _name(place: int) -> str:
    return f"query-{place + 1:02d}.png"


def _for_overview(queries: tuple[Query, ...]) -> list[Query]:
    """Three right predictions and a wrong one, of different classes first, as far as there are any."""
    varied: list[Query] = []
    rest: list[Query] = []
    for query in queries:
        seen = any((query.right, query.target) == (other.right, other.target) for other in varied)
        (rest if seen else varied).append(query)
    right = [q for q in varied + rest if q.right]
    wrong = [q for q in varied + rest if not q.right]
    shown = right[: _OVERVIEW_ROWS - min(len(wrong), 1)]
    return shown + wrong[: _OVERVIEW_ROWS - len(shown)]


def _html(report: Report, drawn: dict[str, figures.Figure]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = figures.number
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        entries=[_entry(i, query, report, drawn[_name(i)]) for i, query in enumerate(report.queries)],
        overview=embedded(drawn.get("overview.png")),
        suspects=embedded(drawn.get("suspects.png")),
        seconds=sum(stage.seconds for stage in report.stages),
        right=sum(query.right for query in report.queries),
        colour={"for": FOR, "against": AGAINST, "ink": INK, "muted": MUTED, "rule": RULE},
    )


def embedded(figure: figures.Figure | None) -> dict[str, Any] | None:
    """What a template needs of a figure: the picture as a data URI, and its size in CSS pixels."""
    if figure is None:
        return None
    source = "data:image/png;base64," + base64.b64encode(figure.png).decode("ascii")
    return {"source": source, "width": figure.width, "height": figure.height}


def _entry(place: int, query: Query, report: Report, figure: figures.Figure) -> dict[str, Any]:
    """What the template needs of a query."""
    limit, own_limit = figures.scales(query)
    names = report.class_names
    rows = [
        (kind, pair.index, names[pair.label], pair.score, _total(pair.test_map), _total(pair.train_map))
        for kind, pairs in (("proponent", query.proponents), ("opponent", query.opponents))
        for pair in pairs
    ]
    return {
        "anchor": f"query-{place + 1}",
        "query": query,
        "target": names[query.target],
        "label": names[query.label],
        "picture": embedded(figure),
        "alt": _alt(query, names),
        "limit": figures.magnitude(limit),
        "own_limit": figures.magnitude(own_limit),
        "pairs": rows,
    }


def _total(relevance: Any) -> float:
    import numpy as np

    return float(np.asarray(relevance, np.float64).sum())


def _alt(query: Query, names: tuple[str, ...]) -> str:
    """The figure in words."""
    groups = []
    for kind, pairs in (("Proponents", query.proponents), ("Opponents", query.opponents)):
        said = ", ".join(f"{names[p.label]} {figures.number(p.score)}" for p in pairs)
        groups.append(f"{kind}: {said or 'none'}.")
    verdict = "right" if query.right else "wrong"
    return (
        f"Test image {query.index} of class {names[query.label]}, predicted {names[query.target]} ({verdict}), with "
        "the surrogate's heat map and, for each pair, the training image and the two relevance maps. "
        + " ".join(groups)
    )
