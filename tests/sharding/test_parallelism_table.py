"""The table in ``docs/distributed.md``, made of the tests' own parameters: a cell stands for a test that ran."""

import deepspeed_runs
import megatron_runs
import pytest
import sharded
from paths import ROOT

from tests import test_export
from tests.record import test_recorder_sharded
from tests.sharding import test_ranks, test_sharded_checkpoints, test_sharding

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


def pipelines_and_experts() -> list[str]:
    """Return the rows of the second table, of the parameters of the tests."""
    rows = [
        f"| pipeline, {kind} | {size} |"
        for kind, size in _cells(test_ranks.test_stages_of_a_pipeline_swap_save_export_and_record_one_model)
    ]
    for test in (
        test_ranks.test_declared_experts_are_swapped_saved_exported_and_recorded_as_those_of_the_full_model,
        test_ranks.test_experts_as_dtensors_are_saved_exported_and_recorded_whole,
    ):
        rows += [f"| experts, {kind} | 2 |" for (kind,) in _cells(test)]
    return ["| parallelism | ranks |", "| --- | --- |", *rows]


def _cells(test) -> list[tuple]:
    values = next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
    return [value if isinstance(value, tuple) else (value,) for value in values]


def test_the_page_has_the_table_of_pipelines_and_experts() -> None:
    begin, end = "<!--- table of pipelines and experts -->", "<!--- end of the table of pipelines and experts -->"
    inside = PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert inside.strip().splitlines() == pipelines_and_experts()


def of_engine(name: str) -> list[str]:
    """Return the table of an engine's page, of the parameters of its tests."""
    rows = list[list[str]]()
    if name == "deepspeed":
        for kind, sizes in deepspeed_runs.FOLLOWED.items():
            loaded = [
                f"{size} ({other})" if other != kind else str(size)
                for other, size in deepspeed_runs.SAVED.get(kind, [])
            ]
            killed = "2" if kind in deepspeed_runs.KILLED else ""
            rows.append([kind, ", ".join(map(str, sorted(sizes))), "; ".join(loaded), killed])
    else:
        for kind in megatron_runs.FOLLOWED:
            size = str(megatron_runs.KINDS[kind].size)
            loaded = megatron_runs.SAVED.get(kind, [])
            rows.append([kind, size, "; ".join(loaded), size if kind in megatron_runs.KILLED else ""])
    head = ["layout", "average, swap, training: ranks", "its state loads on", "killed and resumed: ranks"]
    return ["| " + " | ".join(cells).replace("  ", " ") + " |" for cells in [head, ["---"] * 4, *rows]]


@pytest.mark.parametrize("name", ["deepspeed", "megatron"])
def test_the_page_of_an_engine_has_the_table_of_what_is_tested(name) -> None:
    page = (ROOT / "docs" / "hosts" / f"{name}.md").read_text()
    inside = page.partition("<!--- table of layouts -->")[2].partition(END)[0]
    assert inside.strip().splitlines() == of_engine(name), "\n".join(["the table should be:", *of_engine(name)])


def test_no_cell_of_the_table_is_empty() -> None:
    assert all(sizes(test, kind) for test in FEATURES.values() for kind in sharded.KINDS)
