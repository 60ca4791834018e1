# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Five ideas
#
# All of jaxmodel is made of five things: **params** are a plain dict, a **model** is a record of
# pure functions, **rules** say what differs from leaf to leaf, a **train state** and a seed
# determine the rest of a run, and a **transform** is `params -> params`. This notebook shows each
# at toy size. It needs no download and takes about half a minute on a laptop.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import (
    compress,
    data,
    evaluate,
    generate,
    hub,
    losses,
    models,
    ops,
    train,
    tree,
)
from jaxmodel.errors import InputError
from jaxmodel.models import llama
from jaxmodel.progress import set_quiet
from jaxmodel.report import Column, Rows, plot

set_quiet()  # no progress lines between the cells


# %% [markdown]
# ## 1. Params: a plain nested dict
#
# A leaf's path joins the keys with `/`. The three equal layers of this model stand in one
# *segment*, `0-2`: its leaves have a leading axis of three layers, and the model runs them by one
# `scan`.

# %%
config = llama.Config(
    512, width=64, depth=3, heads=4, kv_heads=2, head_width=16, mlp_width=128, context=32
)
model = llama.model(config)
params = jax.jit(model.init)(jax.random.key(0))
models.summary(model, params)

# %% [markdown]
# Nothing else is hidden anywhere: the dict is the whole model, so every JAX function takes it as it
# is. How the layers are stacked is storage, not meaning: the fingerprint is the same.

# %%
apart = tree.unstack(params)
print(tree.count(params), "weights,", tree.nbytes(params), "bytes")
print(list(params["blocks"]), list(apart["blocks"]))
print(tree.layer_paths("blocks/0-2/attn/q"))
assert tree.fingerprint(params) == tree.fingerprint(apart)

# %% [markdown]
# ## 2. Model: a frozen record of pure functions
#
# `config`, `init`, `apply`, `init_cache`, `rules`, and `parts = (embed, block, head)`, of which
# `apply` is the composition. With the parts one can run a model a layer at a time, cut it into
# stages, or look at what flows between.

# %%
tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
logits = jax.jit(model.apply)(params, tokens).logits

x, context = model.parts.embed(params, {"tokens": tokens})
entering = []  # what each layer reads: for later
for layer in apart["blocks"].values():
    entering.append(x)
    x, _, _ = model.parts.block(layer, x, context)
print(f"largest difference: {jnp.max(jnp.abs(model.parts.head(params, x) - logits)):.1e}")

# %% [markdown]
# What wraps a model is a model again, and whatever takes a model takes it. An ensemble is the same
# function under `vmap`, over params that have one more axis in front.


# %%
def average(params, inputs, cache=None, rng=None, train=False):
    each = jax.vmap(lambda member: model.apply(member, inputs, rng=rng, train=train).logits)(params)
    return jnp.mean(each, axis=0), {}


parts = models.Parts(average, None, lambda params, x, rng=None, train=False: x)
ensemble = dataclasses.replace(model, parts=parts)
two = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), params)
jax.jit(ensemble.apply)(two, tokens).logits.shape

# %% [markdown]
# ## 3. Rules: what differs from leaf to leaf
#
# An ordered list of (path pattern, value); the pattern must match the whole path, and the first
# that does wins. One language says where leaves lie on a mesh, which train, which decay, how many
# bits they get. Rules see *layers*: where they tell the layers of a segment apart, it is split
# there.

# %%
bits = [("blocks/0/.*", 8), ("blocks/.*/(attn|mlp)/.*", 4), (".*", 16)]
split, values = tree.match(bits, params)
print(list(split["blocks"]))
print(
    {
        path: value
        for path, value in values.items()
        if path.endswith(("embed", "up", "mlp_norm/weight"))
    }
)
print(list(tree.stack(split)["blocks"]))  # the layers are equal again, so they are joined again

# %% [markdown]
# A rule that decides nothing is an error, and so is a leaf that no rule covers. A typing error
# cannot pass in silence.

# %%
for rules in ([("blocks/.*/mpl/up", 4), (".*", 16)], [("blocks/.*", 4), ("norm/weight", 16)]):
    try:
        tree.match(rules, params)
    except InputError as error:
        print(error)

# %% [markdown]
# ## 4. TrainState: everything that a run carries along
#
# A pytree `(step, data_step, params, opt_state, extra)`. The randomness of step `i` is
# `fold_in(seed, i)`, and the batch is a function of the seed and `data_step`, so there is no
# iterator whose place could be lost. To read there is the language reference that every Python
# brings along.

# %%
texts = [data.load_text(name) for name in ("english_train", "english")]
tokenizer = hub.train_bpe([texts[0].text], config.vocab)
windows, unseen = (
    data.windows(tokenizer.encode(text.text), length=33, stride=32) for text in texts
)
stream = data.Stream(windows, batch_size=16)
heldout = data.Stream(unseen, batch_size=16)
print(texts[0].origin, "|", len(windows), "windows to train on,", len(unseen), "held out")

# %% [markdown]
# Six steps without a break, and three, a copy of the state, and three more: the same bits.

# %%
program = train.Program(
    model, train.TrainConfig(seed=0), loss=losses.next_token, optimizer=optax.adam(1e-2)
)


def go_on(state, steps):
    for _ in range(steps):
        state, _ = program.step(state, program.place(stream.batch(state.data_step)))
    return state


copy = jax.device_get(
    go_on(program.init(params=params), 3)
)  # a step uses up the state that it is given
assert tree.fingerprint(go_on(program.init(params=params), 6).params) == tree.fingerprint(
    go_on(copy, 3).params
)

# %% [markdown]
# `fit` is a loop around such a program, with AdamW unless it is given something else.

# %%
settings = train.TrainConfig(steps=150, learning_rate=1e-2, eval_every=30)
state, history = train.fit(model, stream, settings, params=params, heldout=heldout)
scored = [row for row in history if "heldout_loss" in row]
losses = {
    "training": ([row["step"] for row in history], [row["loss"] for row in history]),
    "held out": ([row["step"] for row in scored], [row["heldout_loss"] for row in scored]),
}
plot.curves(losses, "step", "loss, nats per token")

# %% [markdown]
# ## 5. Transform: params to params
#
# Compression is a function from params to params; its recipe is a list of rules whose values are
# chains of methods. A compressed leaf stands where the array stood, so the path, the model and
# every caller stay as they were.

# %%
recipe = [
    ("blocks/0/mlp/.*", compress.parse("rtn(bits=8)")),
    ("blocks/.*/mlp/.*", compress.parse("magnitude(0.5) | rtn(bits=4)")),
    ("embed|head", compress.parse("rtn(bits=8)")),
    (".*", ()),
]
smaller, done = compress.apply(recipe, state.params)
done

# %%
leaf = smaller["blocks"]["1-2"]["mlp"]["up"]
print(
    type(leaf).__name__,
    leaf.shape,
    "| mask",
    leaf.mask.shape,
    leaf.mask.dtype,
    "| values",
    leaf.values.packed.shape,
)

# %% [markdown]
# What does it cost? The same held-out tokens for each version, so that the interval is one of the
# *difference*.

# %%
versions = {"float32": state.params, "the recipe above": smaller}
for name in ("rtn(bits=4, group=32)", "rtn(bits=2, group=32)"):
    versions[name], _ = compress.apply(compress.get_recipe(name), state.params, axes=model.axes)
rows = []
base = None
for name, version in versions.items():
    nll = evaluate.token_nll(model, version, unseen[:64, :32])
    base = nll if base is None else base
    low, high = evaluate.bootstrap(nll - base)
    rows += [
        {
            "version": name,
            "bits": 8 * tree.nbytes(version) / tree.count(version),
            "nll": float(np.mean(nll)),
            "change": float(np.mean(nll - base)),
            "interval": f"{low:+.4f} to {high:+.4f}",
        }
    ]
Rows(
    rows,
    [
        Column("version"),
        Column("bits", "bits a weight"),
        Column("nll", "held-out loss"),
        Column("change", format="{:+.4f}".format),
        Column("interval", "95 % interval"),
    ],
)

# %%
points = {row["version"]: (row["bits"], row["nll"]) for row in rows}
plot.scatter(points, "bits a weight", "held-out loss, nats per token")

# %% [markdown]
# ### What a transform may know: statistics by differentiation
#
# Calibrated methods want to know what flows into each matrix. A `Probe` leaf holds a weight and
# arrays of zeros; the gradient for those zeros is defined to be the statistic. So `jax.grad` of one
# forward pass returns the Gram matrices of all layers, through `scan` and `jit`, with no hooks and
# no second model. Equal to computing them by hand:

# %%
stats = compress.observe(model, params, [tokens], paths="blocks/.*/attn/q", statistics=["gram"])
found = stats["blocks/0-2/attn/q"]
for i, (x, layer) in enumerate(zip(entering, apart["blocks"].values(), strict=True)):
    rows_of_x = ops.rms_norm(x, layer["attn_norm"]["weight"], config.norm_eps).reshape(
        -1, config.width
    )
    difference = jnp.max(jnp.abs(found["gram"][i] - rows_of_x.T @ rows_of_x))
    print(f"layer {i}: {int(found['count'][i])} rows, largest difference {difference:.1e}")

# %% [markdown]
# ### And it still talks
#
# A `Bundle` is a model with its params, tokenizer and card. It is what one saves, loads and
# generates from; compressed leaves are nothing special to it. (After 150 steps nobody should expect
# sense.)

# %%
bundle = hub.Bundle(model, smaller, tokenizer, {"name": "a small GPT, made smaller"})
generate(bundle, "The statement ", max_new_tokens=20, temperature=0.5, seed=0)
