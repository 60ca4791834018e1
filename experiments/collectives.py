"""What a training step sends along each axis of a mesh, read from the compiled program, against the
formula.

The step of a Llama (with 8 experts for the axis `expert`) in float32, compiled and not run: for
eight simulated CPU devices, 12 layers 768 wide with 16 rows of 1,024 tokens, and for a TPU v5e that
is not here (libtpu, of the extra `plan`), 4 layers 128 wide with 64 tokens. G are the bytes of the
gradients, P of the parameters (here equal), act of the activations of a batch `B T D`, L layers, n
devices:

  data       2G
  fsdp       on the TPU G scattered and 2P gathered; on a CPU, where XLA has no reduce-scatter, 2G +
             2P
  tensor     2 act (4L + 2): two sums a layer forward and two backward, the embedding's and the
             head's; on the TPU
  sequence   L (n - 1) 6 kv + 2G, with kv a device's keys (or values): k, v forward, k, v and their
             gradients backward
  expert     L (16 + 20 k / D) act + 2 (G without the experts), k experts a token; the tokens' way
             to the experts and back
  pipeline   2 act (n - 1) / n between the stages, 4 act and the rotary tables at their ends, 2 (G
             without the layers): GPipe
  1f1b       2 act (n - 1) / n between the stages, 2 (G without the layers), the batch

Command:  python experiments/collectives.py [--quick] [--seed N] --json -
Cost:     about 4 minutes on two cores; --quick, where the CPU has the small model too, half of
  that.
Goals:    bytes of all collectives of a step at most 1.02 of the formula, on both; no kind of
  collective that the formula has not.
Measured: all goals met: CPU 1.0000 for each axis but fsdp, which is 0.9083, since what is outside
          of the layers is gathered once; v5e 1.0000 for data, sequence, expert, pipeline and 1f1b,
          1.0013 for tensor, 0.9718 for fsdp. The large model on the v5e, once and by hand, since
          its compiler takes minutes: data 1.0000, fsdp 0.9389.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import losses, ops, plan, report, sharding, train, tree
from jaxmodel.models import llama
from jaxmodel.progress import progress
from jaxmodel.train.pipeline import one_forward_one_backward

TOPOLOGY = "v5e:2x4"
MESHES = {"data": 8, "fsdp": 8, "tensor": 8, "sequence": 8, "expert": 8, "pipeline": 4, "1f1b": 4}
REAL = llama.Config(32000, 768, 12, 8, 8, 96, 2048, 1024)
SMALL = llama.Config(512, 128, 4, 8, 8, 16, 256, 64)


def formula(
    axis: str, n: int, config: llama.Config, rows: int, length: int, params: tree.Params, cpu: bool
) -> dict[str, float]:
    """Bytes by kind of collective."""
    gradients = tree.nbytes(params)
    layers = tree.nbytes(params["blocks"])
    act = rows * length * config.width * 4
    experts = sum(
        tree.nbytes(leaf)
        for path, leaf in tree.flatten(params).items()
        if re.fullmatch(".*/(gate|up|down)", path)
    )
    if axis == "data":
        return {"all-reduce": 2 * gradients}
    if axis == "fsdp":
        sums = (
            {"all-reduce": 2 * gradients} if cpu else {"reduce-scatter": gradients, "all-reduce": 0}
        )
        return {**sums, "all-gather": 2 * gradients}
    if axis == "tensor":
        return {"all-reduce": 2 * act * (4 * config.depth + 2)}
    if axis == "sequence":
        part = rows * config.kv_heads * config.head_width * length // n * 4
        return {
            "collective-permute": config.depth * (n - 1) * 6 * part,
            "all-reduce": 2 * gradients,
        }
    if axis == "expert":
        small = 4 * config.experts_per_token * act / config.width / 4
        tokens = {"all-gather": 2 * act + 2 * small, "reduce-scatter": 2 * act + small}
        return {kind: config.depth * each for kind, each in tokens.items()} | {
            "all-reduce": 2 * (gradients - experts)
        }
    hops = 2 * act * (n - 1) / n
    batch = 2 * rows * length * 4
    outside = {"collective-permute": hops, "all-reduce": 2 * (gradients - layers)}
    if axis == "1f1b":
        return {**outside, "all-gather": batch}
    return {
        **outside,
        "all-gather": 2 * act + rows * length * config.head_width * 4,
        "reduce-scatter": 2 * act,
    }


def sent(
    axis: str, n: int, config: llama.Config, rows: int, length: int, devices: list[Any] | None
) -> dict[str, int]:
    """Bytes by kind of collective of the compiled step."""
    mesh = sharding.make_mesh({"pipeline" if axis == "1f1b" else axis: n}, devices)
    model = llama.model(config, ops.Policy(axes=ops.MESH_AXES, microbatches=4 * n if n == 4 else 0))
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "targets")
    }
    if axis != "1f1b":
        program = train.Program(model, loss=losses.next_token, optimizer=optax.sgd(0.1), mesh=mesh)
        return plan.moved(plan.collectives(program.compile(batch)))
    params, places = sharding.shardings(
        model.rules, jax.eval_shape(model.init, jax.random.key(0)), mesh
    )
    placed = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    cut = {name: placed(a, jax.NamedSharding(mesh, jax.P("pipeline"))) for name, a in batch.items()}
    with jax.set_mesh(mesh):
        run = jax.jit(
            one_forward_one_backward(model, losses.next_token), out_shardings=(None, places)
        )
        return plan.moved(
            plan.collectives(run.lower(jax.tree.map(placed, params, places), cut).compile())
        )


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Every axis on both machines."""
    sharding.simulate_devices(8)
    rows = 16
    small = (SMALL, 64)
    large = (REAL, 1024)
    machines: dict[str, list[Any] | None] = {"CPU": None}
    if importlib.util.find_spec("libtpu"):
        machines["v5e"] = plan.topology(TOPOLOGY)
    cases = [
        (machine, axis, n)
        for machine in machines
        for axis, n in MESHES.items()
        if (machine, axis) != ("CPU", "tensor")
    ]
    entries: list[tuple] = []
    for machine, axis, n in progress(cases, "programs"):
        config, length = small if quick or machine != "CPU" else large
        of_axis = dataclasses.replace(config, experts=8) if axis == "expert" else config
        params = jax.eval_shape(llama.model(of_axis).init, jax.random.key(0))
        expected = formula(axis, n, of_axis, rows, length, params, machine == "CPU")
        found = sent(axis, n, of_axis, rows, length, machines[machine])
        other = sum(size for kind, size in found.items() if kind not in expected)
        whole = sum(found.values())
        total = sum(expected.values())
        entries += [
            (f"{axis}={n}, {machine}: sent over formula", whole / total, "x", "<= 1.02"),
            (f"{axis}={n}, {machine}: sent", whole / 1e6, "MB"),
            (
                f"{axis}={n}, {machine}: of kinds that the formula has not",
                other / whole,
                "",
                "<= 0.001",
            ),
        ]
    return entries, {"rows": rows, "small": str(small), "large": str(large), "topology": TOPOLOGY}


if __name__ == "__main__":
    report.experiment(__doc__, "a small model", run)
