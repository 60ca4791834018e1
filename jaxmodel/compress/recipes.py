"""Named recipes, and recipes from text. A recipe is a rule list: path -> chain of methods."""

from __future__ import annotations

from jaxmodel import tree
from jaxmodel.compress.magnitude import Magnitude
from jaxmodel.compress.method import parse
from jaxmodel.compress.rtn import Rtn
from jaxmodel.errors import unknown

type Recipe = tree.Rules

BLOCKS = "blocks/.*/(q|k|v|o|gate|up|down)"
TABLES = tree.optional("embed|head|positions")


def _recipe(blocks: str, tables: str) -> Recipe:
    return ((BLOCKS, parse(blocks)), (TABLES, parse(tables)), (".*", ()))


NAMED: dict[str, Recipe] = {
    # the embedding is also the head where weights are tied, so its rounding counts as any layer's does
    "int8": ((BLOCKS, (Rtn(8, activations="int8"),)), (TABLES, (Rtn(8, activations="int8"),)), (".*", ())),
    "int8-weight": ((BLOCKS, (Rtn(8),)), (TABLES, (Rtn(8),)), (".*", ())),
    "int4": ((BLOCKS, (Rtn(4, group=64),)), (TABLES, (Rtn(8),)), (".*", ())),
    "sparse50-int8": (
        (BLOCKS, (Magnitude(0.5), Rtn(8, activations="int8"))),
        (TABLES, (Rtn(8, activations="int8"),)),
        (".*", ()),
    ),
}
"""`int8` rounds the activations as they come, `int8-weight` does not; `int4` has symmetric groups of 64 with float16 scales."""

COMPUTE = {"int8": "bfloat16", "sparse50-int8": "bfloat16"}
"""What else is computed in where all contractions are int8: attention and its cache."""


def named(name: str) -> Recipe:
    """The recipe of this name, or one from text: a chain for the matrices of the blocks, with tables in 8 bits.

    Raises:
      InputError: no recipe of this name, and no chain of methods.
    """
    if name in NAMED:
        return NAMED[name]
    if "(" not in name:
        raise unknown("recipe", name, NAMED)
    return _recipe(name, "rtn(bits=8)")
