"""Auto-encoders: plain, denoising, variational and sparse.

The code is `hidden`, the reconstruction is `logits`.

- plain (Hinton & Salakhutdinov, 2006), and denoising: some inputs are zero in training (Vincent et
  al., 2008);
- variational (Kingma & Welling, 2014): the code is sampled in training, `aux["kl"]` is its distance
  from a standard normal;
- sparse: `aux["sparsity"]` is the L1 norm of the code (Bricken et al., 2023) or the KL of its rates
  (Ng, 2011); or only the k largest entries of the code are kept (Gao et al., 2024).
  `jaxmodel.contrib.revive` gives dead entries of a code a new start.

The loss is `jaxmodel.losses.autoencoder`.

>>> auto = model(SIZES["tiny"])
>>> params = jax.jit(auto.init)(jax.random.key(0))
>>> out = jax.jit(auto.apply)(params, jnp.zeros((2, 64)))
>>> out.hidden.shape, out.logits.shape, list(out.aux)
((2, 32), (2, 64), ['kl'])
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import FROM_ZERO, InputError, at_least, one_of, within
from jaxmodel.layers import activation, codes
from jaxmodel.layers.connect import Full
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, read
from jaxmodel.models.parts import Parts, feature_inputs
from jaxmodel.ops.norms import on_last

KINDS = ("plain", "denoising", "variational", "l1", "kl", "topk")
RECONSTRUCTIONS = ("squared", "bernoulli")


@dataclasses.dataclass(frozen=True)
class Config:
    """The kind and the sizes of a member of the family.

    Attributes:
      features: the number N of features of an input.
      code: the width Z of the code; more than N for an overcomplete dictionary.
      hidden: the widths of the layers between input and code, and in reverse between code and
        reconstruction.
      kind: "plain", "denoising", "variational", or sparse: "l1", "kl", "topk".
      reconstruction: how the loss interprets the output: "squared" (means of normal variables with
        variance 1) or "bernoulli" (logits).
      penalty: the factor of `kl` or `sparsity` in the loss.
      noise: the share of the inputs that are set to zero in training, for "denoising".
      rate: the desired mean activation of each entry of the code, for "kl".
      k: the number of entries of the code that are kept, for "topk".
      activation: the activation of the hidden layers, and of the code of a plain or denoising
        auto-encoder; see `layers.activation`.
    """

    features: int
    code: int
    hidden: tuple[int, ...] = ()
    kind: str = "plain"
    reconstruction: str = "squared"
    penalty: float = 1.0
    noise: float = 0.3
    rate: float = 0.05
    k: int = 32
    activation: str = "gelu"

    def __post_init__(self) -> None:
        check_sizes(self, ("features", "code", "k"))
        for n in self.hidden:
            at_least("hidden", n)
        one_of("kind", self.kind, KINDS)
        one_of("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        activation(self.activation)
        if not 0 <= self.noise < 1 or not 0 < self.rate < 1:
            raise InputError(
                f"noise, rate: {self.noise}, {self.rate} given; allowed: 0 <= noise < 1, 0 < rate "
                "< 1"
            )
        within("penalty", self.penalty, FROM_ZERO)
        if self.kind == "topk" and self.k > self.code:
            raise InputError(
                f"k: {self.k} given; allowed: at most {self.code}, the width of the code"
            )


SIZES = {
    "tiny": Config(64, 32, (128,), "variational"),
    "mnist-vae": Config(784, 32, (512, 256), "variational", "bernoulli"),
    "mnist-denoising": Config(784, 64, (512,), "denoising", "bernoulli"),
    "smollm2-135m-topk": Config(576, 2304, kind="topk", k=32),
    "smollm2-135m-l1": Config(576, 2304, kind="l1", penalty=5.0),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    `F0` are the units after the input, and so on to the reconstruction.
    """
    names = [f"hidden_{i}" for i in range(len(config.hidden))]
    paths = [
        *(f"encoder/{name}" for name in names),
        "encoder/(code|spread)",
        *(f"decoder/{name}" for name in names),
    ]
    rules = []
    for i, path in enumerate(paths):
        rules += [
            (f"{path}/weight", f"F{i}F{i - 1}" if i else "F0n"),
            (f"{path}/weight_bias", f"F{i}", P()),
        ]
    out = (
        ("decoder/out/weight", f"nF{len(paths) - 1}", P("tensor", "fsdp")),
        ("decoder/out/weight_bias", "n", P()),
    )
    return Axes((*rules, *out), shared=("n",))


class _Encoder(nn.Module):
    """The encoder, with leaves hidden_I, code, and spread (the log variance, if variational)."""

    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        for i, width in enumerate(c.hidden):
            x = activation(c.activation)(Full(width, self.policy, name=f"hidden_{i}")(x))
        spread = Full(c.code, self.policy, name="spread")(x) if c.kind == "variational" else None
        return Full(c.code, self.policy, name="code")(x), spread


class _Decoder(nn.Module):
    """The decoder, with leaves hidden_I and out."""

    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.config
        for i, width in enumerate(reversed(c.hidden)):
            z = activation(c.activation)(Full(width, self.policy, name=f"hidden_{i}")(z))
        return Full(
            c.features, dataclasses.replace(self.policy, activation_dtype="float32"), name="out"
        )(z)


def _code(
    config: Config, pre: jax.Array, spread: Any, rng: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the code and its aux values from the output of the encoder."""
    if config.kind == "variational":
        return codes.sample_normal(pre, spread, rng), {
            "kl": jnp.mean(codes.kl_to_normal(pre, spread))
        }
    if config.kind == "kl":
        code = jax.nn.sigmoid(pre)
        return code, {"sparsity": codes.kl_of_rates(code, config.rate)}
    if config.kind == "l1":
        code = jax.nn.relu(pre)
        return code, {
            "sparsity": jnp.mean(jnp.sum(code.astype(jnp.float32), axis=-1)),
            "active": _active(code),
        }
    if config.kind == "topk":
        code = codes.keep_top(pre, config.k)
        return code, {"active": _active(code)}
    return activation(config.activation)(pre), {}


def _active(code: jax.Array) -> jax.Array:
    """Return how many entries of a code are not zero, averaged over the batch."""
    return jnp.mean(jnp.sum(code > 0, axis=-1, dtype=jnp.float32))


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    encoder = _Encoder(config, policy)
    decoder = _Decoder(config, policy)

    def embed(
        params: Any, inputs: Any, cache: Any = None, rng: Any = None, train: bool = False
    ) -> Any:
        x = read(inputs, "features", "BN")
        rng = rng if train else None
        if config.kind == "denoising" and rng is not None:
            x = jnp.where(
                jax.random.bernoulli(rng, config.noise, x.shape), jnp.zeros((), x.dtype), x
            )
        # the decoder's bias is the centre of the data; the code describes the difference from it
        if config.kind in (
            "l1",
            "topk",
        ):
            x = x - on_last(params["decoder"]["out"]["weight_bias"].astype(x.dtype), x.ndim)
        pre, spread = encoder.apply(
            {"params": params["encoder"]}, x.astype(policy.activation_dtype)
        )
        code, aux = _code(config, pre, spread, rng)
        return code, {"aux": aux}

    def head(params: Any, x: Any, rng: Any = None, train: bool = False) -> Any:
        return decoder.apply({"params": params["decoder"]}, x)

    def init(key: jax.Array) -> tree.Params:
        encoder_key, decoder_key = jax.random.split(key)
        own: Any = encoder.init(
            encoder_key, jnp.zeros((1, config.features), policy.activation_dtype)
        )["params"]
        top: Any = decoder.init(decoder_key, jnp.zeros((1, config.code), policy.activation_dtype))[
            "params"
        ]
        # unit columns in the decoder, and their transpose in the encoder
        if config.kind in ("l1", "topk") and not config.hidden:
            rows = own["code"]["weight"]
            rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
            own = {"code": {**own["code"], "weight": rows}}
            top = {"out": {**top["out"], "weight": rows.T}}
        return {"encoder": own, "decoder": top}

    inputs = feature_inputs(config.features)
    return Model(config, policy, init, Parts(embed, None, head), inputs, None, axes(config))
