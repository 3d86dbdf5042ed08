"""The golden trace in ``docs/golden-trace.md`` is what both trainers do, and they differ where the page says so."""

import re
from importlib.util import find_spec
from itertools import zip_longest

import golden_trace
import pytest

if find_spec("mcli") is None:
    pytest.skip("Composer needs stubs: PYTHONPATH=tests/stubs pytest ..., as in `make test`", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's own


def same(cell: str, other: str) -> bool:
    try:
        return abs(float(cell) - float(other)) <= golden_trace.TOLERANCE
    except ValueError:
        return cell == other


@pytest.fixture(scope="module", params=golden_trace.RUNS)
def run(request):
    return request.param, golden_trace.rows(golden_trace.RUNS[request.param])


def test_the_page_shows_what_both_trainers_do(run):
    name, rows = run
    lines = zip_longest(golden_trace.on_page(name), golden_trace.table(rows), fillvalue="")
    differing = [
        (page, made)
        for page, made in lines
        if not all(same(*cells) for cells in zip_longest(page.split(), made.split(), fillvalue=""))
    ]
    assert not differing, "run tests/support/golden_trace.py --write"


def test_both_trainers_agree_at_each_event_but_those_that_the_page_explains(run):
    _, rows = run
    assert [row for row in rows if not row.agrees and not row.reason] == []
    entries = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", golden_trace.PAGE.read_text(), re.MULTILINE)
    assert {row.reason for row in rows if row.reason} == set(entries) - {"entry", "---"}


def test_both_trainers_average(run):
    _, rows = run
    last = rows[-1]
    assert last.composers.moves == last.polyaks.moves > 0
    assert any(row.polyaks.holds == "average" for row in rows if row.polyaks and row.polyaks.event == "eval_batch_end")


def test_a_start_in_epochs_comes_one_batch_before_composers(tmp_path):
    options = {"half_life": "4ba", "update_interval": "1ba", "ema_start": "1ep"}
    theirs = golden_trace.in_composers(tmp_path / "composer", options)
    ours = golden_trace.in_polyaks(tmp_path / "polyak", options)
    starts = [next(seen for seen in trace if seen.average is not None) for trace in (theirs, ours)]
    assert [(seen.event, seen.clock) for seen in starts] == [("batch_end", "ep1 ba3"), ("batch_end", "ep0 ba2")]
