"""Writes the report of a sweep: a page, which plotly draws, and figures, which matplotlib draws. Both are extras."""

from importlib.util import find_spec
from pathlib import Path
from types import EllipsisType

from polyak.errors import MissingExtraError
from polyak.report.provenance import provenance
from polyak.report.swept import Swept, swept
from polyak.report.text import advice, as_good
from polyak.storage.atomic import replacing
from polyak.sweeping import SweepResult
from polyak.time import Time
from polyak.watching import Moment, read_moments
from polyak.watching.log import FILE

PAGE = "report.html"
FIGURES = ("sweep.png", "sweep.svg")


def missing_pictures() -> list[str]:
    """Return the packages that the report needs and that are not installed."""
    return [name for name in ("matplotlib", "plotly") if not _installed(name)]


def require_pictures() -> None:
    """Check that the report can be written.

    Raises:
        MissingExtraError: If a package is missing.
    """
    if missing := missing_pictures():
        raise MissingExtraError(
            f"a report needs matplotlib and plotly (missing: {' and '.join(missing)}); install them with: "
            "pip install 'polyak[report]'"
        )


def numbers(results: SweepResult, moment: Time | EllipsisType | None = ...) -> Swept:
    """Return the numbers that the report shows of an end moment.

    Args:
        results: The results of a sweep.
        moment: One of its end moments; ``...`` for the one with the best average.
    """
    moment = results.best.at if isinstance(moment, EllipsisType) else moment
    return swept(
        results.record_at(moment),
        results.at(moment),
        results.metric,
        maximize=results.maximize,
        batchnorm=results.batchnorm,
    )


def _others(results: SweepResult) -> list[Swept]:
    """Return the numbers of the other end moments, without those at which no average has a number."""
    first = results.best.at
    return [numbers(results, one) for one in results.moments if one != first and results.at(one).has_best]


def write_report(results: SweepResult, folder: Path, *others: SweepResult) -> list[str]:
    """Write the page and the figures, as far as their packages are installed; return the names of the files.

    Args:
        results: The results of a sweep.
        folder: Where to write; it is made if it does not exist.
        *others: Sweeps of other records, with the same metrics, for comparison on the page.

    Raises:
        OSError: If the disk refuses.
    """
    shown, written = numbers(results), list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    if _installed("plotly"):
        from polyak.report.page import page  # noqa: PLC0415  an extra

        with replacing(folder / PAGE, exclusive=True) as temporary:
            more = [*_others(results), *(one for other in others for one in (numbers(other), *_others(other)))]
            about = provenance([one.folder for one in (shown, *more)])
            notes, watched = [as_good(results), advice(results)], _watched(folder / FILE, results)
            temporary.write_text(page(shown, *more, about=about, notes=notes, watched=watched), encoding="utf-8")
        written.append(PAGE)
    if _installed("matplotlib"):
        from polyak.report.figures import render  # noqa: PLC0415  an extra
        from polyak.report.sweep_figure import sweep_figure  # noqa: PLC0415

        figure = sweep_figure(shown)
        for name in FIGURES:
            with replacing(folder / name, exclusive=True) as temporary:
                temporary.write_bytes(render(figure, name.rpartition(".")[2]))
            written.append(name)
    return written


def _watched(path: Path, results: SweepResult) -> list[Moment]:
    """Return what ``polyak watch`` has read of the record, if it has written to the same folder."""
    if not path.is_file():
        return []
    return [one for one in read_moments(path) if Path(one.record) == results.record.folder]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # `sys.modules` has None for it
        return False
