"""One HTML page for one or several runs: summary, alarms, diagnosis and figures.

Equal records give equal bytes.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from hf_stable.errors import UserError

from .alarms import Alarm, alarms
from .diagnosis import Diagnosis, diagnose
from .drawing import plain_text
from .figures import Drawing, LeftOut, draw_all
from .history import History
from .html_kit import BODY, PAPER, document, figure, palette, write_whole
from .looks import Run, dress

_ALARMS_SHOWN = 12
_STYLE = (
    palette()
    + "html { scroll-padding-top: 4rem }\n"
    + BODY
    + """ h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1.02rem; margin: 1rem 0 .3rem } p { margin: .3rem 0 }
a { color: var(--link) } code { font-size: .92em; white-space: nowrap }
figcaption { color: var(--soft) } .card h3 { margin-top: .2rem }
section.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem 1rem; margin: .7rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top } .alarms td:nth-child(2) { min-width: 9rem }
td.number, th.number { text-align: right }
ul { margin: .3rem 0; padding-left: 1.2rem } nav ul { columns: 2; font-size: .92rem }
.runs { position: sticky; top: 0; z-index: 1; background: var(--ground); padding: .45rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
  font-size: .9rem; max-height: 30vh; overflow-y: auto }
.swatch { display: inline-block; width: 1.6em; height: 0; border-top: 3px; vertical-align: middle;
  margin: 0 .35em }
figure { margin: 1.4rem 0; break-inside: avoid }
figure h3 a { color: inherit; text-decoration: none }
"""
    + PAPER
    + """figcaption { font-size: .92rem; margin-top: .45rem }
@media (max-width: 760px) { body { padding: .5rem } .paper { padding: .3rem } }
@media print { .runs, nav { display: none } body { max-width: none; background: #ffffff }
  .paper { border: 0; padding: 0 } .paper svg { min-width: 0 } h2 { break-after: avoid } }
"""
)


def write_page(histories: Sequence[History], file: Path) -> None:
    """Write the page of one or several runs atomically.

    Raises:
        UserError: If there are no runs, matplotlib is not installed, or `file` is a folder.
    """
    if not histories:
        raise UserError("a page needs at least one run, and none was given")
    if file.is_dir():
        raise UserError(f"{file} is a folder: name the HTML file to write")
    write_whole(file, page(histories))


def page(histories: Sequence[History]) -> str:
    """Return the HTML of the page."""
    runs = dress(histories)
    rung = [alarms(history) for history in histories]
    diagnoses = [diagnose(history) for history in histories]
    moves = [None if each.onset is None else each.onset.step for each in diagnoses]
    drawings, left_out = draw_all(runs, rung, moves)
    title = f"Stability of {', '.join(run.label for run in runs)}"
    body = [
        f'<h1 id="top">{escape(title)}</h1>',
        *_contents(drawings),
        '<h2 id="runs">Runs</h2>',
        *_summary(runs),
        '<h2 id="alarms">Alarms and diagnosis</h2>',
        *(line for each in zip(runs, rung, diagnoses, strict=True) for line in _findings(*each)),
        '<h2 id="figures">Figures</h2>',
        *_legend(runs),
        *(line for drawing in drawings for line in figure(drawing, level=3)),
        *_missing(left_out),
    ]
    return document(title, _STYLE + _switches(runs), body)


def _switches(runs: Sequence[Run]) -> str:
    """Return CSS rules that hide the curves of an unchecked run."""
    rule = "body:has(#show-{0}:not(:checked)) .{0} {{ display: none }}\n"
    return "".join(rule.format(run.mark) for run in runs)


def _contents(drawings: Sequence[Drawing]) -> Iterable[str]:
    yield '<nav aria-label="Contents"><ul>'
    yield '<li><a href="#runs">Runs</a></li>'
    yield '<li><a href="#alarms">Alarms and diagnosis</a></li>'
    for drawing in drawings:
        yield f'<li><a href="#{drawing.key}">{escape(drawing.title)}</a></li>'
    yield "</ul></nav>"


def _legend(runs: Sequence[Run]) -> Iterable[str]:
    """Yield the legend of the runs' colors, which stays visible next to every figure."""
    styles = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}
    yield '<div class="runs">'
    for run in runs:
        look = f"border-top-style: {styles[run.dashes]}; border-top-color: {run.colour}"
        yield (
            f'<label><input type="checkbox" id="show-{run.mark}" checked>'
            f'<span class="swatch" style="{look}"></span>{escape(run.label)}</label>'
        )
    yield "</div>"


def _summary(runs: Sequence[Run]) -> Iterable[str]:
    rows = [_facts(run) for run in runs]
    yield '<section class="card wide"><table><thead><tr>'
    yield "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    yield "</tr></thead><tbody>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row.values())}</tr>"
    yield "</tbody></table></section>"


def _facts(run: Run) -> dict[str, str]:
    """Return a row of the summary, with a dash for facts that are not recorded."""
    history = run.history
    losses = run.logged("loss")[1]
    rates = run.logged("learning_rate")[1]
    validated = [row for row in history.events if row["event"] == "validation"]
    revision = history.run.get("git_revision") or "—"
    return {
        "run": run.label,
        "steps": _steps(run),
        "peak learning rate": plain_text(rates.max()) if rates.size else "—",
        "last training loss": f"{losses[-1]:.3f}" if losses.size else "—",
        "validation perplexity": (
            plain_text(float(validated[-1]["perplexity"])) if validated else "—"
        ),
        "steps not finite": str(sum(row["event"] == "non_finite" for row in history.events)),
        "telemetry": _cadence(history),
        "parameters": _parameters(history),
        "device": history.run.get("device") or "—",
        "revision": revision[:12] + ("-dirty" if revision.endswith("-dirty") else ""),
    }


def _steps(run: Run) -> str:
    history = run.history
    logged = run.logged("loss")[0]
    last = max([0, *history.steps.tolist(), *logged.tolist()])
    planned = history.run.get("recipe", {}).get("training", {}).get("steps")
    ended = any(row["event"] == "finished" for row in history.events)
    if ended or planned is None:
        return f"{last:,.0f}{'' if ended else ', not finished'}"
    return f"{last:,.0f} of {planned:,}"


def _cadence(history: History) -> str:
    if len(history.steps) < 2:
        return "none" if not len(history.steps) else "1 sample"
    every = int(np.median(np.diff(history.steps)))
    return f"every {every:,} steps, {len(history.steps):,} samples"


def _parameters(history: History) -> str:
    count = history.run.get("parameters")
    return "—" if count is None else f"{count / 1e6:.3g}M"


def _findings(run: Run, found: Sequence[Alarm], diagnosis: Diagnosis) -> Iterable[str]:
    yield f'<section class="card"><h3>{escape(run.label)}</h3>'
    yield "".join(f"<p>{escape(line)}</p>" for line in diagnosis.sentences)
    if found:
        yield f"<p>{len(found)} alarms, in the order in which they rang:</p>"
        yield _alarm_table(found[:_ALARMS_SHOWN])
        if rest := found[_ALARMS_SHOWN:]:
            yield f"<details><summary>{len(rest)} more</summary>{_alarm_table(rest)}</details>"
    yield "</section>"


def _alarm_table(found: Sequence[Alarm]) -> str:
    rows = [
        f'<tr><td class="number">{alarm.step:,}</td><td>{escape(alarm.text)}</td>'
        f"<td><code>{escape(alarm.name)}</code></td>"
        f'<td class="number">{plain_text(alarm.value)}</td>'
        f'<td class="number">{_limit(alarm)}</td></tr>'
        for alarm in found
    ]
    heads = '<th class="number">step</th><th>what happened</th><th>number</th>'
    heads += '<th class="number">value</th><th class="number">limit</th>'
    return f'<div class="wide alarms"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _limit(alarm: Alarm) -> str:
    return "finite" if np.isnan(alarm.threshold) else plain_text(alarm.threshold)


def _missing(left_out: Sequence[LeftOut]) -> Iterable[str]:
    if not left_out:
        return
    yield '<h2 id="left-out">Left out</h2><ul>'
    for each in left_out:
        yield f"<li>{escape(each.title)}: {escape(each.reason)}.</li>"
    yield "</ul>"
