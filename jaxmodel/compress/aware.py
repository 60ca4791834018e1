"""Training that is aware of compression: the loss sees the weights that a recipe would store.

    loss = compress.aware(losses.classification, [(".*/dense|head", "binary()"), (".*", ())])
    state, _ = train.fit(model, stream, config, loss=loss)
    small, report = compress.apply(loss.recipe, state.params, axes=model.axes)

The weights that train stay float32, and get the gradients of the rounded ones (straight-through:
Bengio et al., 2013). So are trained networks of one bit (BinaryConnect: Courbariaux et al., 2015),
of three levels (Li and Liu, 2016; BitNet: Ma et al., 2024), or pruned ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from jaxmodel import rng, tree
from jaxmodel.axes import Axes
from jaxmodel.compress.apply import chains_of, check_leaf, keys_of
from jaxmodel.compress.draft import Draft, draft_of
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.recipes import Recipe, as_recipe
from jaxmodel.compress.stats import names_of, places, stats_of
from jaxmodel.leaves import decode
from jaxmodel.losses import Loss
from jaxmodel.models import Model


def fake(
    recipe: Recipe | tree.Rules,
    params: tree.Params,
    stats: Stats | None = None,
    axes: Axes | None = None,
    key: jax.Array | None = None,
) -> tree.Params:
    """Return the weights that `apply` would store, as arrays, with the gradient of the identity.

    Args:
      recipe: as for `apply`.
      params: the tree.
      stats: as for `apply`.
      axes: as for `apply`.
      key: as for `apply`.

    Returns:
      The tree; segments are split where layers get different chains.

    Raises:
      InputError: as for `apply`.

    >>> params = {"w": jax.numpy.array([[0.5, -3.0, 3.0, 0.1]])}
    >>> fake([("w", "ternary()")], params)["w"].tolist()
    [[0.0, -3.0, 3.0, 0.0]]
    """
    tree.check(params)
    stats = stats or {}
    chains = chains_of(as_recipe(recipe), params, axes)
    where = places(stats, chains)
    names = {layer: names_of(layer, stats, where) for layer in chains}
    split = tree.split(params, {layer: (chains[layer], names[layer]) for layer in chains})

    def one(path: str, leaf: jax.Array) -> jax.Array:
        chain = chains[tree.layer_paths(path)[0]]
        if not chain:
            return leaf
        check_leaf(path, leaf, chain)
        lead = leaf.shape[:-2]
        keys = keys_of(path, lead, key)
        draft = draft_of(chain, leaf, stats_of(path, stats, where) or {}, keys)
        dense = Draft.dense
        for _ in lead:
            dense = jax.vmap(dense)
        plain = decode(leaf)
        return plain + jax.lax.stop_gradient(dense(draft).astype(plain.dtype) - plain)

    return tree.map_leaves(one, split)


@dataclasses.dataclass(frozen=True, eq=False)
class Aware:
    """A loss that sees compressed weights; `aware` makes it.

    Attributes:
      loss: the loss itself.
      recipe: what the weights are compressed by.
      stats: of the inputs, for methods that want them.
    """

    loss: Loss
    recipe: Recipe
    stats: Stats | None = None

    def __call__(
        self,
        model: Model,
        params: tree.Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of the compressed weights; see `losses.Loss`."""
        key = None if rng is None else _key(rng)
        seen = fake(self.recipe, params, self.stats, model.axes, key)
        return self.loss(self.recipe.adapt(model), seen, batch, rng, train=train)


def aware(loss: Loss, recipe: Recipe | tree.Rules, stats: Stats | None = None) -> Aware:
    """Return the loss of the weights that a recipe would store, for training.

    What is drawn (stochastic rounding) is drawn anew in each step.

    Args:
      loss: a loss.
      recipe: as for `apply`.
      stats: as for `apply`; they stay as they are while the weights train.

    Raises:
      InputError: as for `Recipe`.
    """
    return Aware(loss, as_recipe(recipe), stats)


def _key(key: jax.Array) -> jax.Array:
    return rng.fold(key, "aware")
