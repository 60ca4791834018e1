"""Foreign Flax modules as a `Model`: `from_linen`, `from_nnx`.

The weights are a plain nested dict, so rules, freezing, optimisers, checkpoints and meshes work on
them, and everything that needs only a `predict` (evaluation, explanation, trust) takes the model.
Its matrix products are not ours, so there is no dtype policy, no probes and therefore no
calibration, no parts (`embed` is the whole module, the head passes its output on), and no cache.
Compressed leaves are decoded before the module sees them, so a recipe saves bytes, not time.
Kernels are `[in, out]`: a row of a `QTensor`, which has its own scale, belongs to one input; in our
own models it belongs to one output. A bundle is saved with the module's import path, and loaded
with the module given, as in `hub.from_pretrained(folder, module=Net(3))`.

What a module keeps besides parameters (running statistics) is in the branch `state` of the tree. It
has no gradient and does not train (see `tree.partition`); the pure function `set_state` updates it.
Rows that only fill up a batch (`weights` 0) do not count in the moments of `nn.BatchNorm` and
`nnx.BatchNorm`; other means over rows include them.

The contracts that every such model keeps: its tree is a plain nested dict, covered by rules;
`apply` returns what the module returns, also under `jit`, traced once; only the key decides what is
drawn, and a missing key is an error in training; nothing is changed in place; the loss falls; the
state stays; it runs on a mesh, with compressed leaves, and as a `predict`.

>>> import flax.linen as nn
>>> model = from_linen(nn.Dense(3), jax.ShapeDtypeStruct((1, 4), jnp.float32))
>>> params = jax.jit(model.init)(jax.random.key(0))
>>> {path: leaf.shape for path, leaf in tree.flatten(params).items()}
{'bias': (3,), 'kernel': (4, 3)}
>>> jax.jit(model.apply)(params, jnp.ones((2, 4))).logits.shape
(2, 3)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel import leaves, ops, tree
from jaxmodel.axes import UNDECLARED, Axes
from jaxmodel.errors import InputError
from jaxmodel.leaves.adapted import read_adapters
from jaxmodel.models.checks import runs_on
from jaxmodel.models.counted import linen_counting, nnx_counting
from jaxmodel.models.model import COUNTS, Inputs, Model, read
from jaxmodel.models.parts import Parts
from jaxmodel.ops.norms import BatchStatsProbe
from jaxmodel.rng import fold

STATE = "state"
"""The branch of the tree with everything that is not a parameter."""

_FLAGS = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
}  # name -> whether it is the opposite

type Call = Callable[[Any, dict[str, jax.Array], bool], Any]
type Example = (
    jax.Array
    | jax.ShapeDtypeStruct
    | Mapping[str, Any]
    | Callable[[int, int], dict[str, jax.ShapeDtypeStruct]]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Foreign:
    """The config of a foreign model.

    Attributes:
      module: a Linen module, an nnx module (of shapes), or a function that makes one.
      run: (params, inputs, rng, train, counts) -> (output, the state afterwards); counts marks the
        rows that count, or is None.
      inputs: (name, shape, dtype) of each input, or a function that returns their shapes.
      rngs: the names of a Linen module's random streams.
      own_call: whether the module is not simply called with its inputs in order.
    """

    module: Any
    run: Callable[..., tuple[jax.Array, tree.Params]] = dataclasses.field(repr=False)
    inputs: Any = dataclasses.field(default=(), repr=False)
    rngs: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    own_call: bool = dataclasses.field(default=False, repr=False)


def is_linen(module: Any) -> bool:
    """Return whether an object is a Linen module or a class of such."""
    return isinstance(module, nn.Module) or (
        inspect.isclass(module) and issubclass(module, nn.Module)
    )


def from_linen(
    module: Any,
    inputs: Example,
    *,
    call: Call | None = None,
    rngs: tuple[str, ...] = ("dropout",),
    axes: Axes = UNDECLARED,
) -> Model:
    """Make a `Model` of a Linen module.

    Equal arguments, including a hashable module, give the same functions, so nothing is traced
    twice (`nn.Sequential` is hashable with a tuple, not with a list).

    Args:
      module: a Linen module as its author wrote it. Collections besides `params` become the tree's
        branch `state`.
      inputs: the inputs of the module: an array or shape with the batch in front, a dict of such,
        or a function `(batch, length) -> shapes`. The order of the dict is that of the module's
        arguments; batches are matched by name.
      call: `(module, inputs, train) -> logits`, if the module is not simply called with its inputs
        in that order. By default an argument of the module named train, training, is_training or
        deterministic is set accordingly.
      rngs: the names of the random streams that it draws from, besides `params`.
      axes: the axes of its leaves, if something is to be derived from them:
        `Axes((("Dense_0/kernel", "DF"), (".*", "...")))`.

    Returns:
      The model; weights that exist already are `{**variables["params"], "state": other
      collections}`, see `linen_params`.

    Raises:
      InputError: `module` is no Linen module, or `inputs` has another form; when the model is run,
        the output is not an array, or an `rng` is needed and missing.
    """
    if not isinstance(module, nn.Module):
        raise InputError(
            f"module: {module!r} given; allowed: an instance of a Linen module, such as nn.Dense(3)"
        )
    shapes = _shapes(inputs)
    call = call or _Call(_names(shapes), *_flag(type(module).__call__))
    arguments = (module, shapes, call, rngs, axes)
    try:
        hash(arguments)
    except TypeError:  # the module has an attribute that cannot be hashed
        return _linen.__wrapped__(*arguments)
    return _linen(*arguments)


def from_nnx(
    module: Any, inputs: Example, *, call: Call | None = None, axes: Axes = UNDECLARED
) -> Model:
    """Make a `Model` of an nnx module.

    The module is split into weights and a description and merged in every call, so that nothing is
    changed in place. Keep the model: another call of `from_nnx` gives other functions, which are
    traced anew.

    Args:
      module: a function that makes a module from its random streams, `functools.partial(Net, 4, 3)`
        for `Net(4, 3, rngs=rngs)`; or a module, whose weights `init` then returns, whatever the
        key.
      inputs: see `from_linen`.
      call: `(module, inputs, train) -> logits`, if the module is not simply called with its inputs
        in order. `module.train()` or `module.eval()` is called before.
      axes: see `from_linen`.

    Returns:
      The model; weights of a module that exists already are `nnx_params(module)`.

    Raises:
      InputError: `module` is not a module and makes none, `inputs` has another form, or the module
        has a cache; when it is run, see `from_linen`.

    >>> from flax import nnx
    >>> x = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    >>> model = from_nnx(functools.partial(nnx.Linear, 4, 3), x)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    {'bias': (3,), 'kernel': (4, 3)}
    >>> jax.jit(model.apply)(params, jnp.ones((2, 4))).logits.shape
    (2, 3)
    """
    from flax import nnx

    made = isinstance(module, nnx.Module)
    make = module
    if not made and not callable(module):
        raise InputError(
            f"module: {module!r} given; allowed: an nnx module, or a function that makes one from "
            "`rngs`"
        )
    if made:
        graph, values = nnx.split(module)
        make: Any = lambda rngs: nnx.merge(graph, values)
    shell = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    # path -> variable, without values
    kinds = dict(nnx.to_flat_state(nnx.split(shell)[1]))
    for path, kind in kinds.items():
        if isinstance(kind, nnx.Cache):
            raise InputError(
                f"module: {'/'.join(map(str, path))!r} is a cache; allowed: a module that keeps "
                f"nothing between calls"
            )
    graphs = {}
    for train in (True, False):
        shell.train() if train else shell.eval()
        graphs[train] = nnx.split(shell)[0]
    drawn = [path for path, kind in kinds.items() if isinstance(kind, nnx.RngState)]
    streams = [path for path in drawn if isinstance(kinds[path], nnx.RngKey)]
    shapes = _shapes(inputs)
    own_call = call is not None
    call = call or _Call(_names(shapes))

    def run(
        params: tree.Params, inputs: dict[str, jax.Array], rng: Any, train: bool, counts: Any = None
    ) -> tuple[jax.Array, tree.Params]:
        if train and streams and rng is None:
            raise _no_rng("its random streams")
        stored = tree.flatten(_plain(params))
        key = jax.random.key(0) if rng is None else rng
        values = []
        for path, kind in kinds.items():
            if path in drawn:
                value = (
                    _stream(kind, key, streams.index(path))
                    if path in streams
                    else jnp.zeros_like(kind.get_value())
                )
            else:
                value = stored[_joined(path if isinstance(kind, nnx.Param) else (STATE, *path))]
            values.append((path, kind.replace(value) if isinstance(kind, nnx.Variable) else value))
        merged = nnx.merge(graphs[train], nnx.from_flat_state(values))
        nnx_counting(merged, counts if train else None)
        out = _array(call(merged, inputs, train))
        return out, nnx_params(merged).get(STATE, {})

    def init(key: jax.Array) -> tree.Params:
        return nnx_params(make(rngs=nnx.Rngs(key)))

    return _model(Foreign(module, run, shapes, own_call=own_call), init, shapes, axes)


def linen_params(variables: Mapping[str, Any]) -> tree.Params:
    """Return the tree of the variables of a trained Linen module.

    Raises:
      InputError: a parameter named `state`, or a name with a slash.
    """
    plain = nn.meta.unbox(flax.core.unfreeze(dict(variables)))
    state = {
        name: collection for name, collection in plain.items() if name != "params" and collection
    }
    return _checked(plain.get("params", {}), state)


def nnx_params(module: Any) -> tree.Params:
    """Return the tree of an nnx module's weights, without its random streams.

    Raises:
      InputError: a parameter named `state`, or a name with a slash.
    """
    from flax import nnx

    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for path, kind in nnx.to_flat_state(nnx.split(module)[1]):
        if not isinstance(kind, nnx.RngState):
            value = kind.get_value() if isinstance(kind, nnx.Variable) else kind
            (weights if isinstance(kind, nnx.Param) else state)[_joined(path)] = value
    return _checked(tree.unflatten(weights), tree.unflatten(state))


def set_state(
    model: Model, params: tree.Params, inputs: Inputs, rng: jax.Array | None = None
) -> tree.Params:
    """Return the params with the state that the module has after a batch in training.

    Running statistics are updated with the module's own momentum.

    Args:
      model: a model of `from_linen` or `from_nnx`.
      params: its weights.
      inputs: a batch.
      rng: the key for its random streams.

    Raises:
      InputError: the model is of another kind.
    """
    if not isinstance(model.config, Foreign):
        raise InputError(
            f"model: a config of {type(model.config).__module__} given; allowed: one of "
            f"from_linen or from_nnx"
        )
    with runs_on(model, params):
        if STATE not in params:
            return params
        inputs = (
            dict(inputs)
            if isinstance(inputs, Mapping)
            else {next(iter(model.inputs(1, 1))): inputs}
        )
        return {**params, STATE: model.config.run(params, inputs, rng, True)[1]}


# ------------------------------------------------------------------------------------------- inside


@functools.cache
def _linen(module: nn.Module, shapes: Any, call: Call, rngs: tuple[str, ...], axes: Axes) -> Model:
    def run(
        params: tree.Params, inputs: dict[str, jax.Array], rng: Any, train: bool, counts: Any = None
    ) -> tuple[jax.Array, tree.Params]:
        plain = _plain(params)
        state = plain.pop(STATE, {})
        keys = {} if rng is None else {name: fold(rng, name) for name in rngs}
        method = lambda module: call(module, inputs, train)
        variables = {"params": plain, **state}
        try:
            with linen_counting(counts if train else None):
                if train and state:  # the module would store its state; it is returned instead
                    out, kept = module.apply(
                        variables, rngs=keys, method=method, mutable=list(state)
                    )
                else:
                    out = module.apply(variables, rngs=keys, method=method)
                    kept = state
        except flax.errors.ScopeParamShapeError as error:
            given = ", ".join(f"{name} {list(a.shape)}" for name, a in inputs.items())
            raise InputError(
                f"inputs: {given} given; they do not fit the module: "
                f"{str(error).split(' (https')[0]}"
            ) from None
        except flax.errors.InvalidRngError as error:
            raise _no_rng(str(error).split(" (https")[0]) if rng is None else error from None
        return _array(out), nn.meta.unbox(flax.core.unfreeze(kept))

    def init(key: jax.Array) -> tree.Params:
        keys = {"params": key, **{name: fold(key, name) for name in rngs}}
        zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in _inputs(shapes, 1, 1).items()}
        return linen_params(module.init(keys, method=lambda module: call(module, zeros, False)))

    return _model(
        Foreign(module, run, shapes, rngs, not isinstance(call, _Call)), init, shapes, axes
    )


def _model(
    config: Foreign, init: Callable[[jax.Array], tree.Params], shapes: Any, axes: Axes
) -> Model:
    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        if cache is not None:
            raise InputError("cache: given to a foreign module, which has none; allowed: None")
        state = tree.flatten(params.get(STATE, {}))
        counts = inputs.get(COUNTS)
        inputs = {name: a for name, a in inputs.items() if name != COUNTS}
        if watched := {
            path: leaf.zeros for path, leaf in state.items() if isinstance(leaf, BatchStatsProbe)
        }:
            plain = {path: leaf.mean if path in watched else leaf for path, leaf in state.items()}
            key = jax.random.key(0) if rng is None else rng
            out, kept = config.run(
                {**params, STATE: tree.unflatten(plain)}, inputs, key, True, counts
            )
            kept = tree.flatten(jax.lax.stop_gradient(kept))
            return _kept(out, {path: kept[path] for path in watched}, watched), {}
        if state:
            params = {**params, STATE: jax.lax.stop_gradient(params[STATE])}
        return config.run(params, inputs, rng, train, counts)[0], {}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        return x.astype(jnp.float32)

    def with_policy(policy: ops.Policy) -> Model:
        if policy != model.policy:
            raise InputError(
                f"policy: {policy} given; allowed: {model.policy}, because a foreign module sets "
                "its own dtypes"
            )
        return model

    inputs = functools.partial(_inputs, shapes)
    model = Model(
        config,
        ops.Policy(),
        init,
        Parts(embed, None, head),
        inputs,
        None,
        axes,
        with_policy=with_policy,
    )
    return model


@jax.custom_vjp
def _kept(out: jax.Array, kept: dict[str, jax.Array], zeros: dict[str, jax.Array]) -> jax.Array:
    """Return the output, with a gradient of the zeros that is the module's state.

    It is the state in training, times the number of rows that it was measured on.
    """
    return out


def _kept_backward(saved: Any, g: jax.Array) -> Any:
    kept = {
        path: {"count": jnp.float32(len(g)), "kept": len(g) * a.astype(jnp.float32)}
        for path, a in saved.items()
    }
    return g, None, kept


_kept.defvjp(lambda out, kept, zeros: (out, kept), _kept_backward)


def _shapes(inputs: Example) -> Any:
    """Return a hashable form: the function, or (name, shape, dtype) of each input."""
    if callable(inputs):
        return inputs
    named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
    for name, a in named.items():
        if not hasattr(a, "shape") or not hasattr(a, "dtype") or not a.shape:
            raise InputError(
                f"inputs: {name} is {a!r}; allowed: an array or shape with the batch in front"
            )
    return tuple((name, tuple(a.shape), jnp.dtype(a.dtype)) for name, a in named.items())


def _inputs(shapes: Any, batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    if callable(shapes):
        return shapes(batch, length)  # pyright: ignore[reportReturnType]
    return {name: jax.ShapeDtypeStruct((batch, *shape[1:]), dtype) for name, shape, dtype in shapes}


def _names(shapes: Any) -> tuple[str, ...]:
    return tuple(_inputs(shapes, 1, 1))


def _flag(function: Callable[..., Any]) -> tuple[str | None, bool]:
    """Return the argument by which a module knows whether it trains, and whether it is inverted."""
    found = [name for name in inspect.signature(function).parameters if name in _FLAGS]
    return (found[0], _FLAGS[found[0]]) if found else (None, False)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a module with its inputs in the order of these names.

    It is a dataclass, so that equal calls are equal. The order is not that of the batch, because
    JAX sorts the keys of a dict that passes through `jit`.
    """

    names: tuple[str, ...]
    flag: str | None = None
    opposite: bool = False

    def __call__(self, module: Any, inputs: dict[str, jax.Array], train: bool) -> Any:
        flags = {} if self.flag is None else {self.flag: train is not self.opposite}
        return module(*(read(inputs, name) for name in self.names), **flags)


def _plain(params: tree.Params) -> tree.Params:
    """Return a tree as the module knows it: separate layers, plain arrays."""

    def plain(path: str, leaf: Any) -> jax.Array:
        if isinstance(leaf, ops.Probe):
            raise InputError(
                f"params: {path!r} is a probe, which a foreign module cannot measure; allowed: "
                "models of the package"
            )
        if isinstance(leaf, leaves.Adapted) and leaf.key is not None:
            raise InputError(
                "dropout: given for adapters of a foreign module; allowed: LoRA(dropout=0), "
                "because the module runs as a whole"
            )
        return leaves.decode(leaf)

    return tree.map_leaves(plain, read_adapters(tree.unstack(params)))


def _array(out: Any) -> jax.Array:
    if not isinstance(out, jax.Array) or not jnp.issubdtype(out.dtype, jnp.floating):
        given = (
            f"{out.dtype}{list(out.shape)}" if isinstance(out, jax.Array) else type(out).__name__
        )
        raise InputError(
            f"module: it returns {given}; allowed: one floating-point array [B, ...]; select it "
            "with `call`"
        )
    return out


def _joined(path: tuple[Any, ...]) -> str:
    """Return the path of an nnx leaf as one of ours."""
    return "/".join(map(_slashless, map(str, path)))


def _stream(kind: Any, key: jax.Array, i: int) -> jax.Array:
    """Return a key for the i-th random stream; an array of keys if the module has split it."""
    one = jax.random.fold_in(key, i)
    shape = kind.get_value().shape
    return jax.random.split(one, shape) if shape else one


def _checked(params: tree.Params, state: tree.Params) -> tree.Params:
    if STATE in params:
        raise _taken()
    whole = {**params, STATE: state} if state else params
    for name in _keys(whole):
        _slashless(name)
    return whole


def _slashless(name: str) -> str:
    if "/" in name:
        raise InputError(
            f"module: the name {name!r} has a slash, which separates the keys of a path; allowed: "
            "names without slashes"
        )
    return name


def _keys(node: Any) -> list[str]:
    return (
        []
        if tree.is_leaf(node)
        else [key for name, child in node.items() for key in (name, *_keys(child))]
    )


def _taken() -> InputError:
    return InputError(
        f"module: a part of it is named {STATE!r}; allowed: any other name, because that branch "
        "holds what is not a parameter"
    )


def _no_rng(what: str) -> InputError:
    return InputError(
        f"rng: None given in training; allowed: a key, because the module draws from "
        f"{' '.join(what.split())}"
    )
