"""The site: MyST Markdown pages that run their own code, and an API page made from the docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from docutils import nodes
from sphinx.directives.code import LiteralInclude

import llsa_np

project = "llsa-np"
author = "The llsa-np developers"
project_copyright = author
version = release = llsa_np.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", ".jupyter_cache", "jupyter_execute"]
html_theme = "furo"
html_title = "llsa-np"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["tellings.css"]

# Every page runs on every build, and a page whose code fails is a build that fails.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_show_tb = True
nb_merge_streams = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Types are told in the docstrings' prose, together with the shapes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "py:obj"
python_maximum_signature_line_length = 88


def prose_to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings here are plain prose with formulas in it: `**`, `|` and `_` mean themselves, and an argument's `name:`
    begins its description."""
    arguments = "|".join(inspect.signature(obj).parameters) if what in ("function", "method", "class") else ""
    described = re.compile(rf"(^|(?<=[.;] ))((?:{arguments})(?:, (?:{arguments}))*):") if arguments else None

    told: list[str] = []
    for line in lines:
        if re.match(r"(Returns|Raises|Source:|Attributes:)", line):  # each begins a paragraph of its own
            told.append("")
        parts = re.split(r"(`[^`]+`)", line)
        for i, part in enumerate(parts):
            if i % 2 == 0:  # not code
                escaped = re.sub(r"([*|_\\])", r"\\\1", part)
                parts[i] = described.sub(r"\1**\2**:", escaped) if described else escaped
        told.append("".join(parts))
    lines[:] = told


class Telling(LiteralInclude):
    """literalinclude, whose `:dedent:` leaves lines of the preprocessor aside: those of C++ stand at the margin."""

    def run(self) -> list[nodes.Node]:
        included = super().run()
        if self.options.get("language") == "cuda" and "dedent" in self.options:
            for block in (block for node in included for block in node.findall(nodes.literal_block)):
                lines = block.astext().split("\n")
                code = textwrap.dedent("\n".join("" if line.startswith("#") else line for line in lines)).split("\n")
                text = "\n".join(old if old.startswith("#") else new for old, new in zip(lines, code))
                block.rawsource = text
                block.children = []
                block += nodes.Text(text)
        return included


def setup(app: Any) -> None:
    app.add_directive("literalinclude", Telling, override=True)
    app.connect("autodoc-process-docstring", prose_to_rst)
