"""The page of ``polyak watch``: curves over training in one HTML file, which loads nothing from a network."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from polyak.report.words import measured
from polyak.storage.atomic import replacing
from polyak.watching import Moment

PAGE = "watch.html"


def write_watch_page(moments: Sequence[Moment], folder: Path) -> None:
    """Write the page, if plotly is installed and there is a moment.

    Args:
        moments: Oldest first.
        folder: Where to write.

    Raises:
        OSError: If the disk refuses.
    """
    if moments and find_spec("plotly") is not None:
        with replacing(folder / PAGE, exclusive=True) as temporary:
            temporary.write_text(watch_page(moments), encoding="utf-8")


def watch_page(moments: Sequence[Moment]) -> str:
    """Return the HTML of the page.

    Args:
        moments: Oldest first; at least one.
    """
    from plotly.offline import get_plotlyjs  # noqa: PLC0415  an extra

    from polyak.report.charts import DARK, LIGHT  # noqa: PLC0415
    from polyak.report.over_training import watched_panels  # noqa: PLC0415
    from polyak.report.page import CONTENT_POLICY, embedded  # noqa: PLC0415
    from polyak.report.panels import frame  # noqa: PLC0415

    shown, last = watched_panels(moments), moments[-1]
    name = Path(last.record).name
    style, script = (
        files("polyak.report").joinpath(one).read_text(encoding="utf-8") for one in ("page.css", "watch.js")
    )
    frames = "\n".join(frame(one.name, one.heading, one.caption, one.summary, "wide") for one in shown)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(f"Watch of {name}")}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(_headline(last, name))}</h1>
<p class="quiet">Evaluated while the run trained, from its record. Evaluate on validation data: choosing by these
numbers on the test set biases the test result.</p>
</header>
<div class="panels">
{frames}
</div>
{_table(moments)}
</main>
{embedded("charts", {one.name: one.figure.to_plotly_json() for one in shown})}
{embedded("colours", {LIGHT[key]: DARK[key] for key in LIGHT})}
<script>{get_plotlyjs()}</script>
<script>
{script}</script>
</body>
</html>
"""


def _headline(last: Moment, name: str) -> str:
    best = last.best
    at = f"{name} after {last.updates:,} updates"
    return at if best is None else f"{at}: best {best.name}, with {last.metric} {measured(last.value(best))}"


def _table(moments: Sequence[Moment]) -> str:
    names = list(dict.fromkeys(name for moment in reversed(moments) for name, _ in moment.named()))
    heads = "".join(f'<th scope="col">{escape(_words(name))}</th>' for name in names)
    rows = list[str]()
    for moment in moments:
        found = dict(moment.named())
        cells = "".join(f"<td>{measured(moment.value(found[n])) if n in found else ''}</td>" for n in names)
        rows.append(f'<tr><th scope="row">{moment.updates:,}</th>{cells}</tr>')
    return (
        '<section><div class="scroll" tabindex="0" role="region" aria-label="All moments"><table>'
        f"<caption>{escape(moments[-1].metric)} at all moments</caption>"
        f"<thead><tr><th scope=col>updates</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _words(name: str) -> str:
    """Return the name of a reading, as text for people: ``cooldown_10`` is a cooldown over 10 % of the training."""
    words = {"sixteenth": "T/16", "best_half_life": "best half-life", "newest": "newest mean"}
    return words.get(name, f"{name.replace('_', ' ')} %" if name.startswith("cooldown") else name)
