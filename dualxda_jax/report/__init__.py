"""A report: figures and one self-contained HTML page from plain data.

Needs the extra `report` (Matplotlib, Jinja2) when it draws, not when it is imported.
"""

from dualxda_jax.report.content import Pair, Query, Report, Stage, Suspect
from dualxda_jax.report.evaluation import remove_evaluation, write_evaluation
from dualxda_jax.report.figures import query_figure
from dualxda_jax.report.page import need_libraries, write

__all__ = [
    "Pair",
    "Query",
    "Report",
    "Stage",
    "Suspect",
    "need_libraries",
    "query_figure",
    "remove_evaluation",
    "write",
    "write_evaluation",
]
