"""DenseNet: sizes of the paper, values and gradients of the same network in Flax, a layer's
connections, folding.
"""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import losses, tree
from jaxmodel.layers.batch_norm import fold_batch_norm
from jaxmodel.models import Model, densenet

# Of torchvision, without the statistics of the norms, which are no parameters there.
PARAMETERS = {
    "densenet-121": 7_978_856,
    "densenet-161": 28_681_000,
    "densenet-169": 14_149_480,
    "densenet-201": 20_013_928,
}
CONFIGS = {
    "large images": densenet.Config(
        (2, 1), 3, 4, 21, bottleneck=2
    ),  # an odd side: padding is not even
    "small images": densenet.Config((1, 1), 3, 4, 9, width=4, small=True),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    shapes = tree.flatten(
        jax.eval_shape(densenet.model(densenet.SIZES[name]).init, jax.random.key(0))
    )
    trains = {
        path: leaf for path, leaf in shapes.items() if not path.endswith(("/mean", "/variance"))
    }
    assert tree.count(tree.unflatten(trains)) == PARAMETERS[name]


# ------------------------------------------------------------------------------------- against Flax


class Theirs(nn.Module):
    """Huang et al. (2017), sections 3 and 4, in Flax's own layers; names of layers are our
    paths.
    """

    config: densenet.Config

    @nn.compact
    def __call__(self, x, train: bool):
        c = self.config
        number = 0
        norm = lambda name, x: nn.relu(
            nn.BatchNorm(use_running_average=not train, epsilon=c.norm_eps, name=name)(x)
        )

        def conv(name, width, side, x, stride=1):
            pads = [(side // 2, side // 2)] * 2
            return nn.Conv(
                width,
                (side, side),
                (stride, stride),
                pads,
                use_bias=False,
                precision="highest",
                name=name,
            )(x)

        if c.small:
            x = norm("stem_norm", conv("stem", c.width or 2 * c.growth, 3, x))
        else:
            x = norm("stem_norm", conv("stem", c.width or 2 * c.growth, 7, x, stride=2))
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, count in enumerate(c.stages):
            for i in range(count):
                at = f"blocks/{number}"
                if stage and not i:
                    x = conv(
                        f"{at}/transition", x.shape[-1] // 2, 1, norm(f"{at}/transition_in_norm", x)
                    )
                    with jax.numpy_dtype_promotion("standard"):
                        x = nn.avg_pool(x, (2, 2), (2, 2))
                y = conv(f"{at}/conv1", c.bottleneck * c.growth, 1, norm(f"{at}/in_norm", x))
                y = conv(f"{at}/conv2", c.growth, 3, norm(f"{at}/conv1_norm", y))
                x = jnp.concatenate([x, y], axis=-1)
                number += 1
        x = jnp.mean(norm("norm", x), axis=(1, 2))
        return nn.Dense(c.classes, precision="highest", name="head")(x)


def to_theirs(params: tree.Params) -> dict:
    """Our tree as theirs."""
    found: dict = {"params": {}, "batch_stats": {}}
    for path, leaf in tree.flatten(tree.unstack(params)).items():
        where, _, last = path.rpartition("/")
        if where.endswith("norm"):
            kind = "batch_stats" if last in ("mean", "variance") else "params"
            name = {"weight": "scale", "variance": "var"}.get(last, last)
            found[kind].setdefault(where, {})[name] = leaf
        elif path in ("head", "head_bias"):
            found["params"].setdefault("head", {})["kernel" if path == "head" else "bias"] = leaf.T
        else:
            side = (
                7
                if path == "stem" and leaf.shape[1] == 3 * 49
                else 1
                if last in ("conv1", "transition")
                else 3
            )
            found["params"][path] = {
                "kernel": leaf.reshape(leaf.shape[0], -1, side, side).transpose(2, 3, 1, 0)
            }
    return found


def filled(model: Model) -> tree.Params:
    """Weights that are not zero anywhere, variances above zero."""
    rng = np.random.default_rng(0)

    def value(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.normal(size=a.shape) * (2 / a.shape[-1] if len(a.shape) > 1 else 0.1) ** 0.5
        return jnp.asarray(
            np.abs(x) + 0.5 if path.endswith(("variance", "norm/weight")) else x, jnp.float32
        )

    return tree.map_leaves(value, tree.unstack(jax.eval_shape(model.init, jax.random.key(0))))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_of_flax(name):
    config = CONFIGS[name]
    model = densenet.model(config)
    theirs = Theirs(config)
    params = filled(model)
    rng = np.random.default_rng(1)
    pixels = jnp.asarray(rng.normal(size=(3, config.size, config.size, 3)), jnp.float32)
    labels = jnp.asarray([0, 3, 1], jnp.int32)
    eye = jnp.eye(config.classes)

    @jax.jit
    def ours(params):
        batch = {"pixels": pixels, "labels": labels}
        grads = jax.grad(lambda p: losses.classification(model, p, batch)[0])(params)
        return *(model.apply(params, pixels, train=mode).logits for mode in (False, True)), grads

    @jax.jit
    def flax(variables):
        logits = lambda w, mode: theirs.apply(
            {**variables, "params": w}, pixels, mode, mutable=["batch_stats"]
        )[0]
        loss = lambda w: (
            -jnp.mean(jnp.sum(jax.nn.log_softmax(logits(w, True)) * eye[labels], axis=-1))
        )
        w = variables["params"]
        return logits(w, False), logits(w, True), jax.grad(loss)(w)

    (*got, grads), (*want, their_grads) = ours(params), flax(to_theirs(params))
    assert np.abs(want[0] - want[1]).max() > 0.1
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
    chex.assert_trees_all_close(to_theirs(grads)["params"], their_grads, rtol=2e-5, atol=2e-5)
    chex.assert_trees_all_equal(
        *(
            f(to_theirs(grads)["batch_stats"])
            for f in (lambda a: a, lambda a: jax.tree.map(jnp.zeros_like, a))
        )
    )


def test_norms_behind_convolutions_fold_and_the_others_stay():
    config = CONFIGS["large images"]
    model = densenet.model(config)
    params = filled(model)
    folded = fold_batch_norm(params, config.norm_eps)
    norms = {path.rpartition("/")[0] for path in tree.flatten(folded) if "norm" in path}
    assert norms == {
        "norm",
        "blocks/2/transition_in_norm",
        *(f"blocks/{i}/in_norm" for i in range(3)),
    }
    tree.assign(model.rules, folded)  # covered: it can be placed, too
    pixels = jnp.asarray(np.random.default_rng(1).normal(size=(3, 21, 21, 3)), jnp.float32)
    apply = jax.jit(lambda p: model.apply(p, pixels).logits)
    chex.assert_trees_all_close(apply(folded), apply(params), rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_stage_reads_all_before_it():
    """The first channels of a stage's output are what went in, and then what each layer added,
    untouched.
    """
    model = densenet.model(densenet.SIZES["tiny"])
    params = filled(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)

    @jax.jit
    def run(params):
        first, context = model.parts.embed(params, {"pixels": x})
        block = lambda i, x: model.parts.block(params["blocks"][i], x, context)[0]
        second = block("0", first)
        third = block("1", second)
        return first, second, third, block("2", third), block("1", second.at[..., 0].add(1.0))

    first, second, third, last, changed = run(params)
    assert [y.shape[-1] for y in (first, second, third)] == [64, 128, 192]
    np.testing.assert_array_equal(third[..., :128], second)
    np.testing.assert_array_equal(second[..., :64], first)
    assert last.shape == (2, 2, 2, 96 + 64)  # a transition halves the channels and the sides
    assert np.abs(changed[..., 128:] - third[..., 128:]).max() > 1e-3


def test_config_is_checked():
    with pytest.raises(ValueError, match="stages, width"):
        densenet.Config(())
