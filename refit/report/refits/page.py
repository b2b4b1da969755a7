"""The HTML report: one file with the headlines, the tables, the pictures and the environment of any number of runs.

The page loads nothing and runs no script. Everything from result files is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refit import units
from refit.report.refits.analysis import analyse
from refit.report.refits.entries import Entry, entries_of, scenario_entries
from refit.report.refits.facts import facts, kept
from refit.report.refits.headline import headline, ratios
from refit.report.refits.run_spread import by_scenario, spread_lines
from refit.report.refits.summary import counts_line
from refit.report.refits.tables import run_title, where_text
from refit.report.terminal.escaped import html_text
from refit.results.outcomes import Outcome
from refit.results.result import Environment
from refit.results.runs import Run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { --ink: #1a202c; --dim: #5a6472; --line: #d9dee5; --soft: #f5f7fa; --good: #1c6e3d; --bad: #b3261e;
  --paper: white; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 96rem; padding: 2rem 1.5rem 4rem; color: var(--ink);
  background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .2rem; padding-top: 1.5rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1rem 0 .2rem; }
p { margin: .2rem 0; overflow-wrap: anywhere; }
.dim { color: var(--dim); }
.name { font-weight: 600; }
.invalid, tr.invalid td { color: var(--bad); }
.results { list-style: none; margin: 1rem 0; padding: 0; }
.results li { padding: .45rem .8rem; margin: .4rem 0; background: var(--soft); border-left: 4px solid var(--bad); }
.results li.valid { border-left-color: var(--good); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { vertical-align: bottom; background: var(--soft); }
.text { text-align: left; }
td.name { min-width: 9rem; overflow-wrap: anywhere; font-weight: normal; }
td.wide { text-align: left; overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); background: white; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #a3adba; --line: #3a434f;
  --soft: #222932; --good: #57c785; --bad: #ff8a80; --paper: #171c22; color-scheme: dark; } }
.small { columns: 2 30rem; column-gap: 1.2rem; }
figure, li { break-inside: avoid; }
@page { size: A4 landscape; margin: 10mm; }
@media print { .scroll { overflow: visible; } body { padding: 0; font-size: 11px; } table { font-size: 9px; }
  th, td { padding: 2px 4px; } tr { break-inside: avoid; } img { max-height: 17cm; } }
"""

LEGEND = (
    "Median over the measured refits, of the slowest rank. Cold: planning, preparing and the first refit together. "
    "Share: lower bound / median. Ratio: median of the baseline / median of refit, with what moved the bytes of each "
    "where these differ. Rows in red do not count."
)
VALID, INVALID = ' class="valid"', ' class="invalid"'


@dataclass(frozen=True, slots=True)
class Pictures:
    """The PNG files drawn of a run, and the reasons why others are missing."""

    paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()


def page(runs: Sequence[Run], pictures: Sequence[Pictures]) -> str:
    """The page as text, without a newline at its end. `pictures` are those of each run."""
    sections = [_section(run, drawn) for run, drawn in zip(runs, pictures, strict=True)]
    counts = counts_line([outcome for run in runs for outcome in run.outcomes])
    return document("Refit benchmark report", STYLE, [f'<p class="dim">{html_text(counts)}</p>', *sections])


def document(title: str, style: str, body: Sequence[str]) -> str:
    """A page that needs nothing else, `body` under its heading."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        *body,
        "</body>",
        "</html>",
    ]
    return "\n".join(lines)


def _section(run: Run, pictures: Pictures) -> str:
    entries = entries_of([run])
    parts = [
        f"<h2>{html_text(run_title(run.sweep))}</h2>",
        f'<p class="dim">{html_text(where_text(run))}</p>',
        *fact_lines(facts(entries)),
        '<ul class="results">',
        *(_headlines(run, outcome) for outcome in run.outcomes),
        "</ul>",
        *(f"<p>{html_text(line)}</p>" for line in spread_lines(run.outcomes)),
        "<h3>Results</h3>",
        *results_table(entries),
        f'<p class="dim">{LEGEND}</p>',
        *_analysis(run.outcomes),
        *_pictures(pictures, [scenario.name for scenario in by_scenario(run.outcomes)]),
        *_environments(run.outcomes),
    ]
    return "\n".join(parts)


def _headlines(run: Run, outcome: Outcome) -> str:
    """The name of a scenario, a line for each engine and the ratios."""
    lines = [f'<p class="name">{html_text(outcome.planned.name)}</p>']
    entries = scenario_entries(run, outcome)
    for entry in entries:
        lines.append(f"<p{'' if entry.is_valid else INVALID}>{html_text(headline(outcome, entry.name))}</p>")
    lines += [f'<p class="dim">{html_text(line)}</p>' for line in ratios(outcome)]
    is_valid = any(entry.is_valid for entry in entries if entry.is_tested)
    return f"<li{VALID if is_valid else ''}>{''.join(lines)}</li>"


def fact_lines(found: Mapping[str, str]) -> list[str]:
    """A line for each fact, its name in front."""
    return [f'<p class="dim">{html_text(name)}: {html_text(value)}</p>' for name, value in found.items()]


def results_table(entries: Sequence[Entry], is_short: bool = False) -> list[str]:
    """What all rows have in common, then the table of the rest."""
    shown = kept(entries, is_short)
    columns = shown.columns
    titles = "".join(_cell("th", column.title, "text" if column.is_text else "") for column in columns)
    kinds = ["text name", *("text" if column.is_text else "" for column in columns[1:])]
    common = ", ".join(f"{title} {value}" for title, value in shown.common.items())
    rows = [f"<thead><tr>{titles}</tr></thead>", "<tbody>"]
    for entry in entries:
        cells = (_cell("td", column.cell(entry), kind) for column, kind in zip(columns, kinds, strict=True))
        rows.append(f"<tr{'' if entry.is_valid else INVALID}>{''.join(cells)}</tr>")
    said = [f'<p class="dim">In every row: {html_text(common)}</p>'] if common else []
    return [*said, '<div class="scroll"><table>', *rows, "</tbody>", "</table></div>"]


def _cell(tag: str, text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html_text(text)}</{tag}>"


def _analysis(outcomes: Sequence[Outcome]) -> list[str]:
    lines: list[str] = []
    for finding in analyse(outcomes):
        lines += [f"<h4>{html_text(finding.question)}</h4>", *(f"<p>{html_text(line)}</p>" for line in finding.answer)]
    return ["<h3>Analysis</h3>", *lines] if lines else []


def _pictures(pictures: Pictures, names: Sequence[str]) -> list[str]:
    """Pictures of the run, then those of its scenarios beside each other, then why others are missing."""
    own = [path for path in pictures.paths if path.stem.startswith(tuple(f"{name}_" for name in names))]
    lines = [figure(path) for path in pictures.paths if path not in own]
    lines += ['<div class="small">', *map(figure, own), "</div>"] if own else []
    lines += [f'<p class="dim">No picture: {html_text(reason)}</p>' for reason in pictures.missing]
    return ["<h3>Pictures</h3>", *lines] if lines else []


def figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html_text(path.stem)}"></figure>'


def _environments(outcomes: Iterable[Outcome]) -> list[str]:
    """The environments of the results, each once, with the scenarios that ran in it."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        environment = outcome.result.environment if outcome.result else None
        if environment is not None:
            found.setdefault(_environment(environment), []).append(outcome.planned.name)
    lines: list[str] = []
    for table, names in found.items():
        lines += [f'<p class="dim">{html_text(", ".join(names))}</p>'] if len(found) > 1 else []
        lines.append(table)
    return ["<h3>Environment</h3>", *lines] if lines else []


def _environment(environment: Environment) -> str:
    gpus = [gpu.name for gpu in environment.gpus]
    memory = environment.gpus[0].memory_bytes if gpus else None
    facts = {
        "host": environment.host,
        "GPUs": f"{len(gpus)} x {gpus[0]}" + (f", {units.gib(memory)} each" if memory else "") if gpus else None,
        "CPU": f"{environment.num_cpus} cores of {environment.cpu}" if environment.cpu else None,
        "memory": units.gib(environment.memory_bytes) if environment.memory_bytes else None,
        "commit": environment.commit,
        **environment.versions,
        **environment.variables,
    }
    known = {name: value for name, value in facts.items() if value}
    rows = (f"<tr>{_cell('th', name, 'text')}{_cell('td', value, 'wide')}</tr>" for name, value in known.items())
    return "\n".join(['<div class="scroll"><table>', *rows, "</table></div>"])
