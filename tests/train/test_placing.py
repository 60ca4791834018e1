"""Where batches, parameters and states are put for training: on a mesh in any order of devices, and
only where they fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data, distributed, ops, optim, sharding, train
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2
from jaxmodel.train import placing
from jaxmodel.train.gradients import value_and_grad

MODEL = gpt2.model(gpt2.Config(256, 16, 2, 2, 16), ops.Policy(axes=ops.MESH_AXES))


def stream(length=17, tokens=np.arange(2000) % 256):
    return data.Stream(data.windows(tokens, length), 16, seed=1)


def fit(steps, **more):
    config = train.TrainConfig(steps=steps, log_every=1, save_every=2)
    return train.fit(MODEL, stream(), config, optimizer=optax.sgd(0.1), **more)


# --------------------------------------------------------------------------------- on eight devices


def check_rows_on_a_mesh_that_follows_the_wires() -> None:
    """The rows of one host are not next to each other then."""
    order = [0, 4, 2, 6, 1, 5, 3, 7]
    mesh = sharding.make_mesh("data=2,fsdp=4", [jax.devices()[i] for i in order])
    placed = placing.ShardedLoader(stream(), mesh)
    want = stream().batch(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        found = placed.batch(3)
    for name, a in found.items():
        np.testing.assert_array_equal(a, want[name])
        for part in a.addressable_shards:
            assert part.device == mesh.devices.reshape(-1)[part.index[0].start // 2]


def check_what_stood_on_one_device_goes_on_a_mesh() -> None:
    alone, _ = fit(2)
    mesh = sharding.make_mesh("fsdp=4")
    again, _ = fit(4, state=alone, mesh=mesh)
    whole, _ = fit(4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), again.params, whole.params
    )
    assert len(again.params["embed"].sharding.device_set) == 4
    assert int(fit(4, state=alone)[0].step) == 4  # it stays usable
    _, on_mesh = fit(1, params=alone.params, mesh=mesh)
    assert on_mesh[0]["loss"] == pytest.approx(fit(1, params=alone.params)[1][0]["loss"], rel=1e-5)


def check_a_memory_of_the_exchange_elsewhere(folder: str) -> None:
    config = train.TrainConfig(
        steps=8, save_every=2, gradient_compression="top_k", top_k_fraction=0.1
    )
    wide = gpt2.model(gpt2.Config(256, 64, 2, 2, 16), MODEL.policy)

    def run(shape, steps):
        more = {"mesh": sharding.make_mesh(shape)} if shape else {}
        stop = distributed.RunMonitor(stop=lambda step: step == steps)
        return train.fit(wide, stream(), config, checkpoints=folder, supervisor=stop, **more)[0]

    assert run("data=4", 2).extra["residual"]["embed"].shape[0] == 4
    fewer = run("data=2", 4)
    assert int(fewer.step) == 4 and fewer.extra["residual"]["embed"].shape[0] == 2
    assert np.any(np.asarray(fewer.extra["residual"]["embed"]) != 0)
    alone = run(None, 6)
    assert int(alone.step) == 6 and "residual" not in alone.extra
    assert run("data=4", 8).extra["residual"]["embed"].shape[0] == 4


def check_an_exchange_among_stages_is_refused() -> None:
    config = train.TrainConfig(steps=1, gradient_compression="int8")
    with pytest.raises(
        InputError, match="gradient compression cannot be combined with pipeline stages"
    ):
        train.fit(MODEL, stream(), config, mesh=sharding.make_mesh("pipeline=2,data=2"))


def check_codes_in_1f1b_are_refused() -> None:
    params = optim.quantize_weights(
        jax.jit(MODEL.init)(jax.random.key(0)), [(".*(norm/.*|_bias)|positions", None), (".*", 8)]
    )
    config = train.TrainConfig(steps=1, pipeline="1f1b", trainable=[(".*", True)])
    with pytest.raises(
        InputError, match="trainable: the compressed .* cannot train in this schedule"
    ):
        train.fit(
            MODEL, stream(), config, params=params, mesh=sharding.make_mesh("pipeline=2,data=2")
        )


CHECKS = [
    "check_rows_on_a_mesh_that_follows_the_wires",
    "check_what_stood_on_one_device_goes_on_a_mesh",
    "check_an_exchange_among_stages_is_refused",
    "check_codes_in_1f1b_are_refused",
]


@pytest.fixture(scope="module")
def outcome(outcomes8, tmp_path_factory):
    elsewhere = f"check_a_memory_of_the_exchange_elsewhere:{tmp_path_factory.mktemp('c')}"
    return {
        name.partition(":")[0]: said
        for name, said in outcomes8(__file__, [*CHECKS, elsewhere]).items()
    }


@pytest.mark.parametrize("name", [*CHECKS, "check_a_memory_of_the_exchange_elsewhere"])
def test_on_eight_devices(name, outcome):
    assert not outcome[name], outcome[name]


# ------------------------------------------------------------------------------------ on one device


def test_tokens_that_the_model_has_not_are_refused():
    config = train.TrainConfig(steps=1)
    with pytest.raises(
        InputError, match="data: tokens up to 299 for a model with a vocabulary of 256"
    ):
        train.fit(MODEL, stream(tokens=np.full(400, 299)), config)
    with pytest.raises(
        InputError, match="data: rows of 24 tokens for a model with a context of 16"
    ):
        train.fit(MODEL, stream(length=25), config)


def test_codes_have_no_place_uphill():
    params = optim.quantize_weights({"up": jnp.ones((64, 64))}, [(".*", 8)])
    with pytest.raises(InputError, match="which SAM cannot perturb"):
        optim.sam(value_and_grad(lambda p: (jnp.zeros(()), {})))(params)
