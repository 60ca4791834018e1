"""`reads`: which leaves are upstream of which in a model, found by tracing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal

from jaxmodel import tree
from jaxmodel.models.model import Model

_LOOPS = ("scan", "while", "cond")  # what goes in may come out anywhere


class Read(NamedTuple):
    """The upstream leaves of a leaf, by layer path.

    The activations that it meets depend on them.

    Attributes:
      always: at every use of the leaf.
      ever: at its deepest use. For a table that is also the head, these are all layers.
      by: the operations of JAX in which it alone meets activations, such as `mul` for a norm's
        weight, `add` for a bias, `dot_general` for a matrix.
    """

    always: frozenset[str]
    ever: frozenset[str]
    by: frozenset[str]


def reads(model: Model, params: tree.Params | None = None) -> dict[str, Read]:
    """Return the upstream leaves of each leaf that the model reads, by layer path.

    Args:
      model: any; its `apply` is traced once, each layer separately.
      params: or their shapes; None for those of `model.init`.

    >>> from jaxmodel.models import gpt2
    >>> found = reads(gpt2.model(gpt2.SIZES["tiny"]))
    >>> q, o = "blocks/0/attn/q", "blocks/0/attn/o"
    >>> q in found[o].ever, o in found[q].ever
    (True, False)
    >>> "norm/weight" in found["embed"].ever, "norm/weight" in found["embed"].always  # a tied head
    (True, False)
    """
    given = jax.eval_shape(model.init, jax.random.key(0)) if params is None else params
    leaves = dict(sorted(tree.flatten(jax.eval_shape(tree.unstack, given)).items()))

    def run(leaves: dict[str, Any], inputs: Any) -> list[Any]:
        return jax.tree.leaves(model.apply(tree.unflatten(leaves), inputs))

    nowhere = jax.sharding.AbstractMesh((), ())  # on a mesh with stages layers cannot be separate
    with jax.sharding.use_abstract_mesh(nowhere):
        traced = jax.make_jaxpr(run)(leaves, model.inputs(1, 1)).jaxpr
    bits = {path: 2 << i for i, path in enumerate(leaves)}  # 1 stands for the inputs
    seeds = [bits[path] for path, leaf in leaves.items() for _ in jax.tree.leaves(leaf)]
    seeds += [1] * (len(traced.invars) - len(seeds))
    met: dict[int, list[tuple[int, str]]] = {}
    _follow(traced, seeds, met)

    def paths(mask: int) -> frozenset[str]:
        return frozenset(path for path, bit in bits.items() if mask & bit)

    found = {}
    for path, bit in bits.items():
        if uses := met.get(bit):
            always = ever = uses[0][0]
            for use, _ in uses:
                always &= use
                ever |= use
            by = frozenset(name for _, name in uses if name)
            found[path] = Read(paths(always), paths(ever), by)
    return found


def scales(found: Mapping[str, Read], path: str) -> tuple[str, ...]:
    """Return the leaves that scale and shift what a leaf reads, nearest first.

    They are a norm's bias, if it has one, and its weight. The leaves that read the same norm are
    those for which this function names it, so a factor can move between them and the norm.

    Args:
      found: what `reads` returned.
      path: of the leaf that reads.

    Returns:
      Paths of layers; none where another leaf, such as a matrix, is nearer.

    >>> from jaxmodel.models import gpt2
    >>> found = reads(gpt2.model(gpt2.SIZES["tiny"]))
    >>> scales(found, "blocks/1/attn/q"), scales(found, "blocks/1/mlp/down")
    (('blocks/1/attn_norm/bias', 'blocks/1/attn_norm/weight'), ())
    >>> scales(found, "embed")  # as the head
    ('norm/bias', 'norm/weight')
    """
    out: list[str] = []

    def depth(one: str) -> int:  # of its use in front of the leaf; a tied table has another behind
        read = found[one]
        return len(read.always if path in read.ever else read.ever)

    for near in sorted(found[path].ever & found.keys(), key=depth, reverse=True):
        if not found[near].by <= {"add", "mul"}:
            break
        out.append(near)
        if found[near].by == {"mul"}:
            return tuple(out)
    return ()


def _follow(traced: Jaxpr, given: list[int], met: dict[int, list[tuple[int, str]]]) -> list[int]:
    """Return the dependencies of each result, with one bit for each leaf.

    `met` collects, for the bit of a leaf, the dependencies of the activations that it meets, and
    the operation ("" where it comes mixed with other leaves).
    """
    known: dict[Any, int] = dict(zip(traced.invars, given, strict=True))
    of = lambda a: 0 if isinstance(a, Literal) else known.get(a, 0)
    for step in traced.eqns:
        into = [of(a) for a in step.invars]
        inner = [getattr(one, "jaxpr", one) for one in step.params.values()]
        inner = [one for one in inner if isinstance(one, Jaxpr)]
        body = inner[0] if len(inner) == 1 else None
        if body is not None and len(body.invars) == len(into) and step.primitive.name not in _LOOPS:
            out = _follow(body, into, met)
        else:
            whole = 0
            for mask in into:
                whole |= mask
            # operands that do not depend on inputs consist of leaves; here they meet activations
            for mask in {mask for mask in into if whole & 1 and not mask & 1}:
                alone = mask.bit_count() == 1 and step.primitive.name not in _LOOPS
                name = step.primitive.name if alone else ""
                for i in range(mask.bit_length()):
                    if mask >> i & 1:
                        met.setdefault(1 << i, []).append((whole & ~mask, name))
            if step.primitive.name == "scan" and body is not None and whole & 1:
                # what is no leaf's alone may meet the activations in a later turn
                _follow(body, [m if m and not m & 1 else whole for m in into], met)
            out = [whole] * len(step.outvars)
        known |= dict(zip(step.outvars, out, strict=True))
    return [of(a) for a in traced.outvars]
