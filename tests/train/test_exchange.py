"""Gradients exchanged in fewer bytes: right on average, in the bytes of the formula, once a step,
with the loss of a plain run.

This file runs itself once, in a process of its own with eight simulated devices, and the tests read
what it wrote down. Run it by hand with `JAX_NUM_CPU_DEVICES=8 python tests/train/test_exchange.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data, losses, ops, sharding, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2
from jaxmodel.optim.optimizers import optimizer
from jaxmodel.optim.quantized import quantize_weights
from jaxmodel.plan import collectives, moved
from jaxmodel.train.exchange import GradientCompression, sum_int8, sum_top_k
from jaxmodel.train.state import init_state, state_shardings
from jaxmodel.train.step import make_step

P = jax.P
MODEL = gpt2.model(gpt2.Config(256, 128, 2, 4, 16), ops.Policy(axes=ops.MESH_AXES))
STREAM = data.Stream(
    data.windows(np.random.default_rng(0).integers(0, 16, 3000), 17, stride=16), 16, seed=1
)
EXACT = GradientCompression(smallest=10**9)  # sums all as they are
TOP = GradientCompression("top_k", 0.05)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------- on eight devices


def summed(function, *arrays):
    """A function of arrays `[8, ...]`, one for each device, in a `shard_map` over data=8."""
    mesh = sharding.make_mesh("data=8")
    with jax.set_mesh(mesh):
        local = lambda *args: jax.tree.map(lambda a: a[None], function(*(a[0] for a in args)))
        run = jax.jit(
            jax.shard_map(local, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        )
        return jax.tree.map(
            np.asarray,
            run(*(jax.device_put(a, jax.NamedSharding(mesh, P("data"))) for a in arrays)),
        )


def check_int8_sums() -> dict:
    out = {}
    for name, shape in (("whole", (16, 64)), ("padded", (3, 5, 40)), ("layers", (8, 3, 128))):
        x = random(8, *shape) * np.exp(random(8, *shape[:-1], 1, seed=1))
        keys = jax.random.split(jax.random.key(0), 300)

        def many(x, place, keys=keys):
            one = lambda key: sum_int8(x, "data", 8, jax.random.fold_in(key, place))
            return jax.lax.map(one, keys)

        found = summed(many, x, np.arange(8, dtype=np.uint32))
        want = x.sum(0)
        same = all(np.array_equal(found[0], other) for other in found)
        mean = found[0].mean(0)
        spread = found[0].std(0) / len(keys) ** 0.5
        bias = np.abs(mean - want) / (spread + 1e-6)
        out[name] = {
            "same": same,
            "bias": float(bias.max()),
            "error": float(np.abs(found[0] - want).max() / np.abs(x).max()),
        }
    return out


def check_top_k_sums() -> dict:
    x = random(8, 6, 50)
    sums, rest = summed(lambda x: sum_top_k(x, "data", 3), x)
    want = np.zeros((6, 50), np.float32)
    want_rest = x.copy()
    for device in range(8):
        for row in range(6):
            for place in np.argsort(-np.abs(x[device, row]), kind="stable")[:3]:
                want[row, place] += x[device, row, place]
                want_rest[device, row, place] = 0
    return {"sum": float(np.abs(sums - want).max()), "rest": float(np.abs(rest - want_rest).max())}


@functools.cache
def compiled(
    mesh_shape: str, exchange: GradientCompression | None, accumulate: int = 1, codes: bool = False
):
    """The mesh, the first state and the compiled step."""
    mesh = sharding.make_mesh(mesh_shape)
    trainable = [(".*", True)] if codes else None
    chosen = optimizer("adamw8", 3e-3) if codes else optax.adam(3e-3)
    rules = [(".*(norm/.*|_bias)", None), (".*", 8)]

    def start(key):
        params = MODEL.init(key)
        return init_state(
            quantize_weights(params, rules) if codes else params,
            chosen,
            trainable,
            exchange=exchange,
        )

    step = make_step(
        MODEL,
        losses.next_token,
        chosen,
        exchange=exchange,
        accumulate=accumulate,
        trainable=trainable,
    )
    with jax.set_mesh(mesh):
        where = state_shardings(jax.eval_shape(start, jax.random.key(0)), MODEL.rules, mesh)
        state = jax.jit(start, out_shardings=where)(jax.random.key(0))
        return (
            mesh,
            state,
            jax.jit(step, out_shardings=(where, None)).lower(state, batch(mesh, 0)).compile(),
        )


def batch(mesh, i: int):
    rows = {name: np.asarray(a) for name, a in STREAM.batch(i).items()}
    weights = np.ones(rows["targets"].shape, np.float32)
    weights[:5, 3:] = 0  # devices with more and with fewer tokens
    place = jax.NamedSharding(
        mesh, P(tuple(name for name in sharding.BATCH_AXES if name in mesh.shape))
    )
    return jax.device_put({**rows, "weights": weights}, place)


def trained(steps: int, *args, **options):
    mesh, state, step = compiled(*args, **options)
    losses = []
    for i in range(steps):
        state, metrics = step(state, batch(mesh, i))
        losses.append(float(metrics["loss"]))
    return state, {name: float(value) for name, value in metrics.items()}, losses


def check_weights() -> dict:
    _, want, _ = trained(1, "data=8", None)
    _, got, _ = trained(1, "data=8", EXACT, 2)
    return {key: abs(got[key] / want[key] - 1) for key in ("loss", "grad_norm", "weight")}


def check_bytes() -> dict:
    out = {}
    count = tree.count(jax.eval_shape(MODEL.init, jax.random.key(0)))
    for name, *case in (
        ("plain", None),
        ("exact in parts", EXACT, 2),
        ("int8", GradientCompression()),
        ("top_k", TOP),
    ):
        found = collectives(compiled("data=8", *case)[2].as_text())
        calls = sum(one.times for one in found if one.kind == "all-to-all")
        out[name] = {"bytes": sum(moved(found).values()) / (8 * count), "all-to-all": calls}
    return out


def check_planned() -> dict:
    """Of `Program.compile`, which has no arrays, the bytes over those of the step that runs."""
    mesh = sharding.make_mesh("data=8")
    out = {}
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in batch(mesh, 0).items()}
    for name, exchange in (("int8", GradientCompression()), ("top_k", TOP)):
        config = train.TrainConfig(
            gradient_compression=exchange.kind, top_k_fraction=exchange.share
        )
        program = train.Program(
            MODEL, config, loss=losses.next_token, optimizer=optax.adam(3e-3), mesh=mesh
        )
        found = collectives(program.compile(shapes))
        runs = collectives(compiled("data=8", exchange)[2].as_text())
        out[name] = sum(moved(found).values()) / sum(moved(runs).values())
    return out


def check_losses() -> dict:
    runs = {"plain": None, "int8": GradientCompression(), "top_k": TOP}
    out = {
        name: float(np.mean(trained(20, "data=8", exchange)[2][-5:]))
        for name, exchange in runs.items()
    }
    return {**out, "first": trained(1, "data=8", None)[2][0]}


def check_residual() -> dict:
    state, _, _ = trained(2, "data=8", TOP)
    up = state.extra["residual"]["blocks"]["0-1"]["mlp"]["up"]
    whole = np.asarray(up)
    mesh = sharding.make_mesh("data=8")
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            InputError, match="exchange: the state has no residual; make the state with init_state"
        ),
    ):
        TOP(lambda *args: args, [])({}, {}, None)
    return {
        "shape": list(up.shape),
        "spec": str(up.sharding.spec[0]),
        "differ": bool((whole[0] != whole[1]).any()),
        "leaves": sorted(tree.flatten(state.extra["residual"])),
    }


def check_other_axes() -> dict:
    _, want, _ = trained(1, "data=8", None)
    _, got, _ = trained(1, "data=4,tensor=2", GradientCompression())
    found = moved(collectives(compiled("data=4,tensor=2", GradientCompression())[2].as_text()))
    alone = moved(collectives(compiled("data=8", GradientCompression())[2].as_text()))
    return {
        "norm": got["grad_norm"] / want["grad_norm"],
        "share": found["all-to-all"] / alone["all-to-all"],
    }


def check_codes() -> dict:
    state, _, losses = trained(10, "data=8", GradientCompression(), codes=True)
    return {"leaf": type(state.params["embed"]).__name__, "losses": [losses[0], losses[-1]]}


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}

# ---------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def found(devices8):
    return json.loads(devices8(Path(__file__)).splitlines()[-1])


def test_int8_sums_are_right_on_average_and_alike_on_all_devices(found):
    for name, one in found["int8_sums"].items():
        assert one["same"] and one["bias"] < 5.5, (name, one)
        assert one["error"] < 8 * (8 + 1) / 127, (
            name,
            one,
        )  # a code of each of the eight, and one of the sum


def test_top_k_sums_are_those_written_out(found):
    assert max(found["top_k_sums"].values()) < 1e-6


def test_each_device_counts_by_its_weight(found):
    assert max(found["weights"].values()) < 1e-5


def test_bytes_are_those_of_the_formula_once_a_step(found):
    plain, parts, int8, top = (
        found["bytes"][name] for name in ("plain", "exact in parts", "int8", "top_k")
    )
    assert plain["bytes"] >= 1 and plain["all-to-all"] == 0
    assert 1 <= parts["bytes"] < 1.01  # of two micro-batches
    assert 0.25 < int8["bytes"] <= 0.27
    assert int8["all-to-all"] == 2 * 7  # codes and scales of seven large leaves
    assert top["bytes"] < 0.05 * 8 * 6 / 8 + 0.03


def test_a_planned_step_sends_what_the_running_one_does(found):
    assert found["planned"] == {"int8": 1, "top_k": 1}


def test_the_loss_is_that_of_a_plain_run(found):
    losses = found["losses"]
    assert losses["plain"] < 0.65 * losses["first"]
    assert losses["int8"] == pytest.approx(losses["plain"], rel=0.01)
    assert losses["top_k"] == pytest.approx(losses["plain"], rel=0.1)


def test_what_was_not_sent_is_remembered_by_each_device(found):
    one = found["residual"]
    assert one["shape"] == [8, 2, 512, 128] and one["spec"] == "data" and one["differ"]
    assert "embed" in one["leaves"] and not any(
        path.endswith(("bias", "norm/weight")) for path in one["leaves"]
    )


def test_what_other_axes_cut_is_exchanged_in_its_parts(found):
    assert found["other_axes"]["norm"] == pytest.approx(1, abs=0.01)
    assert 0.49 < found["other_axes"]["share"] < 0.55


def test_weights_that_are_codes_may_exchange_gradients_too(found):
    first, last = found["codes"]["losses"]
    assert found["codes"]["leaf"] == "QTensor" and last < first - 0.5


def test_without_the_axis_nothing_is_changed():
    params = {"w": jnp.ones((64, 128))}
    run = lambda trains, batch, rng: (("value", {}), trains)
    assert GradientCompression("top_k").residual(params) is None
    assert GradientCompression("top_k")(run, [])(params, {}, None) == (
        (("value", {}), params),
        None,
    )


def test_bad_settings_are_refused():
    with pytest.raises(
        InputError, match="gradient_compression: 'int4' is not known; allowed: int8, top_k"
    ):
        GradientCompression("int4")
    with pytest.raises(InputError, match="share: 0.0 given; allowed: above 0 and at most 1"):
        dataclasses.replace(GradientCompression(), share=0.0)


if __name__ == "__main__":
    print(json.dumps({name: check() for name, check in CHECKS.items()}))
