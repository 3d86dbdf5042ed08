"""The table in ``docs/distributed.md``, made of the tests' own parameters: a cell stands for a test that ran."""

import sharded
from paths import ROOT

from tests import test_export
from tests.record import test_recorder_sharded
from tests.sharding import test_sharded_checkpoints, test_sharding

PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!--- table of parallelism by feature -->", "<!--- end of the table -->"
FEATURES = {
    "average of the whole, bit for bit": test_sharding.test_a_sharded_average_is_that_of_the_whole_model_bit_for_bit,
    "no message in an update": test_sharding.test_an_update_sends_no_message_and_a_swap_does,
    "swaps leave training as it was": test_sharding.test_training_after_swaps_is_as_without_them,
    "so does a failed evaluation": test_sharding.test_an_evaluation_that_fails_leaves_training_as_it_was,
    "resumed by DCP, bit for bit": test_sharded_checkpoints.test_a_run_resumed_by_dcp_is_as_if_it_had_not_stopped,
    "recorded, bit for bit": test_recorder_sharded.test_the_record_of_ranks_is_that_of_the_whole_model_bit_for_bit,
    "exported as safetensors": test_export.test_ranks_export_the_average_that_they_swap_in,
}


def sizes(test, kind: str) -> str:
    """Return the numbers of ranks with which a test runs for a kind of parallelism."""
    cells = next(mark.args[1] for mark in test.pytestmark if mark.args[:1] == (("kind", "size"),))
    return ", ".join(str(size) for one, size in sorted(cells) if one == kind)


def lines() -> list[str]:
    head = ["parallelism", *FEATURES]
    rows = [[kind, *(sizes(test, kind) for test in FEATURES.values())] for kind in sharded.KINDS]
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]


def test_the_page_has_the_table_of_what_is_tested() -> None:
    inside = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert inside.strip().splitlines() == lines(), "\n".join(["the table should be:", *lines()])


def test_no_cell_of_the_table_is_empty() -> None:
    assert all(sizes(test, kind) for test in FEATURES.values() for kind in sharded.KINDS)
