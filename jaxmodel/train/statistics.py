"""`set_batch_statistics`: what batch norms normalise by in inference, measured on data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import ops, tree
from jaxmodel.errors import InputError, at_least
from jaxmodel.models import Inputs, Model
from jaxmodel.report import progress

type Batches = Iterable[Inputs | np.ndarray | Mapping[str, np.ndarray]]
type Sums = dict[str, dict[str, jax.Array]]  # path of a mean -> count, sum, square


def set_batch_statistics(model: Model, params: tree.Params, batches: Batches, *, passes: int = 1) -> tree.Params:
    """`params` with the mean and the variance of every batch norm's input over all the data.

    They are those of all rows together, whatever batches these come in: not an average that moves while the weights do, and no
    state of the model (Wu & Johnson, 2021). Nothing is dropped meanwhile. What reaches a norm depends on how those in front of it
    normalise: in the first pass by each batch itself, as in training; in every further pass by the statistics found so far. So
    one batch of all the data is exact at once, and with smaller ones each pass makes another norm exact, from the first on.

    Args:
      model: with batch norms: leaves `X/mean` and `X/variance`.
      params: its parameters.
      batches: inputs of `model.apply`, of one shape if possible (each shape compiles once); a list if there are several passes.
        Labels among them are not read, so a training stream serves: `(stream.batch(i) for i in range(20))`.
      passes: over the batches.

    Returns:
      The tree with other `mean` and `variance` leaves, where they lay.

    Raises:
      InputError: no batch norm in the tree, no batches (or an iterator that is empty in the second pass), or a norm that is not
        used.

    >>> from jaxmodel.models import resnet
    >>> model = resnet.model(resnet.Config((1,), 2, classes=2, size=4, small=True))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> pixels = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    >>> final = set_batch_statistics(model, params, [pixels])
    >>> logits = jax.jit(lambda params, train: model.apply(params, pixels, train=train).logits, static_argnums=1)
    >>> bool(jnp.allclose(logits(final, False), logits(params, True), atol=1e-4))  # as in training, of a batch of all data
    True
    """
    at_least("passes", passes)
    found = [path.removesuffix("/variance") for path in tree.flatten(params) if path.endswith("/variance")]
    if not found:
        raise InputError("params: no batch norm is there; a leaf .../variance is needed")
    for number in range(passes):
        measure, total = _measure(model, tuple(found), number == 0), None
        for inputs in progress(batches, "batch statistics"):
            if number == 0 and total is None:  # a first mean to take the sums around: see `ops.Measured`
                params = _with(params, _float64(measure(params, inputs)))
            sums = _float64(measure(params, inputs))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        if total is None:
            raise InputError(f"batches: there is none in pass {number + 1}; a list of at least one is needed")
        params = _with(params, total)
    return params


@functools.lru_cache(maxsize=16)
def _measure(model: Model, norms: tuple[str, ...], own: bool) -> Callable[[tree.Params, Any], Sums]:
    """The sums of one batch, by the path of each norm: the gradient of zeros, as `compress.observe` takes it."""

    @jax.jit
    def measure(params: tree.Params, inputs: Inputs) -> Sums:
        leaves = tree.flatten(params)

        def loss(zeros: Sums) -> jax.Array:
            probed = {f"{norm}/mean": ops.Measured(leaves[f"{norm}/mean"], zeros[norm], own=own) for norm in norms}
            return jnp.sum(model.apply(tree.unflatten({**leaves, **probed}), inputs).logits)

        zeros = {}
        for norm in norms:
            mean = leaves[f"{norm}/mean"]
            zero = jnp.zeros(mean.shape, jnp.float32)
            zeros[norm] = {"count": zero[..., 0], "sum": zero, "square": zero}
        return jax.grad(loss)(zeros)

    return measure


def _float64(sums: Sums) -> Mapping[str, Mapping[str, Any]]:
    """On the host, where sums over many batches lose nothing."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(sums))


def _with(params: tree.Params, sums: Mapping[str, Mapping[str, Any]]) -> tree.Params:
    leaves = tree.flatten(params)
    for norm, one in sums.items():
        if not np.all(one["count"] > 0):
            raise InputError(f"params: the norm {norm!r} was never reached; is it used?")
        count = one["count"][..., None]
        shift, old = one["sum"] / count, leaves[f"{norm}/mean"]
        spread = np.maximum(one["square"] / count - shift**2, 0)
        for name, value in (("mean", np.asarray(old, np.float64) + shift), ("variance", spread)):
            leaf = leaves[f"{norm}/{name}"]
            leaves[f"{norm}/{name}"] = jax.device_put(value.astype(leaf.dtype), getattr(leaf, "sharding", None))
    return tree.unflatten(leaves)
