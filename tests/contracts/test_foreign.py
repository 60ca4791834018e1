"""The smaller set of laws that somebody else's Flax module keeps as a `Model`: what needs no matrix
product of ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmodel import adapt, compress, data, hub, leaves, ops, sharding, train, tree
from jaxmodel.models import Model, from_linen, from_nnx, linen_params, nnx_params, predict_fn, wrap
from jaxmodel.models.foreign import set_state
from jaxmodel.models.model import token_inputs
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

KEY = jax.random.key(0)
PIXELS = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)

# --------------------------------------------------------------------- modules as others write them


class LinenNet(nn.Module):
    """Convolution, running statistics, dropout, an argument `train`."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(
            nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Conv(4, (3, 3))(x))
        )
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(3, name="head")(x)


class LinenText(nn.Module):
    """Reads tokens, gives several things."""

    @nn.compact
    def __call__(self, tokens, deterministic: bool = True):
        x = nn.Embed(11, 8)(tokens)
        x = nn.Dropout(0.1, deterministic=deterministic)(x)
        return {"logits": nn.Dense(11)(x), "hidden": x}


class LinenTwo(nn.Module):
    """Two inputs, modules made in setup."""

    def setup(self):
        self.left = nn.Dense(4)
        self.right = nn.Dense(4)
        self.top = nn.Dense(3)

    def __call__(self, a, b):
        return self.top(jnp.tanh(self.left(a) * self.right(b)))


class NnxBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.linear(x))))


class NnxNet(nnx.Module):
    """Blocks in a list, running statistics, random streams, an array that is no parameter."""

    def __init__(self, rngs, depth: int = 2):
        self.first = nnx.Linear(128, 16, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(16, rngs) for _ in range(depth)])
        self.head = nnx.Linear(16, 3, rngs=rngs)
        self.shift = nnx.data(jnp.full((16,), 0.25))

    def __call__(self, x):
        x = self.first(x.reshape(x.shape[0], -1)) + jnp.broadcast_to(self.shift, (x.shape[0], 16))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A foreign model and what its author would have written for the same."""

    make: Callable[[], Model]
    inputs: dict[str, Any]
    oracle: Callable[[tree.Params, dict[str, Any]], jax.Array]  # inference
    own_init: Callable[[jax.Array], tree.Params]
    state: bool  # whether it keeps any
    draws: bool  # whether it draws in training

    @functools.cached_property
    def model(self) -> Model:
        return self.make()

    @functools.cached_property
    def params(self) -> tree.Params:
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(self.model.init, KEY)
        params = jax.tree.map(
            lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes
        )
        return tree.map_leaves(
            lambda path, a: jnp.abs(a) + 0.5 if path.endswith("var") else a, params
        )


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def linen(
    module: nn.Module, pick: Callable[[Any], Any] = lambda out: out
) -> Callable[..., jax.Array]:
    def apply(params, inputs):
        params = dict(params)
        state = params.pop("state", {})
        return pick(module.apply({"params": params, **state}, *inputs.values()))

    return apply


def nnx_oracle(params: tree.Params, inputs: dict[str, Any]) -> jax.Array:
    """Every leaf put into a fresh module by its attribute's name."""
    module = NnxNet(rngs=nnx.Rngs(5))
    for path, leaf in tree.flatten(params).items():
        *parents, last = path.removeprefix("state/").split("/")
        node = module
        for key in parents:
            node = node[int(key)] if key.isdigit() else getattr(node, key)
        kept = getattr(node, last)
        if isinstance(kept, nnx.Variable):
            kept[...] = leaf
        else:
            setattr(node, last, nnx.data(leaf))
    module.eval()
    return module(*inputs.values())


PICK = lambda module, inputs, train: module(inputs["tokens"], deterministic=not train)["logits"]
IMAGES = {"inputs": numbers(4, 8, 8, 2)}
CASES = {
    "linen": Case(
        lambda: from_linen(
            nn.Sequential((nn.Dense(16), nn.tanh, nn.Dense(3))),
            jax.ShapeDtypeStruct((1, 5), jnp.float32),
        ),
        {"inputs": numbers(4, 5)},
        linen(nn.Sequential((nn.Dense(16), nn.tanh, nn.Dense(3)))),
        lambda key: nn.Sequential((nn.Dense(16), nn.tanh, nn.Dense(3))).init(
            key, jnp.zeros((1, 5))
        )["params"],
        False,
        False,
    ),
    "linen-state": Case(
        lambda: from_linen(LinenNet(), PIXELS),
        IMAGES,
        linen(LinenNet()),
        lambda key: linen_params(LinenNet().init(key, jnp.zeros((1, 8, 8, 2)))),
        True,
        True,
    ),
    "linen-tokens": Case(
        lambda: from_linen(LinenText(), token_inputs, call=PICK),
        {"tokens": jnp.asarray([[1, 2, 3], [4, 5, 10]], jnp.int32)},
        linen(LinenText(), lambda out: out["logits"]),
        lambda key: LinenText().init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        False,
        True,
    ),
    "linen-two": Case(
        lambda: from_linen(LinenTwo(), {"a": numbers(1, 3), "b": numbers(1, 2)}),
        {"a": numbers(4, 3), "b": numbers(4, 2)},
        linen(LinenTwo()),
        lambda key: LinenTwo().init(key, jnp.zeros((1, 3)), jnp.zeros((1, 2)))["params"],
        False,
        False,
    ),
    "nnx": Case(
        lambda: from_nnx(NnxNet, PIXELS),
        IMAGES,
        nnx_oracle,
        lambda key: nnx_params(NnxNet(rngs=nnx.Rngs(key))),
        True,
        True,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- laws


def test_params_are_a_plain_dict_as_the_module_makes_them(case):
    params = jax.jit(case.model.init)(KEY)
    nodes = [params]
    for node in nodes:
        assert type(node) is dict and all(isinstance(key, str) and "/" not in key for key in node)
        nodes += [child for child in node.values() if not tree.is_leaf(child)]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    close(params, case.own_init(KEY))
    assert tree.fingerprint(params) != tree.fingerprint(jax.jit(case.model.init)(jax.random.key(1)))
    assert ("state" in params) == case.state


def test_apply_equals_the_modules_own_and_jit_equals_eager(case):
    out = case.model.apply(case.params, case.inputs)
    want = case.oracle(case.params, case.inputs)
    assert out.logits.dtype == jnp.float32 and np.abs(want).max() > 0.3
    close(out.logits, want)
    close(jax.jit(case.model.apply)(case.params, case.inputs).logits, out.logits)
    assert out.cache is None and out.aux == {}
    hidden = case.model.hidden(case.params, case.inputs)
    assert hidden.logits is None
    close(hidden.hidden, want)
    close(case.model.parts.head(case.params, hidden.hidden), out.logits)


def test_nothing_is_changed_in_place(case):
    """The same call twice gives the same, also in training, and leaves weights as they were."""
    before = tree.fingerprint(case.params)
    for train_ in (False, True):
        one, two = (
            case.model.apply(case.params, case.inputs, rng=KEY, train=train_).logits
            for _ in range(2)
        )
        np.testing.assert_array_equal(one, two)
    assert tree.fingerprint(case.params) == before
    other = case.model.apply(case.params, case.inputs, rng=jax.random.key(1), train=True).logits
    assert bool(np.any(np.abs(other - one) > 1e-4)) == case.draws  # the key is what decides
    if case.draws:
        with pytest.raises(
            ValueError,
            match="rng: None given in training; allowed: a key, because the module draws from",
        ):
            case.model.apply(case.params, case.inputs, train=True)


def test_the_second_call_traces_nothing(case):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def apply(model, params, inputs):
        return model.apply(params, inputs).logits

    apply(case.model, case.params, case.inputs)
    apply(case.model, jax.tree.map(lambda a: a * 2, case.params), case.inputs)
    if isinstance(
        case.model.config.module, nn.Module
    ):  # a Linen module equal to another gives the same model
        apply(case.make(), case.params, case.inputs)


def test_an_array_alone_is_the_one_input(case):
    if len(case.inputs) == 1:
        (only,) = case.inputs.values()
        close(
            case.model.apply(case.params, only).logits,
            case.model.apply(case.params, case.inputs).logits,
        )
    else:
        with pytest.raises(ValueError, match="allowed: a dict of a, b"):
            case.model.apply(case.params, case.inputs["a"])
    got = case.model.inputs(7, 3)
    assert {name: a.shape[0] for name, a in got.items()} == dict.fromkeys(case.inputs, 7)


def test_rules_cover_every_leaf(case):
    """Replicated as it stands, so that a mesh needs an axis that cuts the batch alone."""
    mesh = sharding.make_mesh("data=1")
    placed = sharding.place(case.model.rules, case.params, mesh)
    close(
        case.model.apply(placed, case.inputs).logits,
        case.model.apply(case.params, case.inputs).logits,
    )


def test_the_loss_falls_and_the_state_is_frozen(case):
    """With an optimiser that decays; the state does not train, and has no gradient."""

    def loss(model, params, batch, rng=None, *, train=True):
        logits = model.apply(
            params, {name: batch[name] for name in case.inputs}, rng=rng, train=train
        ).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["classes"]).mean(), {}

    shape = case.model.apply(case.params, case.inputs).logits.shape[:-1]
    batch = {
        **case.inputs,
        "classes": jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape) % 3,
    }
    grads = jax.jit(jax.grad(lambda params: loss(case.model, params, batch, KEY)[0]))(case.params)
    assert all(
        np.all(leaf == 0) == path.startswith("state/") for path, leaf in tree.flatten(grads).items()
    )
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    step = make_step(case.model, loss, optimizer)

    @jax.jit
    def fit(key):
        start = init_state(case.model.init(key), optimizer)
        end, _ = jax.lax.scan(lambda state, _: step(state, batch), start, None, 40)
        first = loss(case.model, start.params, batch, train=False)[0]
        return start.params, end.params, first, loss(case.model, end.params, batch, KEY)[0]

    before, after, first, last = fit(KEY)
    assert last < 0.6 * first
    close(after.get("state", {}), before.get("state", {}), 0)


def test_set_state_is_what_the_module_would_have_kept():
    x = IMAGES["inputs"]
    case = CASES["linen-state"]
    params = dict(case.params)
    variables = {"params": {k: v for k, v in params.items() if k != "state"}, **params["state"]}
    _, kept = LinenNet().apply(
        variables, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    close(set_state(case.model, params, x, KEY), {**params, "state": kept})
    module = NnxNet(rngs=nnx.Rngs(0))
    made = from_nnx(module, PIXELS)
    before = made.init(KEY)
    module.train()
    module.first(x.reshape(4, -1))
    after = set_state(made, before, x, KEY)
    module(x)
    want = nnx_params(module)["state"]["blocks"]["0"][
        "norm"
    ]  # behind it dropout has drawn, and not the same
    close(after["state"]["blocks"]["0"]["norm"], want)
    assert np.abs(want["mean"]).max() > 1e-3
    close({**after, "state": {}}, {**before, "state": {}}, 0)
    assert (
        set_state(CASES["linen"].model, CASES["linen"].params, CASES["linen"].inputs)
        is CASES["linen"].params
    )


def test_a_module_that_is_made_already_keeps_its_weights():
    module = NnxNet(rngs=nnx.Rngs(3))
    model = from_nnx(module, PIXELS)
    module.eval()
    close(model.apply(model.init(KEY), IMAGES).logits, module(IMAGES["inputs"]))
    close(model.init(KEY), nnx_params(module), 0)


# -------------------------------------------------------------------- what it takes part in, or not


def test_predict(case):
    said = predict_fn(case.model)(case.params, case.inputs)
    close(said, jax.nn.softmax(case.oracle(case.params, case.inputs)))


def test_compressed_leaves_and_joined_layers_run(case):
    """`compress.apply` joins equal layers of a list; the module has them apart."""
    kernels = "(?!state).*(kernel|embedding)"
    smaller, report = compress.apply([(kernels, "rtn(bits=8)"), (".*", ())], case.params)
    assert report.bytes_after < report.bytes_before
    if "blocks" in case.params:
        assert list(smaller["blocks"]) == ["0-1"]
    want = case.model.apply(case.params, case.inputs).logits
    np.testing.assert_allclose(
        jax.jit(case.model.apply)(smaller, case.inputs).logits, want, atol=0.05 * np.abs(want).max()
    )


def test_fit_takes_it():
    """The loop with its stream: a foreign model of tokens in place of one of ours."""
    case = CASES["linen-tokens"]
    stream = data.Stream(
        data.windows([i % 11 for i in range(300)], length=9, stride=8), batch_size=4, seed=0
    )
    config = train.TrainConfig(steps=30, learning_rate=0.05, log_every=29)
    _, history = train.fit(case.model, stream, config)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]


def test_it_can_be_wrapped():
    case = CASES["linen"]
    halved = wrap(
        case.model, lambda parts: parts._replace(head=lambda *args: parts.head(*args) / 2)
    )
    close(
        halved.apply(case.params, case.inputs).logits,
        case.model.apply(case.params, case.inputs).logits / 2,
    )


def test_inputs_go_by_name_whatever_their_order():
    """JAX sorts the keys of a dict on its way into `jit`, and a person writes them in any order:
    what is `a` stays `a`.
    """

    class Difference(nn.Module):
        @nn.compact
        def __call__(self, query, item):
            return nn.Dense(2)(query - item)

    one = numbers(3, 4)
    two = 2 * numbers(3, 4)
    model = from_linen(Difference(), {"query": one, "item": two})
    params = jax.jit(model.init)(KEY)
    want = Difference().apply({"params": params}, one, two)
    assert np.abs(want).max() > 0.3
    for inputs in (
        {"query": one, "item": two},
        {"item": two, "query": one},
        {"labels": one, "item": two, "query": one},
    ):
        close(model.apply(params, inputs).logits, want)
        close(jax.jit(model.apply)(params, inputs).logits, want)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.top = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, query, item):
            return self.top(query - item)

    model = from_nnx(Nnx, {"query": one, "item": two})
    params = {"top": {"kernel": params["Dense_0"]["kernel"], "bias": params["Dense_0"]["bias"]}}
    close(jax.jit(model.apply)(params, {"item": two, "query": one}).logits, want)
    refused(
        lambda: model.apply(params, {"query": one, "items": two}),
        "inputs: query, items given; 'item' is needed",
    )


def refused(run: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        run()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_it_cannot_do_is_refused_in_one_line():
    case = CASES["linen"]
    assert case.model.with_policy(ops.Policy()) is case.model
    refused(
        lambda: case.model.with_policy(ops.Policy(compute_dtype="bfloat16")),
        ", because a foreign module sets its own",
    )
    refused(
        lambda: case.model.apply(case.params, case.inputs, cache=1),
        "cache: given to a foreign module",
    )
    observe = lambda: compress.observe(case.model, case.params, [case.inputs], paths=".*kernel")
    refused(observe, "kernel' is a probe, which a foreign module cannot measure")
    refused(
        lambda: case.model.apply(case.params, numbers(4, 6)),
        "inputs: inputs [4, 6] given; they do not fit the module: For parameter",
    )
    adapted, params = adapt.lora(
        case.model, case.params, [(".*kernel", adapt.LoRA(2, dropout=0.1)), (".*", None)], KEY
    )
    adapted.apply(params, case.inputs)
    refused(
        lambda: adapted.apply(params, case.inputs, rng=KEY, train=True),
        "dropout: given for adapters of a foreign module; allowed: LoRA(dropout=0), because the "
        "module runs as a whole",
    )
    refused(
        lambda: set_state(_gpt2(), {}, jnp.zeros((1, 1))), "allowed: one of from_linen or from_nnx"
    )
    refused(
        lambda: from_linen(nn.Dense, numbers(1, 2)),
        "given; allowed: an instance of a Linen module, such as nn.Dense(3)",
    )
    refused(
        lambda: from_nnx(5, numbers(1, 2)),
        "module: 5 given; allowed: an nnx module, or a function that makes one from `rngs`",
    )
    refused(
        lambda: from_linen(nn.Dense(3), {"x": 5}),
        "inputs: x is 5; allowed: an array or shape with the batch in front",
    )
    model = from_linen(LinenText(), token_inputs)
    refused(
        lambda: jax.eval_shape(model.apply, model.init(KEY), jnp.zeros((1, 2), jnp.int32)),
        "returns dict; allowed: one float",
    )

    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="state")(x)

    refused(
        lambda: from_linen(Taken(), numbers(1, 2)).init(KEY),
        "a part of it is named 'state'; allowed: any other name",
    )
    refused(lambda: linen_params({"params": {"a/b": jnp.ones(2)}}), "the name 'a/b' has a slash")

    class Remembers(nnx.Module):
        def __init__(self, rngs):
            self.seen = nnx.Cache(jnp.zeros(3))

        def __call__(self, x):
            return x

    refused(lambda: from_nnx(Remembers, numbers(1, 2)), "module: 'seen' is a cache")


def test_boxed_linen_parameters_are_unboxed():
    """Names of axes, which others hang on their leaves, are dropped: placement goes by
    rules here.
    """
    module = nn.Dense(
        3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    )
    model = from_linen(module, numbers(1, 2))
    params = model.init(KEY)
    assert type(params["kernel"]) is not nn.Partitioned and isinstance(params["kernel"], jax.Array)
    close(
        model.apply(params, numbers(4, 2)).logits,
        numbers(4, 2) @ params["kernel"] + jnp.broadcast_to(params["bias"], (4, 3)),
    )


def _gpt2() -> Model:
    from jaxmodel.models import gpt2

    return gpt2.model(gpt2.SIZES["tiny"])


@pytest.mark.parametrize("recipe", [None, "rtn(bits=4, group=8)", "magnitude(0.5) | rtn(bits=8)"])
def test_a_bundle_is_read_back_bit_for_bit(case, recipe, tmp_path):
    bundle = hub.Bundle(case.model, case.params, None, {"labels": ["a", "b", "c"]})
    if recipe is not None:
        rules = [(tree.optional(".*(kernel|embedding)"), recipe), (".*", ())]
        bundle, _ = compress.compress_bundle(bundle, rules)
        assert any(
            isinstance(leaf, leaves.Compressed) for leaf in tree.flatten(bundle.params).values()
        )
    bundle.save_pretrained(tmp_path / "mine")
    again = hub.from_pretrained(tmp_path / "mine", module=case.model)
    assert (
        again.model is case.model and again.labels == ("a", "b", "c") and again.card == bundle.card
    )
    chex.assert_trees_all_equal(again.params, tree.unstack(bundle.params))
    logits = [
        jax.eval_shape(one.model.apply, one.params, case.inputs).logits for one in (again, bundle)
    ]
    assert len({(one.shape, one.dtype) for one in logits}) == 1
