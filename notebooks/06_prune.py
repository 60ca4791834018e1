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
# # Pruning
#
# A method of compression is a pure function `Draft, statistics, key -> Draft`: a recipe names
# methods by their text, and what one has decided no later one undoes. This notebook trains a small
# decoder on bytes of Python's documentation, makes half of its weights zero in several ways, trains
# on with exact zeros, and at last takes whole units out of the model. It needs no download and
# takes about a minute on a laptop.

# %%
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import compress, data, evaluate, hub, leaves, optim, train, tree
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
# ## Half of the weights
#
# `magnitude` drops the smallest weights. `wanda` weighs each by the size of the input that it
# meets, and `sparsegpt` lets the weights that stay make up for those that go. The last two want to
# know the inputs, so `calibrate` measures them. The report has the error of each layer's output on
# batches that were held out.

# %%
LAYERS = "blocks/.*/mlp/.*"


half = [(LAYERS, "sparsegpt(0.5)"), (".*", "")]
sparse, report = compress.calibrate(model, params, half, batches)
report

# %%
report.plot()

# %% [markdown]
# How far can one go? The statistics are a value, measured once for all that follows.

# %%
stats = compress.observe(model, params, batches, LAYERS, ("gram", "square"))


def pruned(chain):
    return compress.apply([(LAYERS, chain), (".*", "")], params, stats)


fractions = (0.3, 0.5, 0.6, 0.7)
names = ("random", "magnitude", "wanda", "sparsegpt")  # each is compiled for each fraction
lost = {
    name: (fractions, [float(nats(pruned(f"{name}({part})")[0])) for part in fractions])
    for name in names
}
plot.curves(lost, "fraction of zeros", "nats a byte on held-out text", "Four ways to prune")

# %% [markdown]
# ## Patterns, and what they cost to store
#
# Two of four neighbours, which some processors run twice as fast; blocks, which are stored without
# a mask; and a chain that rounds what is left to four bits. The zeros stay zero.

# %%
rows = []
for chain in (
    "magnitude(0.5)",
    "magnitude(pattern=(2, 4))",
    "sparsegpt(pattern=(2, 4))",
    "magnitude(0.5, block=(16, 16))",
    "sparsegpt(pattern=(2, 4)) | gptq(4)",
):
    small, done = pruned(chain)
    up = next(row for row in done.leaves if row["path"].endswith("up"))
    rows.append(
        {
            "chain": chain,
            "bits a weight": round(up["bits_per_weight"], 2),
            "zeros": round(up["zeros"], 3),
            "nats": round(float(nats(small)), 3),
        }
    )
Rows(rows)

# %% [markdown]
# ## By the gradient, round after round
#
# A connection whose gradient is below a threshold is pruned, all gradients are computed again, and
# so on until no connection passes: what is pruned changes the gradients of the others. Here it ends
# after twelve rounds.

# %%
recipe = [(LAYERS, "gradient(threshold=1e-6)"), (".*", "")]
_, rounds = compress.prune_in_rounds(model, params, recipe, batches, most=12)
plot.curves(
    {"zeros": ([r.number for r in rounds], [r.zeros for r in rounds])},
    "round",
    "zeros",
    "What each round adds",
)

# %% [markdown]
# ## Training on, with exact zeros
#
# `optim.keep` wraps any optimiser. The zeros that it finds at its start stay exactly zero, and the
# other weights win back most of what pruning cost.

# %%
small, _ = pruned("magnitude(0.7)")
plain = tree.map_leaves(lambda _, leaf: leaves.decode(leaf), small)
again = train.TrainConfig(steps=60, learning_rate=3e-3)
optimizer = optim.keep(optax.adamw(3e-3))
trained, _ = train.fit(model, stream, again, params=plain, optimizer=optimizer)
share = lambda tree_: float(jnp.mean(tree_["blocks"]["0-1"]["mlp"]["up"] == 0))
print(f"zeros {share(plain):.3f} -> {share(trained.params):.3f}")
print(f"nats  {nats(plain):.3f} -> {nats(trained.params):.3f}")

# %% [markdown]
# ## Whole units
#
# Zeros in a mask make a file smaller. Units that are gone make the model faster as well: `shrink`
# removes the neurons of the MLPs that do least, in all leaves that hold them, and returns a model
# of that shape. It computes what the model with these units masked computes.

# %%
bundle = hub.Bundle(model, params)
thin = compress.Recipe([(".*", "")], transforms="shrink(0.75, units='F', score='activity')")
smaller, done = compress.compress_bundle(bundle, thin, batches=batches)
print(smaller.model.config.mlp_width, "neurons instead of", model.config.mlp_width)
print(f"{tree.count(params):,} -> {tree.count(smaller.params):,} weights")
after = evaluate.perplexity(smaller.model, smaller.params, unseen).nll
print(f"{nats(params):.3f} -> {after:.3f} nats")
