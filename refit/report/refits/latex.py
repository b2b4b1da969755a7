"""The table of a run for a paper: LaTeX with booktabs, what is equal in every row in the caption."""

from __future__ import annotations

from refit.report.refits.entries import entries_of
from refit.report.refits.facts import facts, kept
from refit.report.refits.tables import run_title, where_text
from refit.report.terminal.escaped import latex_text, plain_lines
from refit.results.runs import Run


def latex_table(run: Run) -> str:
    """A `table` environment, without a newline at its end. It needs the package booktabs."""
    entries = entries_of([run])
    table = kept(entries, is_short=True)
    said = [f"{name}: {value}" for name, value in {**facts(entries), **table.common}.items()]
    caption = ". ".join([run_title(run.sweep), where_text(run), *said])
    rows = [" & ".join(latex_text(column.cell(entry)) for column in table.columns) for entry in entries]
    return plain_lines(
        [
            r"\begin{table}",
            r"  \centering",
            r"  \small",
            rf"  \begin{{tabular}}{{{''.join('l' if column.is_text else 'r' for column in table.columns)}}}",
            r"    \toprule",
            rf"    {' & '.join(latex_text(column.title) for column in table.columns)} \\",
            r"    \midrule",
            *(rf"    {row} \\" for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            rf"  \caption{{{latex_text(caption)}.}}",
            r"\end{table}",
        ]
    )
