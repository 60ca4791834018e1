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
# # Quantisation
#
# A chain of methods gives the weights of a matrix a grid: which values are allowed, how each weight
# is rounded to one of them, and what is done before and after to lose less. The result is a leaf
# that stands where the array stood, a few bits for each weight. This notebook trains a small
# decoder on bytes of Python's documentation and rounds it. It needs no download and takes about a
# minute on a laptop.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import compress, data, evaluate, hub, losses, train, tree
from jaxmodel.compress.sensitivity import draw
from jaxmodel.models import llama
from jaxmodel.progress import set_quiet
from jaxmodel.report import Rows, plot

set_quiet()  # no progress lines between the cells

text, held = (
    np.frombuffer(data.load_text(name).text.encode(), np.uint8)
    for name in ("english_train", "english")
)
stream = data.Stream(data.windows(text, length=65, stride=64), batch_size=16)
unseen = data.windows(held, length=64, limit=64)
seen = jnp.asarray(data.windows(text, length=64, limit=128))
batches = [seen[i : i + 32] for i in range(0, 128, 32)]

model = llama.model(
    llama.Config(
        256, width=64, depth=2, heads=4, kv_heads=2, head_width=16, mlp_width=192, context=64
    )
)
config = train.TrainConfig(steps=250, learning_rate=1e-2)
state, _ = train.fit(model, stream, config)
params = state.params


def nats(params):
    return evaluate.perplexity(model, params, unseen).nll


print(f"{tree.count(params):,} weights, {nats(params):.3f} nats a byte on held-out text")

# %% [markdown]
# ## Grids
#
# Four bits are sixteen values. Even steps reach to the largest weight; NF4 has the quantiles of a
# normal distribution; `equalised` puts equally many weights on each value. Below is what each makes
# of the weights of one matrix, in order of their size.

# %%
weight = params["blocks"]["0-1"]["mlp"]["up"][0]
order = jnp.argsort(weight[0])
lines = {
    text: (np.arange(order.size), np.asarray(compress.parse(text)[0](weight).decode()[0][order]))
    for text in ("rtn(3)", "nf4()", "equalised(3)")
}
plot.curves(lines, "weight, by size", "value", "One row of a matrix on three grids")

# %% [markdown]
# ## Rounding that knows its inputs
#
# `rtn` rounds each weight to the nearest value. `gptq` goes through the columns of a matrix and
# lets those that follow make up for the error, by what the inputs are. The statistics are measured
# once. (`turn() | gptq(4)` rotates the inputs first, which helps large models, where a few inputs
# are much larger than the others.)

# %%
LAYERS = "blocks/.*/mlp/.*"
stats = compress.observe(model, params, batches, LAYERS, ("gram", "square"))


def rounded(chain):
    return compress.apply([(LAYERS, chain), (".*", "")], params, stats)


bits = (2, 3, 4)
chains = ("rtn({})", "gptq({})")
lost = {
    chain.format("b"): (bits, [nats(rounded(chain.format(b))[0]) for b in bits]) for chain in chains
}
plot.curves(lost, "bits", "nats a byte on held-out text", "Two ways to round")

# %% [markdown]
# ## What is stored
#
# All bits count: codes, scales, tables and masks.

# %%
rows = []
for chain in (
    "rtn(8)",
    "gptq(4)",
    "gptq(4, group=64)",
    "nf4(group=64)",
    "fp8()",
    "ternary()",
    "binary()",
):
    small, done = rounded(chain)
    up = next(row for row in done.leaves if row["path"].endswith("up"))
    rows.append(
        {
            "chain": chain,
            "bits a weight": round(up["bits_per_weight"], 3),
            "error of the weights": round(up["relative_error"], 4),
            "nats": round(nats(small), 3),
        }
    )
Rows(rows)

# %% [markdown]
# ## Transforms
#
# What concerns several leaves comes before the chains. `smooth` moves the size of inputs into
# weights, `rotate` turns the whole residual stream; the model computes the same as before.

# %%
bundle = hub.Bundle(model, params)
keep = [(".*", "")]
want = jax.jit(model.apply)(params, seen[:4]).logits
for transforms in ("smooth(0.5)", "awq()", "rotate()"):
    recipe = compress.Recipe(keep, transforms=transforms)
    other, _ = compress.compress_bundle(bundle, recipe, batches=batches)
    got = jax.jit(other.model.apply)(other.params, seen[:4]).logits
    print(f"{transforms:12s} largest change of a logit {jnp.max(jnp.abs(got - want)):.1e}")

# %% [markdown]
# ## A recipe for the whole model
#
# `int4` is one recipe for all families: what it does to a leaf follows from the leaf's role. The
# report says what it cost on batches that were held out.

# %%
small, report = compress.compress_bundle(bundle, compress.get_recipe("int4"), batches=batches)
report

# %% [markdown]
# Which layers bear it? `sensitivity` compresses one at a time.

# %%
versions = {f"{b} bits": lambda b=b: rounded(f"rtn({b})")[0] for b in (2, 3, 4)}
draw(compress.sensitivity(model, params, versions, unseen[:16]))

# %% [markdown]
# ## Keys and values
#
# What `generate` keeps of the tokens so far can be codes too, with a scale for each head of each
# token.

# %%
for dtype in ("bfloat16", "int8", "int4"):
    policy = dataclasses.replace(model.policy, cache_dtype=dtype)
    cache = model.with_policy(policy).init_cache(1, 64)
    print(f"{dtype:9s} {tree.nbytes(cache)} bytes")

# %% [markdown]
# ## Training that knows what will be stored
#
# `aware` is a loss of the weights that a recipe would store, with straight-through gradients: any
# loop can train with it. One bit for each weight is too little for rounding afterwards, and enough
# when the training knows of it.

# %%
one_bit = compress.Recipe([(LAYERS, "binary()"), (".*", "")])
aware = compress.aware(losses.next_token, one_bit)
trained, _ = train.fit(model, stream, config, loss=aware)
for name, weights in (("afterwards", params), ("in training", trained.params)):
    binary, done = compress.apply(one_bit, weights)
    print(f"{name:12s} {nats(binary):.3f} nats")
