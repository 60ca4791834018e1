"""Meshes, and rules that place the leaves of a tree on one.

A sharding rule gives the `PartitionSpec` of the logical axes of one layer's leaf:
`("blocks/.*/attn/q", P("tensor", "fsdp"))` for a weight `[out, in]`. A stacked segment gets its
layer axis in front, which the mesh's axis `pipeline` cuts into stages; a compressed leaf derives
the specs of its parts. Mesh axes that the mesh lacks are left out, so the same rules serve every
mesh. The reverse is an error: along an axis of the mesh that nothing uses, every device would hold
and compute the same (`--mesh fdsp=4`, or `expert=4` without experts).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxmodel import tree
from jaxmodel.errors import InputError, at_least, nearest

type AxisTable = Sequence[tuple[str, str | tuple[str, ...]]]  # letter of an axis -> mesh axes
type AnyMesh = Mesh | AbstractMesh  # the latter for lowering without the devices

BATCH_AXES = ("pipeline", "data", "fsdp", "expert")
"""The mesh axes along which the rows of a batch are split, if the mesh has them.

`expert` splits the experts and `pipeline` the layers. Outside of these, all devices of such an axis
would compute the same if it did not split the batch too. `pipeline` comes first, since a
`shard_map` over it alone splits the outermost axis.
"""

ACTIVATION_AXES = ("data", "fsdp", "sequence")
"""The axes that split activations, which a mesh may have even if no rule names them.

Axes that split parameters (`tensor`, `expert`, `pipeline`) are not among them: if no rule names
one, the model cannot use it.
"""


def simulation(count: int) -> dict[str, str]:
    """Return the environment variables of a process that has `count` CPU devices."""
    # By default XLA may run independent collectives of a program in a different order on each
    # device, and they wait for each other for ever: seen with data=2,fsdp=2 in half of the runs.
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count), "XLA_FLAGS": flags.strip()}


def simulate_devices(count: int) -> None:
    """Give this process `count` CPU devices to try a mesh; call it before the first computation.

    Raises:
      InputError: a count below 1.
    """
    at_least("devices", count)
    os.environ["XLA_FLAGS"] = simulation(count)["XLA_FLAGS"]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(shape: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with Auto axes, to enter with `jax.set_mesh`; all processes of a run make it.

    Args:
      shape: `{"fsdp": 4, "tensor": 2}` or its text form `"fsdp=4,tensor=2"`. One length of the text
        may be `*`, for all remaining devices.
      devices: the devices; default: as many of `jax.devices()` as the shape needs.

    Raises:
      InputError: the shape is not readable or needs more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    if isinstance(shape, str):
        try:
            lengths = {
                name.strip(): n.strip()
                for name, n in (part.split("=") for part in shape.split(","))
            }
            known = {name: int(n) for name, n in lengths.items() if n != "*"}
            rest = max(1, len(devices) // max(1, math.prod(known.values())))
            axes = (
                {name: known.get(name, rest) for name in lengths}
                if len(lengths) <= len(known) + 1
                else {}
            )
        except ValueError:
            axes = {}
        if not axes or not all(axes) or len(axes) != len(shape.split(",")):
            raise InputError(f"mesh: {shape!r} cannot be read; write it as 'fsdp=4,tensor=2'")
        shape = axes
    sizes = tuple(shape.values())
    need = math.prod(sizes)
    if not sizes or min(sizes) < 1:
        raise InputError(
            f"mesh: {dict(shape)} is not a mesh; allowed: a length of at least 1 for each axis"
        )
    if need > len(devices):
        raise InputError(f"mesh: {dict(shape)} needs {need} devices; there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    try:
        mesh = jax.make_mesh(sizes, tuple(shape), axis_types=auto, devices=devices[:need])
    except NotImplementedError:  # a mesh axis that is only a part of a physical axis (ICI)
        grid = mesh_utils.create_device_mesh(sizes, devices[:need], allow_split_physical_axes=True)
        mesh = Mesh(grid, tuple(shape), axis_types=auto)
    except ValueError as error:
        raise InputError(
            f"mesh: {dict(shape)} cannot be made from these devices: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None
    if (
        jax.config.jax_cpu_collectives_implementation == "mpi"
        and jax.process_count() > 1
        and devices[0] in jax.devices()
    ):
        _meet(mesh)
    return mesh


def _meet(mesh: Mesh) -> None:
    """Sum once over every group of devices that can communicate.

    XLA opens MPI's communicators only on the main thread.

    Raises:
      InputError: a sum is wrong, as it is where each process is alone for MPI.
    """
    axes = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for group in itertools.combinations(axes, count):
            add = functools.partial(jax.lax.psum, axis_name=group)
            one = jax.jit(
                jax.shard_map(add, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
            )
            found = float(one(np.float32(1)))
            want = math.prod(mesh.shape[name] for name in group)
            if found != want:
                raise InputError(
                    f"mesh: {found:.0f} of {want} devices along {group} found each other; with "
                    "MPI, start by mpirun or srun"
                )


def shardings(
    rules: tree.Rules, params: tree.Params, mesh: AnyMesh
) -> tuple[tree.Params, tree.Params]:
    """Return the tree (split where rules differ by layer) and a tree of `NamedSharding` like it.

    A compressed leaf's place holds a leaf of the same class whose buffers are shardings, so the
    result serves as `in_shardings`, for `jax.device_put` and for a restore.

    Raises:
      InputError: a rule or leaf without the other (see `tree.assign`), a mesh that does not divide
        an axis, or one with an axis that neither `ACTIVATION_AXES` nor a rule that decides a leaf
        names.
    """
    params, specs = tree.match(rules, params)
    placed = tree.map_leaves(
        lambda path, leaf: _leaf_sharding(path, leaf, specs[path], mesh), params
    )
    staged = [PartitionSpec("pipeline")] * any(map(tree.is_stacked, specs))
    _check_axes([*specs.values(), *staged], mesh)
    return params, placed


def parts(rules: tree.Rules, params: tree.Params, axes: Collection[str]) -> tree.Params:
    """Return the spec of each leaf for a `shard_map` over some axes of the mesh in use.

    Args:
      rules: the rules of the model; some may match no leaf here.
      params: all parameters or some of them.
      axes: the mesh axes that count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_layer = tree.assign([(tree.optional(pattern), spec) for pattern, spec in rules], params)

    def own(path: str, leaf: tree.Leaf) -> Any:
        places = _leaf_sharding(path, leaf, by_layer[tree.layer_paths(path)[0]], mesh)
        chosen = lambda entry: tuple(name for name in names_of(entry) if name in axes) or None
        return jax.tree.map(lambda place: PartitionSpec(*map(chosen, place.spec)), places)

    return tree.map_leaves(own, params)


def place(rules: tree.Rules, params: tree.Params, mesh: Mesh) -> tree.Params:
    """Put a tree on a mesh by rules."""
    return jax.device_put(*shardings(rules, params, mesh))


def inherit(state: Any, placed: tree.Params, mesh: AnyMesh) -> Any:
    """Return shardings for an optimiser state.

    A leaf whose path ends in a parameter's path is sharded like that parameter if possible (a
    factored moment has another shape). Any other leaf is replicated. A compressed leaf (a moment in
    8 bits) derives the shardings of its buffers from the parameter's, as parameters do, if it can
    be split so.

    Args:
      state: any pytree of arrays or shape structs.
      placed: the parameters' shardings, as `shardings` gives them.
      mesh: the mesh.
    """
    known = {_key_path(path): s for path, s in jax.tree_util.tree_flatten_with_path(placed)[0]}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def fitting(spec: PartitionSpec, array: Any) -> NamedSharding:
        return NamedSharding(mesh, spec) if _divides(spec, array.shape, mesh.shape) else everywhere

    def find(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = _key_path(path)
        beside = next(
            (known[keys[start:]] for start in range(len(keys)) if keys[start:] in known), None
        )
        if not hasattr(leaf, "specs"):
            return everywhere if beside is None else fitting(beside.spec, leaf)
        if (
            beside is None
            # a compressed parameter: a buffer is sharded like the parameter's of the same name
        ):
            return jax.tree_util.tree_map_with_path(
                lambda inner, buffer: find((*path, *inner), buffer), leaf
            )
        try:
            specs = leaf.specs(fitting(beside.spec, leaf).spec, mesh.shape)
        except InputError:  # the sharding would split a group or a byte
            specs = leaf.specs(PartitionSpec(), mesh.shape)
        return jax.tree.map(
            fitting, specs, leaf, is_leaf=lambda spec: isinstance(spec, PartitionSpec)
        )

    return jax.tree_util.tree_map_with_path(
        find, state, is_leaf=lambda node: hasattr(node, "specs")
    )


def constrain(x: jax.Array, letters: str, table: AxisTable) -> jax.Array:
    """Constrain the sharding of an activation: `table` gives mesh axes for letters of `"B T D"`.

    Without a mesh, without a table, or where the mesh axes do not divide the dimension, nothing is
    constrained. Inside of a `shard_map` its axes are cut already and do not count.
    """
    if not table or not auto_axes():
        return x
    lie = [
        axes_of(letter, table, n) or None
        for letter, n in zip(letters.replace(" ", ""), x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*lie))


def auto_axes() -> dict[str, int]:
    """Return the axes of the mesh in use, outside of any `shard_map`, with their lengths.

    Without a mesh there are none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else {name: mesh.shape[name] for name in mesh.auto_axes}


def axes_of(letter: str, table: AxisTable, length: int | None = None) -> tuple[str, ...]:
    """Return the `auto_axes` that a letter of an activation lies on by a table.

    There are none if they do not divide its length.
    """
    names = _present(dict(table).get(letter), sizes := auto_axes())
    return names if length is None or length % _product(names, sizes) == 0 else ()


def _check_axes(specs: Iterable[PartitionSpec], mesh: AnyMesh) -> None:
    """Refuse a mesh with an axis of several devices that nothing uses.

    Rules that match no leaf do not count.
    """
    named = {name for spec in specs for entry in spec for name in names_of(entry)}
    known = sorted({*named, *ACTIVATION_AXES})
    for name, length in mesh.shape.items():
        if length > 1 and name not in known:
            close = nearest(name, known)
            raise InputError(
                f"mesh: the axis {name!r} would hold {length} copies of everything, since no rule "
                f"names it; allowed: "
                f"{', '.join(known)}{f' (nearest: {close[0]})' if close else ''}"
            )


def _leaf_sharding(path: str, leaf: tree.Leaf, spec: PartitionSpec, mesh: AnyMesh) -> Any:
    shape = tree.layer_shape(path, leaf)
    if len(spec) > len(shape):
        raise InputError(
            f"rules: the leaf {path!r} has {len(shape)} axes {shape} but its spec {spec} has "
            f"{len(spec)}"
        )
    entries = [_present(entry, mesh.shape) for entry in spec]
    for axis, names in enumerate(entries):
        parts = _product(names, mesh.shape)
        if shape[axis] % parts:
            raise InputError(
                f"mesh: {dict(mesh.shape)} does not divide the leaf {path!r}: axis {axis} of "
                f"{shape} has length "
                f"{shape[axis]}, which {'*'.join(names)} = {parts} does not divide"
            )
    spec = PartitionSpec(*_layers(path, leaf, mesh), *(names or None for names in entries))
    specs = leaf.specs(spec, dict(mesh.shape)) if hasattr(leaf, "specs") else spec
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def _layers(path: str, leaf: tree.Leaf, mesh: AnyMesh) -> list[str | None]:
    """Return the spec entry of a stacked leaf's axis of layers, which `pipeline` may split.

    The list is empty for any other leaf.
    """
    stages = mesh.shape.get("pipeline", 1)
    if not tree.is_stacked(path):
        return []
    if stages == 1:
        return [None]
    if (layers := leaf.shape[0]) % stages:
        allowed = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise InputError(
            f"mesh: pipeline = {stages} does not divide the {layers} layers of the leaf {path!r} "
            f"into stages; allowed: {allowed}"
        )
    return ["pipeline"]


def _divides(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Return whether an array of this shape can be sharded by the spec."""
    parts = [_product(_present(entry, sizes), sizes) for entry in spec]
    return len(parts) <= len(shape) and all(
        n % part == 0 for n, part in zip(shape, parts, strict=False)
    )


def _present(entry: Any, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes of one spec entry that the mesh has."""
    return tuple(name for name in names_of(entry) if name in sizes)


def names_of(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one spec entry."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _product(names: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in names)


def _key_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
