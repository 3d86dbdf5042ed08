"""The site of the documentation: Sphinx reads the Markdown of this folder, and the docstrings of the package."""

import re
from typing import Any

import polyak

project = "polyak"
author = "the polyak authors"
release = polyak.__version__
html_title = f"polyak {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # links such as page.md#heading
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["polyak.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Nothing is fetched when the site is built, so names of other packages lead nowhere; private modules are not listed.
nitpick_ignore_regex = [("py:.*", r"(?!polyak\.[A-Z]\w*$).*")]


def _escape(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let ``|x|`` in a docstring be a norm, not a substitution."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line) for line in lines]


def _download_results(app: object, page: str, text: list[str]) -> None:
    """Let links to the results of benchmarks, which are no pages of the site, download them."""
    text[0] = re.sub(r"\[([^]]*)\]\(([./]*/benchmarks/results/[\w.]+)\)", r"{download}`\1 <\2>`", text[0])


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _escape)
    app.connect("source-read", _download_results)
