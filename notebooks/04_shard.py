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
# # Sharding
#
# A model file says nothing about devices but a rule list. A mesh shape decides what happens:
# `data`, `fsdp`, `tensor`, `sequence`, `expert` and `pipeline` are turned on by being there, and
# can be combined. This notebook pretends that the CPU is eight devices, trains the same tiny models
# on several meshes, and reads from the compiled programs what they send to each other. It takes
# about two minutes on a laptop; eight devices on two cores are for looking, not for speed.

# %%
from jaxmodel import checkpoint, distributed, losses, sharding

sharding.simulate_devices(8)  # before the first computation

import contextlib
import sys
import tempfile

import jax
import optax

from jaxmodel import data, models, ops, plan, train, tree
from jaxmodel.models import gpt2, llama
from jaxmodel.models.contents import sharding_text
from jaxmodel.progress import set_quiet
from jaxmodel.report import Column, Rows

set_quiet()


# %% [markdown]
# ## Rules
#
# A rule gives the axes of the mesh that cut the logical axes of one layer's leaf. Axes that a mesh
# lacks are left out, so the same rules serve every mesh. `("tensor", "fsdp")` of a weight
# `[out, in]` is a weight cut by columns over `tensor` and by rows over `fsdp`.

# %%
model = gpt2.model(
    gpt2.Config(vocab=256, width=32, depth=2, heads=4, context=32), ops.Policy(axes=ops.MESH_AXES)
)
rows = [
    row
    for row in models.summary(model)
    if row["layers"] == 1 or row["path"].endswith(("/q", "/o", "/up", "weight"))
]
Rows(
    rows,
    [
        Column("path"),
        Column("shape", format=lambda shape: " x ".join(map(str, shape))),
        Column("sharding", format=sharding_text),
    ],
)

# %% [markdown]
# ## The same training on every mesh
#
# One line is different: the mesh. The losses are those of one device up to rounding. `sequence`
# runs attention as a ring (each device holds a part of the text and passes its keys on), `pipeline`
# runs the layers in stages.

# %%
rows = data.windows(list(data.load_text("pydoc").text.encode()[:20000]), 33, stride=32)
stream = data.Stream(rows, batch_size=8)
config = train.TrainConfig(steps=3, log_every=1, warmup_steps=0)
found = []
for mesh in (None, "data=8", "fsdp=4,tensor=2", "sequence=4,data=2", "pipeline=2,fsdp=2"):
    made = None if mesh is None else sharding.make_mesh(mesh)
    _, history = train.fit(model, stream, config, mesh=made)
    found.append(
        {"mesh": mesh or "one device", **{f"step {row['step']}": row["loss"] for row in history}}
    )
Rows(found, [Column("mesh"), *(Column(f"step {i}", format="{:.6f}".format) for i in (1, 2, 3))])

# %% [markdown]
# ## What they send
#
# `plan.collectives` reads the compiled program: which collectives, of how many bytes, how often.
# For data parallelism the theory says two times the bytes of the gradients G for each step; a ring
# passes keys and values on, layer by layer. (XLA on a CPU has no reduce-scatter. For a TPU that is
# not here, `plan.topology("v5e:2x4")` compiles the real program.)

# %%
# a Llama, whose head is not tied: of a tied embedding XLA on a CPU sums the two gradients apart
untied = llama.model(llama.Config(256, 32, 2, 4, 2, 8, 64, 32), ops.Policy(axes=ops.MESH_AXES))
shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in stream.batch(0).items()}
gradients = tree.nbytes(jax.eval_shape(untied.init, jax.random.key(0)))
sent = []
for mesh in ("data=8", "fsdp=8"):
    program = train.Program(
        untied, loss=losses.next_token, optimizer=optax.sgd(0.1), mesh=sharding.make_mesh(mesh)
    )
    compiled = program.compile(shapes)
    for kind, count in plan.moved(plan.collectives(compiled)).items():
        sent.append({"mesh": mesh, "kind": kind, "bytes": count, "times G": count / gradients})
Rows(
    sent,
    [
        Column("mesh"),
        Column("kind"),
        Column("bytes", format="{:,.0f}".format),
        Column("times G", format="{:.3f}".format),
    ],
)

# %% [markdown]
# ## Moving
#
# A checkpoint belongs to no mesh. What eight devices saved as `data` is restored as `fsdp` and
# `tensor`, bit for bit, and the stream goes on with the same batches.

# %%
folder = tempfile.mkdtemp()
settings = train.TrainConfig(steps=4, log_every=1)


class Watched(checkpoint.Checkpoints):
    """Checkpoints that print what they restore."""

    def restore(self, like, **options):
        state = super().restore(like, **options)
        if state is not None:
            print(
                "restored on",
                dict(jax.tree.leaves(state.params)[0].sharding.mesh.shape),
                checkpoint.fingerprint(state)[:16],
            )
        return state


for mesh, until in (("data=8", 2), ("fsdp=4,tensor=2", 4)):
    with contextlib.redirect_stderr(sys.stdout), Watched(folder) as checkpoints:
        state, _ = train.fit(
            model,
            stream,
            settings,
            mesh=sharding.make_mesh(mesh),
            checkpoints=checkpoints,
            supervisor=distributed.RunMonitor(stop=lambda step, until=until: step == until),
        )
        print("step", int(state.step), "on", mesh, checkpoint.fingerprint(state)[:16])

# %% [markdown]
# ## What does not fit is said
#
# A mesh that does not divide a leaf names the leaf, the axis and the length; a batch that does not
# divide, likewise.

# %%
for mesh in ("tensor=5", "data=3", "fdsp=8"):
    try:
        train.fit(model, stream, config, mesh=sharding.make_mesh(mesh))
    except ValueError as error:
        print(error)
