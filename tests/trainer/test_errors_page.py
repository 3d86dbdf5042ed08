"""The tables in ``docs/trainer-errors.md``, made of the parameters of the tests in ``test_inputs.py``.

``WRITE_PAGES=1 pytest tests/trainer/test_errors_page.py`` rewrites them.
"""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

from paths import ROOT
from tables import check_page, error_of
from tables import rows as table_rows

from polyak import Evaluator
from tests.trainer import test_inputs as inputs

PAGE = ROOT / "docs" / "trainer-errors.md"


def sources(table: str, column: int) -> list[str]:
    """Return the source of what is given in each row of a table of the tests."""
    for node in ast.parse(Path(inputs.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
            assert isinstance(node.value, ast.List)
            cells = [row.elts[column] for row in node.value.elts if isinstance(row, ast.Tuple)]
            texts = [ast.unparse(cell.body if table == "WRONG_CALL" else cell) for cell in cells]
            return [text.replace("loops.", "").replace("torch.utils.data.", "") for text in texts]
    raise LookupError(table)


def rows(passed: Iterable[str], calls: Iterable[Callable[[], object]]) -> list[str]:
    lines = [(text, error_of(call)) for text, call in zip(passed, calls, strict=True)]
    return table_rows(("what is passed", "what the error says"), lines)


def tables() -> dict[str, list[str]]:
    """Return the lines of each table by name; files are in the current directory."""
    here = Path()

    def keywords(table: str) -> list[str]:
        given = getattr(inputs, table)
        return [f"{name}={text}" for (name, *_), text in zip(given, sources(table, 1), strict=True)]

    def of_trainer(name: str, given: object, **options: object) -> Callable[[], object]:
        return lambda: inputs.build(**{name: inputs.at(here, given)}, **options)

    def of_evaluator(name: str, given: object) -> Callable[[], object]:
        return lambda: Evaluator(**({"label": "x", "dataloader": inputs.DATA} | {name: given}))

    def of_call(call: Callable[[object], object]) -> Callable[[], object]:
        return lambda: call(inputs.build())

    saving = [of_trainer(name, given, save_folder="saved") for name, given, _ in inputs.WRONG_SAVING]
    trainer = [of_trainer(name, given) for name, given, _ in inputs.WRONG]
    evaluator = [of_evaluator(name, given) for name, given, _ in inputs.WRONG_EVALUATOR]
    return {
        "of the trainer": rows([*keywords("WRONG"), *keywords("WRONG_SAVING")], [*trainer, *saving]),
        "of an evaluator": rows(keywords("WRONG_EVALUATOR"), evaluator),
        "of calls": rows(sources("WRONG_CALL", 0), [of_call(call) for call, _ in inputs.WRONG_CALL]),
    }


def test_the_page_has_each_wrong_argument_with_its_error() -> None:
    check_page(PAGE, tables)
