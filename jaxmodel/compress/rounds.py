"""Pruning in rounds, each with the statistics of what the one before left."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.brief import briefly
from jaxmodel.compress.apply import apply, chains_of, needs_of
from jaxmodel.compress.gradients import OF_LOSS, Loss, observe_gradients
from jaxmodel.compress.method import Chain
from jaxmodel.compress.observe import Stats, observe
from jaxmodel.compress.prune.masks import Pruning
from jaxmodel.compress.recipes import ByRole, Recipe, as_recipe
from jaxmodel.errors import at_least
from jaxmodel.leaves import decode
from jaxmodel.models import Model


@briefly
@dataclasses.dataclass(frozen=True)
class Round:
    """What a round of pruning came to.

    Attributes:
      number: from 1.
      params: the parameters after it.
      zeros: the number of zeros in the leaves that its recipe has a method for.
      pruned: how many of them are new.
    """

    number: int
    params: tree.Params
    zeros: int
    pruned: int


def prune_in_rounds(
    model: Model,
    params: tree.Params,
    recipes: Recipe | tree.Rules | Sequence[Recipe | tree.Rules],
    batches: Sequence[Any],
    *,
    most: int = 100,
    loss: Loss | None = None,
    between: Callable[[tree.Params, Round], tree.Params] | None = None,
    stop: Callable[[Round], bool] | None = None,
    key: jax.Array | None = None,
) -> tuple[tree.Params, list[Round]]:
    """Prune round after round; statistics and gradients are measured anew before each.

    With one recipe whose method has a `threshold`, each round prunes what is below it then, until
    no weight passes: what is pruned changes the gradients of the others. With several, as from
    `gradually` and `bottom_up`, there is a round for each.

    Args:
      model: the model.
      params: its parameters, plain or compressed.
      recipes: one recipe, for all rounds, or one for each.
      batches: inputs of the model, or of the loss for methods that want gradients.
      most: the largest number of rounds with one recipe.
      loss: as for `observe_gradients`.
      between: what follows a round, such as training with `optim.keep`: (params, round) -> params.
      stop: ends the pruning after a round for which it is true. With one recipe a round without
        new zeros always does.
      key: as for `apply`.

    Returns:
      The parameters, and the rounds.

    Raises:
      InputError: as for `observe` and `apply`.

    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(4, (8,), 2))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> recipe = [(".*/dense", "magnitude(threshold=0.1)"), (".*", ())]
    >>> _, rounds = prune_in_rounds(model, params, gradually(recipe, 2), [jnp.ones((3, 4))])
    >>> [round.number for round in rounds]
    [1, 2]
    """
    tree.check(params)
    at_least("most", most)
    single = isinstance(recipes, Recipe) or _is_rules(recipes)
    each: Any = [recipes] * most if single else recipes
    rounds: list[Round] = []
    for number, recipe in enumerate(each, 1):
        chains = chains_of(as_recipe(recipe), params, model.axes)
        before = _zeros(params, chains)
        stats = _measured(model, params, chains, batches, loss)
        params, _ = apply(recipe, params, stats, model.axes, key)
        after = _zeros(params, chains)
        done = Round(number, params, after, after - before)
        if between is not None:
            params = between(params, done)
            done = dataclasses.replace(done, params=params)
        rounds.append(done)
        if (stop is not None and stop(done)) or (single and done.pruned == 0):
            break
    return params, rounds


def gradually(
    recipe: Recipe | tree.Rules, rounds: int, power: float = 3.0, first: float = 0.0
) -> list[Recipe]:
    """Return recipes whose fractions grow to those of `recipe`, for `prune_in_rounds`.

    The fraction of round i of n is `f + (first - f) (1 - i / n)^power` (Zhu and Gupta, 2017).

    Args:
      recipe: the last one.
      rounds: how many; 1 prunes at once.
      power: 3 prunes fast at first ("AGP"); 1 evenly.
      first: the fraction before the first round.

    >>> recipes = gradually([("w", "magnitude(0.8)")], 4)
    >>> [recipe.texts()[0][1] for recipe in recipes]
    ['magnitude(fraction=0.4625)', 'magnitude(fraction=0.7)', 'magnitude(fraction=0.7875)', \
'magnitude(fraction=0.8)']
    """
    at_least("rounds", rounds)

    def at(part: float) -> Recipe:
        def one(method: Any) -> Any:
            if not isinstance(method, Pruning) or method.pattern is not None:
                return method
            last = method.fraction
            fraction = last + (min(first, last) - last) * (1 - part) ** power
            return dataclasses.replace(method, fraction=round(fraction, 9))

        return _changed(as_recipe(recipe), lambda chain: tuple(map(one, chain)))

    return [at(i / rounds) for i in range(1, rounds + 1)]


def bottom_up(recipe: Recipe | tree.Rules, model: Model, params: tree.Params) -> list[Recipe]:
    """Return recipes that each compress one more layer, from the input on.

    For `prune_in_rounds`, which measures each layer in the model whose lower layers are compressed
    already. What stands outside of the blocks follows at the end.

    Args:
      recipe: for all layers.
      model: the model.
      params: its parameters.
    """
    chains = chains_of(as_recipe(recipe), params, model.axes)
    of = lambda layer: layer.split("/")[1] if layer.startswith(f"{tree.BLOCKS}/") else ""
    order = sorted({of(layer) for layer in chains}, key=lambda name: (name == "", name.zfill(9)))
    found = []
    for name in order:
        if any(chains[layer] for layer in chains if of(layer) == name):
            own = [
                (re.escape(layer), chain if of(layer) == name else ())
                for layer, chain in chains.items()
            ]
            found.append(dataclasses.replace(as_recipe(recipe), rules=tuple(own)))
    return found


def _is_rules(recipes: Any) -> bool:
    return bool(recipes) and isinstance(recipes[0], list | tuple) and isinstance(recipes[0][0], str)


def _changed(recipe: Recipe, change: Callable[[Chain], Chain]) -> Recipe:
    rules = [
        (
            pattern,
            ByRole(change(value.matrices), change(value.tables))
            if isinstance(value, ByRole)
            else change(value),
        )
        for pattern, value in recipe.rules
    ]
    return dataclasses.replace(recipe, rules=tuple(rules))


def _zeros(params: tree.Params, chains: dict[str, Chain]) -> int:
    leaves = [
        leaf
        for path, leaf in tree.flatten(params).items()
        if any(chains[layer] for layer in tree.layer_paths(path))
    ]
    return sum(int(jnp.sum(_zeros_of(leaf))) for leaf in leaves)


@jax.jit
def _zeros_of(leaf: Any) -> jax.Array:
    return jnp.sum(decode(leaf, jnp.float32) == 0, axis=(-2, -1), dtype=jnp.int32)


def _measured(
    model: Model,
    params: tree.Params,
    chains: dict[str, Chain],
    batches: Sequence[Any],
    loss: Loss | None,
) -> Stats:
    """Return what the methods want, of the leaves that they are for."""
    wanted = {layer: set(needs_of(chain)) for layer, chain in chains.items()}
    of = lambda names: [layer for layer, some in wanted.items() if some & names]
    inputs = set().union(*wanted.values()) - set(OF_LOSS) if wanted else set()
    found: dict[str, Any] = {}
    if layers := of(inputs):
        paths = "|".join(map(re.escape, layers))
        found = dict(observe(model, params, batches, paths, sorted(inputs)))
    if layers := of(set(OF_LOSS)):
        paths = "|".join(map(re.escape, layers))
        for path, stats in observe_gradients(model, params, batches, paths, loss).items():
            found[path] = {**found.get(path, {}), **stats}
    return found
