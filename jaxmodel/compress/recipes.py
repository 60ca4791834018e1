"""Recipes: all that compression does to a model in one value, by name or from text."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from typing import Any

from jaxmodel import ops, tree
from jaxmodel.brief import briefly
from jaxmodel.compress.method import Chain, Method, parse
from jaxmodel.compress.prune.sparsegpt import Sparsegpt
from jaxmodel.compress.quantize.gptq import Gptq
from jaxmodel.compress.quantize.rtn import Rtn
from jaxmodel.compress.quantize.turn import Turn
from jaxmodel.compress.transforms.transform import parse_transforms, write_transforms
from jaxmodel.errors import InputError, unknown
from jaxmodel.models import Model
from jaxmodel.models.foreign import Foreign
from jaxmodel.text_form import write

_CHAIN = "a tuple of methods, or text such as 'magnitude(0.5) | rtn(bits=8)'"
_RULES = "a Recipe, or a list of pairs (pattern, chain); compress.get_recipe finds one by its name"


@dataclasses.dataclass(frozen=True)
class ByRole:
    """The chains that a named recipe applies to a leaf, by the leaf's role (see `jaxmodel.axes`).

    Vectors, statistics and routers stay unchanged: small differences decide which expert a token is
    sent to.

    Attributes:
      matrices: the chain for matrices, including those of experts.
      tables: the chain for tables and heads.
    """

    matrices: Chain
    tables: Chain

    def of(self, role: str) -> Chain:
        """Return the chain for a leaf of this role."""
        kinds = dict.fromkeys(("matrix", "experts"), self.matrices)
        return {**kinds, "table": self.tables, "head": self.tables}.get(role, ())


@briefly
@dataclasses.dataclass(frozen=True)
class Recipe:
    """The complete compression of a model, as one value.

    Functions that take a recipe also take a bare list of rules.

    Attributes:
      rules: path -> chain of methods: a tuple, or its text (see `parse`), stored as a tuple. `()`
        and `""` leave a leaf unchanged. A named recipe is one rule for all leaves, by their roles.
      compute: dtype in which the compressed model computes (`Policy.compute_dtype`): attention and
        its cache, and contractions other than int8; None for no change.
      name: on a bundle's card.
      transforms: what is done to the whole model before: a tuple, or its text (`"rotate() ;
        smooth(0.5)"`), stored as a tuple.

    Raises:
      InputError: rules that are not a list of pairs, an invalid regular expression, a value that is
        not a chain, an invalid dtype, or transforms that cannot be read.

    >>> Recipe([(".*/up", "rtn(4)"), (".*", ())]).texts()
    [['.*/up', 'rtn(bits=4)'], ['.*', '']]
    """

    rules: tree.Rules
    compute: str | None = None
    name: str | None = None
    transforms: Any = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rules, list | tuple):
            raise InputError(f"recipe: {self.rules!r} is given; allowed: {_RULES}")
        object.__setattr__(self, "rules", tuple(map(_rule, self.rules)))
        object.__setattr__(self, "transforms", parse_transforms(self.transforms))
        if self.compute is not None:
            ops.Policy(compute_dtype=self.compute)  # refuses an invalid dtype

    def adapt(self, model: Model) -> Model:
        """Return the model with the recipe's compute dtype; a foreign module stays unchanged."""
        if self.compute is None or isinstance(model.config, Foreign):
            return model
        return model.with_policy(dataclasses.replace(model.policy, compute_dtype=self.compute))

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of inputs that its transforms and methods want.

        >>> get_recipe("smooth(0.5) ; gptq(4)").needs, get_recipe("int8-weight").needs
        (('square', 'gram'), ())
        """
        chains = [
            chain
            for _, value in self.rules
            for chain in ((value.matrices, value.tables) if isinstance(value, ByRole) else (value,))
        ]
        members = (*self.transforms, *itertools.chain.from_iterable(chains))
        return tuple(dict.fromkeys(name for one in members for name in one.needs))

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of what the recipe does, whatever its name: equal for equal recipes.

        >>> one, two = get_recipe("rtn(4)"), get_recipe("rtn( bits = 4 )")
        >>> one.fingerprint == two.fingerprint, one.fingerprint == get_recipe("rtn(5)").fingerprint
        (True, False)
        """
        kinds = [type(pattern).__name__ for pattern, _ in self.rules]
        patterns = [str(pattern) for pattern, _ in self.rules]
        said = [write_transforms(self.transforms), kinds, patterns, self.texts(), self.compute]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def texts(self) -> list[list[str]]:
        """Return the rules as pairs of pattern and text of the chain, for JSON."""
        return [
            [str(pattern), text]
            for pattern, chain in self.rules
            for text in (
                [f"tables: {write(chain.tables)}", write(chain.matrices)]
                if isinstance(chain, ByRole)
                else [write(chain)]
            )
        ]


def as_recipe(recipe: Recipe | tree.Rules) -> Recipe:
    """Make a recipe of rules alone; return a `Recipe` unchanged.

    Raises:
      InputError: as for `Recipe`.
    """
    return recipe if isinstance(recipe, Recipe) else Recipe(recipe)


def _rule(rule: Any) -> tuple[str, Chain | ByRole]:
    if not (isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)):
        raise InputError(f"recipe: {rule!r} is not a pair (pattern, chain); allowed: {_RULES}")
    pattern, value = rule
    at = f"recipe: the rule {str(pattern)!r}"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{at} is not a regular expression: {error}") from None
    if isinstance(value, str):
        try:
            return pattern, parse(value)
        except InputError as error:
            raise InputError(f"{at}: {error}") from None
    if isinstance(value, ByRole):
        return pattern, value
    if isinstance(value, Method):
        raise InputError(f"{at} gives the method {write((value,))} alone; allowed: {_CHAIN}")
    if not isinstance(value, list | tuple):
        raise InputError(f"{at} gives {value!r}, which is not a chain; allowed: {_CHAIN}")
    for method in value:
        if not isinstance(method, Method):
            raise InputError(
                f"{at} gives a chain with {method!r}, which is not a method; allowed: {_CHAIN}"
            )
    return pattern, tuple(value)


def _recipe(
    name: str, blocks: Chain, tables: Chain = (Rtn(8),), compute: str | None = None
) -> Recipe:
    return Recipe(((".*", ByRole(blocks, tables)),), compute, name)


_W8A8 = (Rtn(8, activations="int8"),)

# With tied weights the embedding is also the head, so it is rounded in the same way as the layers.
# If all contractions are int8, the rest (attention and its cache) is computed in bfloat16.
_ALL = (
    _recipe("int8", (Turn(), *_W8A8), (Turn(), *_W8A8), "bfloat16"),
    _recipe("int8-weight", (Rtn(8),)),
    _recipe("int4", (Turn(), Gptq(4, group=64, damping=0.1))),
    _recipe("int4-rtn", (Rtn(4, group=64),)),
    _recipe("sparse50-int8", (Sparsegpt(0.5), *_W8A8), _W8A8, "bfloat16"),
)
RECIPES: dict[str, Recipe] = {str(recipe.name): recipe for recipe in _ALL}
"""Recipes by name.

`int8` also rounds the activations, at run time; `int8-weight` does not. `int4` has symmetric groups
of 64 with float16 scales. `int4` and `sparse50-int8` measure the inputs of the layers; `int4-rtn`
looks at the weights alone, and loses more.
"""


def get_recipe(name: str) -> Recipe:
    """Return the recipe with this name, or make one from text.

    Text is a chain for all matrices; tables (embeddings, positions) and heads are stored in 8 bits.
    Transforms may precede a chain or a name, each with a `;` behind it.

    Raises:
      InputError: neither the name of a recipe nor a chain of methods, or an unknown transform.

    >>> recipe = get_recipe("smooth(0.5) ; int8")
    >>> recipe.transforms, recipe.compute
    ((Smooth(alpha=0.5, online=False),), 'bfloat16')
    """
    if name in RECIPES:
        return RECIPES[name]
    *before, last = name.split(";")
    if before:
        base = get_recipe(last.strip()) if last.strip() else Recipe(((".*", ()),))
        return dataclasses.replace(base, name=name.strip(), transforms=tuple(before))
    if "(" not in name:
        raise unknown("recipe", name, RECIPES)
    return _recipe(name, parse(name))
