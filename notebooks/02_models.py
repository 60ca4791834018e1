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
# # Models
#
# Every architecture is one file of `jaxmodel/models/`: a frozen `Config`, named `SIZES`, `axes` of
# the leaves, and `model(config)`, which gives the same record of pure functions, whatever the
# architecture. This notebook shows what there is and what can be done with all of it. It needs no
# download and takes about a minute on a laptop.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxmodel
from jaxmodel import adapt, compress, data, generation, losses, models, train, tree
from jaxmodel.data import synthetic
from jaxmodel.models import connected, mlp, rnn
from jaxmodel.progress import set_quiet
from jaxmodel.report import Column, Rows, plot

set_quiet()  # no progress lines between the cells


# %% [markdown]
# ## What there is
#
# Families and their sizes are found, not registered: a new file is in this table, and in the
# contract tests, as soon as it is there. Parameters are counted from shapes alone, so nothing big
# is made (`jaxmodel models` shows all sizes).

# %%
rows = []
for family, module in models.families().items():
    named = [size for size in module.SIZES if not size.startswith("tiny")]
    shapes = jax.eval_shape(module.model(module.SIZES[named[-1]]).init, jax.random.key(0))
    rows.append(
        {"family": family, "sizes": ", ".join(named), "parameters of the last": tree.count(shapes)}
    )
Rows(
    rows,
    [
        Column("family"),
        Column("sizes", align="left"),
        Column("parameters of the last", format="{:,}".format),
    ],
)

# %% [markdown]
# A model says what it reads. With that, the same line runs a language model, an encoder of text or
# of images, a translator and a classifier:

# %%
rows = []
for name in ("llama/tiny-moe", "bert/tiny", "t5/tiny", "vit/tiny", "resnet/tiny", "mlp/tiny"):
    module, config = models.sizes()[name]
    model = module.model(config)
    inputs = model.inputs(2, 8)  # shapes for a batch of 2 and a length of 8
    out = jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), inputs)
    reads = ", ".join(f"{key} {list(a.shape)}" for key, a in inputs.items())
    rows.append(
        {
            "model": name,
            "reads": reads,
            "logits": list(out.logits.shape),
            "decodes": model.init_cache is not None,
        }
    )
Rows(rows)

# %% [markdown]
# ## The smallest file, and rules for its first weights
#
# `models/mlp.py` is the one to read first. Initialisers are rules as well: whatever a rule leaves
# to the model (`None`) starts as the model starts it.

# %%
config = mlp.Config(features=2, widths=(64, 64, 64), classes=2)
model = mlp.model(config)
rules = [
    ("blocks/0/dense", "lecun"),
    ("blocks/.*/dense", "orthogonal"),
    ("head", "zeros"),
    (".*", None),
]
params = adapt.initialize(model, jax.random.key(0), rules)
models.summary(model, params)

# %% [markdown]
# Two spirals, which no line parts. The stream is a function of seed and step; `fit` is the loop.

# %%
rng = np.random.default_rng(0)
label = rng.integers(0, 2, 1024)
turn = np.sqrt(rng.uniform(0.05, 1, 1024)) * 3 * np.pi
angle = turn + np.pi * label
points = np.stack([turn * np.cos(angle), turn * np.sin(angle)], axis=1) / (3 * np.pi) + rng.normal(
    0, 0.01, (1024, 2)
)
spirals = {"features": points.astype(np.float32), "labels": label.astype(np.int32)}
stream = data.Stream({name: a[:768] for name, a in spirals.items()}, batch_size=128)
settings = train.TrainConfig(steps=600, learning_rate=5e-3, weight_decay=0.0, log_every=20)
state, history = train.fit(model, stream, settings, params=params, loss=losses.classification)
predict = jax.jit(models.predict_fn(model))
right = (
    np.argmax(predict(state.params, spirals["features"][768:]), axis=-1) == spirals["labels"][768:]
)
print(f"{np.mean(right):.1%} of the held-out points")
assert np.mean(right) > 0.95

# %% [markdown]
# ## Weights that other people trained
#
# `from_pretrained` takes a folder in the layout of HF, a `.gguf` file, a hub id, or a name of a
# package that carries weights. A bundle shows its tree, to be folded out.

# %%
minilm = jaxmodel.from_pretrained("all-minilm-l6-v2")
minilm

# %%
sentences = [
    "A man is eating a piece of bread.",
    "Somebody has his lunch.",
    "The stock market fell by three percent.",
    "Shares lost some of their value.",
]
vectors = jaxmodel.embed_texts(minilm, sentences)
rows = [
    {"": text, **{str(i): float(a @ b) for i, b in enumerate(vectors)}}
    for text, a in zip(sentences, vectors, strict=True)
]
Rows(rows, [Column("", align="left"), *(Column(str(i), format="{:.2f}".format) for i in range(4))])

# %% [markdown]
# It is a bundle as any other: what compresses one compresses this one, and nothing else has to
# know.

# %%
smaller, done = compress.compress_bundle(minilm, compress.get_recipe("int8-weight"))
cosines = np.sum(jaxmodel.embed_texts(smaller, sentences) * vectors, axis=-1)
print(
    f"{done.bytes_before / 1e6:.0f} MB -> {done.bytes_after / 1e6:.0f} MB; cosine with the "
    f"original >= {cosines.min():.4f}"
)
assert cosines.min() > 0.99

# %% [markdown]
# ## From one sequence to another
#
# A recurrent encoder and a decoder with attention learn to turn words around; `beam_search` takes
# any model that decodes.

# %%
pairs = data.SyntheticSeq2Seq(("reverse",), batch_size=64, seed=0)
model = rnn.model(rnn.Config(synthetic.VOCAB, width=64, depth=1, cell="gru", attention="additive"))
settings = train.TrainConfig(steps=300, learning_rate=5e-3, log_every=10)
state, history = train.fit(model, pairs, settings)
plot.curves(
    {"reverse": ([h["step"] for h in history], [h["loss"] for h in history])},
    "step",
    "loss, nats per token",
)

# %%
unseen = data.SyntheticSeq2Seq(("reverse",), batch_size=4, seed=1, part="test")
batch = unseen.batch(0)
given = {name: jnp.asarray(batch[name]) for name in ("source", "source_mask")}
found = generation.beam_search(
    model, state.params, given, beams=4, max_new_tokens=synthetic.TARGET, eos_ids=(synthetic.END,)
)
rows = [
    {"source": source, "wanted": target, "best of 4": synthetic.decode(found.tokens[i, 0])}
    for i, (source, target) in enumerate(unseen.texts(0))
]
Rows(rows)

# %% [markdown]
# ## How things are connected
#
# Several inputs, and a pattern that says which of them reaches which group of outputs. Each edge
# has a factor that is learnt and can be read afterwards. Here only `light` and `heat` have to do
# with the answer; `noise` has not.

# %%
config = connected.Config(
    branches=(("light", 4), ("heat", 4), ("noise", 4)),
    classes=2,
    width=16,
    depth=1,
    features=16,
    merge="groups",
    edges=(("light", "left"), ("heat", "left"), ("heat", "right"), ("noise", "right")),
    importance=True,
)
model = connected.model(config)
columns = {name: rng.normal(size=(2048, 4)).astype(np.float32) for name, _ in config.branches}
answer = (columns["light"][:, 0] * columns["heat"][:, 1] + columns["heat"][:, 2] > 0).astype(
    np.int32
)
stream = data.Stream({**columns, "labels": answer}, batch_size=128)
settings = train.TrainConfig(steps=400, learning_rate=3e-3, weight_decay=0.0, log_every=50)
state, history = train.fit(model, stream, settings, loss=losses.classification)
importances = connected.importances(config, state.params)
Rows(
    [{"edge": edge, "importance": value} for edge, value in importances.items()],
    [Column("edge"), Column("importance", format="{:.2f}".format)],
)

# %% [markdown]
# ## Somebody else's module
#
# A Flax module that was not written here becomes a model too, and takes part in all that asks for a
# function of weights and inputs. (Its matrix products are not ours, so it has no compressed
# arithmetic of its own.)


# %%
class Theirs(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(32)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(2)(x)


model = models.from_linen(Theirs(), {"features": jax.ShapeDtypeStruct((1, 2), jnp.float32)})
stream = data.Stream(spirals, batch_size=128)
state, history = train.fit(
    model, stream, train.TrainConfig(steps=50, log_every=25), loss=losses.classification
)
print([round(row["loss"], 3) for row in history])
print({path: leaf.shape for path, leaf in tree.flatten(state.params).items()})
