"""The site that `make docs` builds from docs/, notebooks/ and the docstrings.

Nothing is fetched, no notebook is run.
"""

import inspect
import itertools
import re
from typing import Any

from sphinx.domains.python import PyObject

import jaxmodel

project = "jaxmodel"
author = copyright = "the jaxmodel authors"
version = release = jaxmodel.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.ipynb_checkpoints"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs shown are the stored ones
nb_render_markdown_format = "myst"  # of outputs: tables too

autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields are described where the class is
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "jaxmodel"

SECTION = re.compile(r"(Args|Attributes|Example|Examples|Note|Raises|Returns|Yields):")
ENTRY = re.compile(r"  \S.*?: ")
CODE_OR_MARK = re.compile(
    r"(`+)(?P<code>.+?)\1|(?P<kept>(?<![\w*])\*\w[\w -]*\*(?![\w*]))|(?<!^)(?P<mark>[*|])",
    re.DOTALL,
)


def inline(text: str) -> str:
    """Make reStructuredText of a paragraph whose only markup is `code` and *emphasis*."""
    return CODE_OR_MARK.sub(
        lambda m: f"``{m['code'].strip()}``\\ " if m["code"] else m["kept"] or f"\\{m['mark']}",
        text,
    )


def block(text: str) -> str:
    """Make reStructuredText of the lines between two blank ones: doctests and code stay,
    `name: meaning` becomes a list.
    """
    lines = text.split("\n")
    if any(line.lstrip().startswith(">>>") for line in lines):
        return text
    if all(line.startswith("    ") for line in lines):
        return "::\n\n" + text
    if all(line.startswith("|") for line in lines):
        rows = [
            re.split(r"\s+\|\s+", line.strip("| "))
            for line in lines
            if not line.startswith(("|-", "| -"))
        ]
        cells = [
            f"   {' ' if i else '*'} - {inline(cell)}" for row in rows for i, cell in enumerate(row)
        ]
        return "\n".join([".. list-table::", "   :header-rows: 1", "", *cells])
    for i, (line, following) in enumerate(itertools.pairwise(lines)):
        if line.endswith(":") and not SECTION.fullmatch(line.strip()) and ENTRY.match(following):
            entries = [
                re.sub(r"^(?=\S)", "- ", entry.removeprefix("  ")) for entry in lines[i + 1 :]
            ]
            return inline("\n".join([*lines[: i + 1], "", *entries]))
    return inline(text)


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place, before napoleon reads its sections."""
    blocks = re.split(r"\n{2,}", "\n".join(lines).strip("\n"))
    if what in (
        "attribute",
        "data",
        "property",
    ):  # else napoleon takes the words before a colon for a type
        blocks.insert(0, "..")
    lines[:] = [*"\n\n".join(map(block, blocks)).split("\n"), ""]


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out fields of named tuples and functions that are a field's default: their class
    describes both.
    """
    default = (
        what == "class"
        and callable(obj)
        and getattr(obj, "__name__", "") != name.rpartition(".")[2]
    )
    return (
        True
        if default or (inspect.getdoc(obj) or "").startswith("Alias for field number")
        else None
    )


def readable(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> Any:
    """Write defaults that are made or functions as Python does not: else Sphinx gives up on the
    whole signature.
    """
    if signature is not None:
        named = r"<(?:function |class ')?(?:[\w.]*\.)?(\w+)[^<>]*>"
        signature = re.sub(named, lambda m: "..." if m[1] == "factory" else m[1], signature)
    return signature, returns


def setup(app: Any) -> None:
    """Connect these to autodoc; napoleon comes at priority 500."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings call them
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("autodoc-skip-member", skip)
