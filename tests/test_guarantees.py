"""The table of the guarantees of each integration in docs/integrations.md, made from the contract's tests.

``python tests/test_guarantees.py`` writes it.
"""

import ast
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from host_contract import CAPABILITIES, why_not

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "integrations.md"
HOSTS = {
    "native": "[`Trainer`](trainer.md)",
    "plain": "[plain loop](hosts/plain.md)",
    "transformers": "[Transformers](hosts/transformers.md)",
    "accelerate": "[Accelerate](hosts/accelerate.md)",
    "lightning": "[Lightning](hosts/lightning.md)",
    "fabric": "[Fabric](hosts/fabric.md)",
    "ignite": "[Ignite](hosts/ignite.md)",
    "composer": "[Composer](hosts/composer.md)",
}
NOT = "what-it-does-not-do"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not here")


@functools.cache
def lacks(name: str) -> Mapping[str, str]:
    """Return the capabilities that an integration lacks, read from its test file without importing the framework."""
    tree = ast.parse((ROOT / "tests" / "hosts" / f"test_{name}.py").read_text(encoding="utf-8"))
    (found,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "lacks"
    )
    return ast.literal_eval(found)


def table() -> str:
    def cell(name: str, capability: str) -> str:
        return f"[no](hosts/{name}.md#{NOT})" if why_not(capability, lacks(name)) else "yes"

    lines = [["", *HOSTS.values()], ["---", *(":---:" for _ in HOSTS)]]
    lines += [[text, *(cell(name, key) for name in HOSTS)] for key, text in CAPABILITIES.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def test_the_table_of_integrations_says_what_the_contract_holds_each_to() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_each_integration_that_is_tested_is_in_the_table() -> None:
    assert {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests" / "hosts").glob("*.py")
        if "lacks" in path.read_text()
    } == HOSTS.keys()


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "native"])
def test_the_page_of_an_integration_says_what_it_lacks_and_why(name: str) -> None:
    page = " ".join((ROOT / "docs" / "hosts" / f"{name}.md").read_text(encoding="utf-8").split()).replace("`", "")
    _, heading, missing = page.partition("## What it does not do")
    assert heading
    for reason in lacks(name).values():
        assert reason in missing


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "native"])
def test_the_page_of_an_integration_has_a_complete_script_of_less_than_forty_lines(name: str) -> None:
    page = (ROOT / "docs" / "hosts" / f"{name}.md").read_text(encoding="utf-8")
    scripts = re.findall("```python\n(.*?)```", page, re.DOTALL)
    assert "import" in scripts[0]
    assert all(sum(bool(line.strip()) for line in script.splitlines()) < 40 for script in scripts)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"^\|  \| \[`Trainer.*?\n\n", lambda _: table() + "\n", text, flags=re.S | re.M))
