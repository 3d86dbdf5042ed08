"""``polyak env``: versions, devices, and which kernel averages, and why."""

import json
import os

import pytest
import torch
import warm

import polyak
from polyak import kernels
from polyak.cli import main


def test_env_prints_versions_devices_threads_and_kernels(capsys) -> None:
    assert main(["env", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["versions"]["polyak"] == polyak.__version__
    assert plain["versions"]["torch"] == torch.__version__
    assert plain["optional"]["rich"]
    assert plain["devices"][0]["type"] == "cpu"
    assert plain["threads"]["torch"] == torch.get_num_threads()
    serving = [name for name, reason in plain["kernels"]["cpu"].items() if reason is None]
    assert serving == kernels.serving_cpu()
    assert plain["kernels"]["cpu"]["triton"] == "it is for cuda"
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in out
    assert "triton does not serve: it is for cuda" in " ".join(out.split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("torch", "c does not serve: POLYAK_KERNEL begins with torch"), ("fast", "there is no kernel of this name")],
)
def test_env_says_what_polyak_kernel_leads_to_also_where_nothing_else_runs(name, expected) -> None:
    done = warm.run("-m", "polyak", "env", env=os.environ | {"POLYAK_KERNEL": name, "COLUMNS": "200"})
    assert done.returncode == 0
    assert expected in done.stdout
    assert f"POLYAK_KERNEL   {name}" in done.stdout
