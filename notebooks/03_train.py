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
# # Training
#
# A run is a pure function of its config: the batch of a step is a function of `(seed, data_step)`,
# all randomness of a step is folded from the same numbers, and what a run carries from step to step
# is one pytree, the `TrainState`. So a run can be stopped, killed, moved, replayed and repeated,
# and ends in the same bits. This notebook shows it at toy size; it needs no download and takes
# about a minute on a laptop.

# %%
import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import checkpoint, data, distributed, losses, optim, train, tree
from jaxmodel.data import augment
from jaxmodel.models import gpt2, mlp
from jaxmodel.progress import set_quiet
from jaxmodel.report import Column, Rows, plot

set_quiet()  # no progress lines between the cells
ROOM = Path(tempfile.mkdtemp())


# %% [markdown]
# ## Data
#
# Two texts of different kinds, as bytes: packed into bins so that no position is wasted and no
# document sees another, and mixed three to one. The mixture is exact at every prefix, and the batch
# of any step is there in milliseconds.


# %%
def packed(documents, width=64):
    return data.pack([list(text.encode()[:300]) for text in documents], width + 1)


prose = packed(data.split_documents(data.load_text("pydoc").text)[:500])
tables = packed(f"{a} times {b} is {a * b}.\n" * 3 for a in range(2, 30) for b in range(2, 30))
stream = data.Mixture([(data.Stream(prose, 16), 3), (data.Stream(tables, 16), 1)], batch_size=16)
print(
    f"fill {prose.fill:.3f} and {tables.fill:.3f}; the batch of step 10^9:",
    stream.batch(10**9)["tokens"].shape,
)

# %% [markdown]
# ## Fit
#
# `fit(model, stream, config)` makes a `train.Program` and runs it: `init`, `place` and `step`,
# which a loop of yours calls as well. The config is plain values; what differs by leaf is rules.

# %%
model = gpt2.model(gpt2.Config(vocab=256, width=64, depth=2, heads=4, context=64))
config = train.TrainConfig(
    steps=90,
    learning_rate=3e-3,
    schedule="wsd",
    warmup_steps=10,
    gradient_accumulation_steps=2,
    ema_decay=0.95,
    log_every=10,
    save_every=20,
)
state, history = train.fit(model, stream, config, heldout=data.Stream(prose, 16, seed=1))
history[::3]

# %% [markdown]
# ## Learning rates
#
# Six schedules by name. `find_lr` looks for the peak: the rate grows from step to step until the
# loss diverges, and the suggestion is where it falls fastest.

# %%
steps = np.arange(0, 200)
curves = {
    name: (steps, [float(optim.schedule(name, 1.0, 200, warmup_steps=20)(i)) for i in steps])
    for name in ("constant", "step", "cosine", "wsd", "one_cycle")
}
plot.curves(curves, "step", "share of the peak", "Schedules")

# %%
search = train.find_lr(model, stream, losses.next_token, steps=60)
print(f"suggestion: {search.suggestion:.1e}")
search

# %% [markdown]
# ## Killed anywhere, it ends in the same bits
#
# Checkpoints are asynchronous, and count only when their manifest with all digests is written.
# `fit` writes down with them which config, loss and data they belong to, and refuses to go on as
# another run. Here a run is stopped at step 47; another process could go on from what it left.

# %%
folder = ROOM / "checkpoints"
stop = distributed.RunMonitor(stop=lambda step: step == 47)
stopped, _ = train.fit(model, stream, config, checkpoints=folder, supervisor=stop)
print("saved steps:", checkpoint.Checkpoints(folder, read_only=True).steps())
with contextlib.redirect_stderr(sys.stdout):
    resumed, _ = train.fit(model, stream, config, checkpoints=folder)
same = checkpoint.fingerprint(resumed) == checkpoint.fingerprint(state)
print("stopped at", int(stopped.step), "- the same SHA-256 at the end:", same)

# %% [markdown]
# A byte that was flipped on the disk is found before anything is read, and the step before is
# taken:

# %%
newest = sorted(folder.glob("step-*"))[-1]
victim = max(newest.rglob("d/*"), key=lambda file: file.stat().st_size)
content = bytearray(victim.read_bytes())
content[100] ^= 1
victim.write_bytes(content)
with contextlib.redirect_stderr(sys.stdout), checkpoint.Checkpoints(folder) as checkpoints:
    print("newest good step:", checkpoints.latest())

# %% [markdown]
# ## A bad batch is as if it had never come
#
# A step whose loss is not finite (or a spike, with `spike=6`) is left out in the graph, without a
# look by the host. The parameters are, bit for bit, those of a stream without that batch. If the
# data themselves are not finite, one line says which.


# %%
class Broken:
    """The same stream, with weights that are not finite in the batch of step 5."""

    batch_size = stream.batch_size
    fingerprint = "broken"

    def batch(self, step, rows=slice(None)):
        batch = stream.batch(step, rows)
        return batch | {"weights": np.full_like(batch["weights"], np.inf)} if step == 5 else batch


with contextlib.redirect_stderr(sys.stdout):
    _, rows = train.fit(model, Broken(), train.TrainConfig(steps=8, log_every=1))
Rows(rows, [Column("step"), Column("loss", format="{:.3f}".format), Column("bad")])

# %% [markdown]
# ## Losses and rules
#
# A loss on logits and labels is a function that gives a value for each row; one factory makes a
# loss of the model of it. Here two fifths of the labels of a toy problem are wrong, and a loss that
# was made for that is right more often.

# %%
random = np.random.default_rng(0)
features = random.normal(size=(4000, 16)).astype(np.float32)
labels = (features @ random.normal(size=(16, 4))).argmax(-1).astype(np.int32)
noisy = np.where(random.random(4000) < 0.4, random.integers(0, 4, 4000), labels).astype(np.int32)
fitting, testing = data.split(4000, (0.7, 0.3), seed=0, labels=labels)
rows = data.Stream(data.subset({"features": features, "labels": noisy}, fitting), 100)
judge = mlp.model(mlp.Config(16, (128,), 4))


def accuracy(params):
    inputs = {"features": jnp.asarray(features[testing])}
    found = jax.jit(judge.apply)(params, inputs).logits.argmax(-1)
    return float((found == labels[testing]).mean())


found = []
for name, each in {
    "cross entropy": losses.softmax_cross_entropy,
    "generalised cross entropy": functools.partial(losses.generalized_cross_entropy, q=0.7),
}.items():
    trained, _ = train.fit(
        judge,
        rows,
        train.TrainConfig(steps=600, learning_rate=3e-3, weight_decay=0.0),
        loss=losses.supervised(each),
    )
    found.append({"loss": name, "test accuracy": accuracy(trained.params)})
Rows(found, [Column("loss"), Column("test accuracy", format="{:.3f}".format)])

# %% [markdown]
# What trains, what decays, what is penalised: always rules, path to value. Here only the last layer
# trains, and its weights are drawn towards zero.

# %%
before = jax.jit(judge.init)(jax.random.key(0))
sparse = losses.regularized(losses.classification, [("head", "l1(1e-2)"), (".*", None)])
config = train.TrainConfig(
    steps=50, learning_rate=1e-2, trainable=(("head.*", True), (".*", False))
)
after = train.fit(judge, rows, config, params=before, loss=sparse)[0].params
changed = [
    path
    for path, leaf in tree.flatten(before).items()
    if not np.array_equal(leaf, tree.flatten(after)[path])
]
print("changed:", changed)

# %% [markdown]
# ## Augmentation
#
# `augment(key, batch) -> batch` runs inside of the step, on the mesh, and is part of the run's
# config by its text.

# %%
chain = augment.parse("affine(15, scale=0.2) | noise(0.05) | cutout(2)")
y, x = np.mgrid[0:8, 0:8]
disc = (((y - 3.5) ** 2 + (x - 3.5) ** 2) < 9).astype(np.float32)
batch = {"pixels": np.broadcast_to(disc[None, :, :, None], (4, 8, 8, 1))}
changed = jax.jit(chain)(jax.random.key(0), batch)["pixels"][..., 0]
print(chain)
for row in np.asarray(changed[0]):
    print(" ".join("#" if value > 0.5 else "." for value in row))
