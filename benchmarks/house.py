"""What the source looks like: lines by wing, imports, the largest class and function, the calls of one update.

    python benchmarks/house.py [--source src] [--out house.md]

``--source`` is the ``src`` folder of any checkout, also of an earlier one. The calls are those of Python functions in
``optimizer.step()`` with an ``EMA`` attached that updates in each step, less those of a step without it.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CALLS = """
import collections, json, sys
import torch
from polyak import EMA, attach

def calls(with_ema):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attached = attach(EMA(half_life="10ba"), model, optimizer) if with_ema else None
    found = collections.Counter()

    def count(frame, event, arg):
        if event == "call":
            found[frame.f_code.co_filename] += 1

    for counted in [False] * 24 + [True]:  # the first 20 steps are watched for weights that change in between
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        sys.setprofile(count if counted else None)
        optimizer.step()
        sys.setprofile(None)
    assert attached is None or attached.timestamp.batch == 25
    return found

bare = calls(False)
print(json.dumps(calls(True) - bare))
"""


@dataclass(frozen=True)
class Definition:
    """A class or a function, and how many lines it has."""

    lines: int
    name: str
    where: str

    def __str__(self) -> str:
        return f"`{self.name}` ({self.lines} lines, {self.where})"


def wing(path: Path, package: Path) -> str:
    """Return the first folder below the package in which a module is, or its own name at the top."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def definitions(package: Path, *kinds: type[ast.AST]) -> Iterator[Definition]:
    """Yield all classes or functions, nested ones too."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                assert isinstance(node, ast.ClassDef | ast.FunctionDef)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Definition(lines, node.name, str(path.relative_to(package)))


def edges(source: Path) -> int:
    """Return between how many pairs of modules there is an import, by grimp."""
    script = "import grimp; print(grimp.build_graph('polyak', cache_dir=None).count_imports())"
    return int(in_python(source, script))


def calls(source: Path) -> dict[str, int]:
    """Return the calls of Python functions of one update through ``attach``, by file."""
    found: dict[str, int] = json.loads(in_python(source, CALLS))
    return {shown(name, source): number for name, number in sorted(found.items(), key=lambda item: -item[1])}


def shown(name: str, source: Path) -> str:
    """Return a file's name below the source, or below where packages are installed."""
    path = Path(name)
    if path.is_relative_to(source):
        return str(path.relative_to(source))
    return name.rpartition("site-packages/")[2] if "site-packages/" in name else f"Python's {path.name}"


def in_python(source: Path, script: str) -> str:
    """Run a script in a new process that imports the package from ``source``; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def commit(source: Path) -> str:
    """Return the commit that is checked out, and whether files have changed since."""
    done = subprocess.run(
        ["git", "-C", str(source), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def report(source: Path) -> list[str]:
    """Return the lines of the report."""
    package = source / "polyak"
    files = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")}
    by_wing, modules = Counter[str](), Counter[str]()
    for path, lines in files.items():
        by_wing[wing(path, package)] += lines
        modules[wing(path, package)] += 1
    classes = sorted(definitions(package, ast.ClassDef), key=lambda one: -one.lines)
    functions = sorted(definitions(package, ast.FunctionDef), key=lambda one: -one.lines)
    made = calls(source)
    ours = {name: number for name, number in made.items() if name.startswith("polyak")}
    others = {name: number for name, number in made.items() if name not in ours}
    longest = max(files, key=files.__getitem__)
    return [
        f"# The source at {commit(source)}",
        "",
        f"- Lines of Python: {sum(files.values()):,} in {len(files)} files; the longest has {files[longest]} "
        f"({longest.relative_to(package)}).",
        f"- Imports between modules: {edges(source)} pairs.",
        f"- Largest class: {classes[0]}; classes of more than 250 lines: {sum(one.lines > 250 for one in classes)}.",
        f"- Largest function: {functions[0]}; functions of more than 50 lines: "
        f"{sum(one.lines > 50 for one in functions)}.",
        f"- Python calls of one update through `attach`: {sum(ours.values())} in {len(ours)} files of polyak, and "
        f"{sum(others.values())} that these make in torch and Python.",
        "",
        "| wing | lines | files |",
        "| --- | --- | --- |",
        *(f"| {name} | {lines:,} | {modules[name]} |" for name, lines in by_wing.most_common()),
        "",
        "| calls of one update | file |",
        "| --- | --- |",
        *(f"| {number} | {name} |" for name, number in {**ours, **others}.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src")
    parser.add_argument("--out", type=Path, help="a Markdown file; by default it is printed")
    arguments = parser.parse_args()
    text = "\n".join(report(arguments.source.resolve()))
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
