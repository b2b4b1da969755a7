"""The HTML report that prints on one page: what ran, the table and one picture of the times."""

from __future__ import annotations

from collections.abc import Sequence

from refit.report.refits.entries import entries_of
from refit.report.refits.facts import facts
from refit.report.refits.page import LEGEND, STYLE, Pictures, document, fact_lines, figure, results_table
from refit.report.refits.summary import counts_line
from refit.report.refits.tables import run_title, where_text
from refit.report.terminal.escaped import html_text
from refit.results.runs import Run

PRINTED = """
body { max-width: 297mm; padding: 1rem; }
@media screen { body { font-size: 13px; } table { font-size: .62rem; } th, td { padding: .2rem; } }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.05rem; margin: .6rem 0 .2rem; padding-top: .5rem; }
th { white-space: normal; }
td { white-space: nowrap; }
td.name { min-width: 0; }
figure { margin: .6rem 0 0; }
img { max-height: 9cm; border: 0; }
@media print { body { line-height: 1.25; } h1 { display: none; } h2 { border: 0; padding: 0; margin: 0 0 1mm; }
  h2 ~ h2 { margin-top: 3mm; } table { font-size: 8.5px; } th, td { padding: 1px 4px; } img { max-height: 7cm; } }
"""


def printed_page(runs: Sequence[Run], pictures: Sequence[Pictures]) -> str:
    """The page as text, without a newline at its end. It takes one sheet of A4 for some twenty rows."""
    body = [line for run, drawn in zip(runs, pictures, strict=True) for line in _section(run, drawn)]
    return document("Refit benchmark", STYLE + PRINTED, body)


def _section(run: Run, pictures: Pictures) -> list[str]:
    entries = entries_of([run])
    times = [figure(path) for path in pictures.paths if path.stem == "times"]
    return [
        f"<h2>{html_text(run_title(run.sweep))}</h2>",
        f'<p class="dim">{html_text(where_text(run))}; {html_text(counts_line(run.outcomes))}</p>',
        *fact_lines(facts(entries)),
        *results_table(entries, is_short=True),
        f'<p class="dim">{LEGEND}</p>',
        *times,
    ]
