"""`jaxmodel methods`: what texts of recipes and options may name."""

from __future__ import annotations

import textwrap
from typing import Any

from jaxmodel.cli.options import Methods
from jaxmodel.errors import one_of

KINDS = {
    "recipe": "for --recipe",
    "method": "in chains: 'magnitude(0.5) | rtn(8)', for --recipe and --rule",
    "transform": "in front of a chain or a recipe: 'rotate() ; gptq(4)', for --recipe",
    "range": "for the setting range of methods: rtn(4, range='mse')",
    "augment": "for train --augment",
}
"""What is listed, and where it is given."""


def run(options: Methods, folder: Any) -> list[dict[str, Any]]:
    """Return all members of the kinds, or those that are named."""
    from jaxmodel import compress, text_form
    from jaxmodel.data import augment

    assert augment  # it makes its members known
    rows: list[dict[str, Any]] = []
    for name, recipe in compress.RECIPES.items():
        said = [text if at == ".*" else f"{at}: {text}" for at, text in recipe.texts()]
        says = "; ".join((*map(str, recipe.transforms), *reversed(said)))
        rows.append({"kind": "recipe", "name": name, "form": name, "says": says})
    for kind, base in text_form.KINDS.items():
        if kind in KINDS:
            found = text_form.members(base)
            rows += [{"kind": kind, **text_form.entry(cls)} for _, cls in sorted(found.items())]
    if not options.name:
        return rows
    one_of("NAME", options.name, sorted({*KINDS, *(row["name"] for row in rows)}))
    return [row for row in rows if options.name in (row["kind"], row["name"])]


def show(result: list[dict[str, Any]], console: Any) -> None:
    """Print a line for each, or the settings of a few."""
    # a name or a kind was given
    whole = min(len({row[key] for row in result}) for key in ("kind", "name")) == 1
    width = max(60, min(console.width, 100))
    write = lambda text, first="", rest="": console.print(
        textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for kind, where in KINDS.items():
        own = [row for row in result if row["kind"] == kind]
        if not own:
            continue
        write(f"{kind}, {where}")
        for row in own:
            write(f"{row['form'] if whole else row['name']}: {row['says']}", "  ", "      ")
            for setting in row.get("settings", ()) if whole else ():
                allowed = f" ({setting['allowed']})" if setting["allowed"] else ""
                write(
                    f"{setting['name']}: {setting['says'].rstrip('.')}{allowed}", "      ", " " * 10
                )
        console.print()
    if not whole:
        write("`jaxmodel methods NAME` shows the settings.")
