"""A run as Markdown."""

from __future__ import annotations

from refit.report.refits.entries import Entry, entries_of
from refit.report.refits.facts import facts
from refit.report.refits.headline import headlines
from refit.report.refits.run_spread import spread_lines
from refit.report.refits.summary import counts_line
from refit.report.refits.tables import COLUMNS, Shown, run_title, shown, where_text
from refit.report.terminal import escaped
from refit.report.terminal.escaped import markdown_code
from refit.report.terminal.grid import markdown
from refit.results.runs import Run


def markdown_report(run: Run) -> str:
    """A heading, hardware, model and versions, the table, the headlines and the spread between runs of a scenario."""
    heading = f"### {escaped.markdown_text(run_title(run.sweep))}"
    entries = entries_of([run])
    columns = shown(entries)
    rows = [[_markdown_cell(column, entry) for column in columns] for entry in entries]
    where = [where_text(run), *(f"{name}: {value}" for name, value in facts(entries).items())]
    table = markdown([column.title for column in columns], rows, sum(column.is_text for column in columns))
    lines = "\n".join(
        f"- {markdown_code(outcome.planned.name)} {escaped.markdown_text(line)}"
        for outcome in run.outcomes
        for line in headlines(outcome)
    )
    spread = "\n".join(f"- {escaped.markdown_text(line)}" for line in spread_lines(run.outcomes))
    parts = [heading, "  \n".join(map(escaped.markdown_text, where)), table, lines, spread, counts_line(run.outcomes)]
    return "\n\n".join(part for part in parts if part)


def _markdown_cell(column: Shown, entry: Entry) -> str:
    escape = markdown_code if column is COLUMNS[0] else escaped.markdown_text
    return escape(column.cell(entry))
