"""Compress a model by what its inputs are on real data, one block after another.

Each batch is kept as the activations in front of the next block. A block is measured with them,
compressed, and run, so there are never statistics of more than one block. What stands outside of
the blocks is measured with the part of the model that it belongs to. There may be other stacks of
layers among it, an encoder's or those of two towers; to have these one layer after another, what
they are part of is run anew for each layer.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.compress.apply import chains_of, check_leaf, compress_leaf, needs_of, report_of
from jaxmodel.compress.gradients import OF_LOSS, Loss, observe_gradients
from jaxmodel.compress.heldout import hold_out, losses_of, protocol_of
from jaxmodel.compress.memory import give_back
from jaxmodel.compress.method import Chain
from jaxmodel.compress.observe import Stats, apart, check_cap, probed, real_rows
from jaxmodel.compress.recipes import Recipe, as_recipe
from jaxmodel.compress.report import Report
from jaxmodel.compress.stats import places, stats_of
from jaxmodel.errors import InputError, one_of
from jaxmodel.models import Model, check_params
from jaxmodel.models.checks import check_inputs
from jaxmodel.models.model import COUNTS, Inputs, begin, by_name, unpadded
from jaxmodel.models.reads import Read, reads
from jaxmodel.ops.probe import zeros_for
from jaxmodel.progress import progress
from jaxmodel.sharding import auto_axes

ORDERS = ("once", "sequential")
HELD_OUT = 0.125
"""The part of the batches that is held out."""
BUDGET = 2**30
"""Bytes of statistics that are measured in one pass over the batches."""

type Leaves = Mapping[str, Any]
type Turns = Mapping[str, int]  # layer path -> when it is compressed
type Order = Literal["once", "sequential"]


def calibrate(
    model: Model,
    params: tree.Params,
    recipe: Recipe | tree.Rules,
    batches: Iterable[Inputs],
    *,
    order: Order = "once",
    held_out: float = HELD_OUT,
    cap: float | None = None,
    loss: Loss | None = None,
    key: jax.Array | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[tree.Params, Report]:
    """Compress a model by methods that want statistics, and measure them.

    Beside the parameters there are in memory the activations of all batches in front of one block,
    and the statistics of one block, or of as many leaves outside of the blocks as fit into a
    gigabyte.

    Args:
      model: the model.
      params: its parameters, plain or compressed; they may lie on a mesh.
      recipe: a `Recipe` or its rules alone.
      batches: inputs of `model.apply`, of one shape if possible.
      order: "once": all statistics are those of the model as it is. "sequential": those of a block
        are of the model in which everything in front of it is compressed already, so that each
        block makes up for what was lost before; this runs each block twice. A table that is both
        embedding and head, with a method that wants statistics, is compressed last. Layers outside
        of `params["blocks"]` (of an encoder, of towers) have their turn too; for each one the whole
        encoder, or the whole model, is compiled and run anew.
      held_out: the part of the batches, the last ones (of a single batch, the last rows), that only
        judges what the others led to.
      cap: None, or how many times as long as the median an input may be (see `observe`).
      loss: `(model, params, batch, rng, *, train) -> (mean, metrics)`, for methods that want its
        gradient and for the report; None for what the batch asks for (see `losses.default_loss`),
        of tokens alone the next one's. Gradients are those of the model before compression.
      key: for methods that draw; None for `jax.random.key(0)`.
      on_row: called with the record of each leaf as soon as it is compressed.

    Returns:
      The compressed tree, and the report.

    Raises:
      InputError: as for `apply`; no batches, or an order that the model does not allow.

    >>> from jaxmodel.models import llama
    >>> model = llama.model(llama.SIZES["tiny"])
    >>> tokens = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)
    >>> recipe = [("blocks/.*/(up|down)", "gptq(4)"), (".*", "")]
    >>> small, report = calibrate(model, jax.jit(model.init)(jax.random.key(0)), recipe, [tokens])
    >>> report.protocol["tokens"], report.protocol["held_out_tokens"]
    (24, 8)
    """
    one_of("order", order, ORDERS)
    check_cap(cap)
    check_params(model, params)
    recipe = as_recipe(recipe)
    by_block = model.parts.block is not None and tree.BLOCKS in params
    inner = any(f"/{tree.BLOCKS}/" in path for path in tree.flatten(params))
    if order == "sequential" and not by_block and not inner:
        raise InputError("order: 'sequential' given for a model without blocks; allowed: 'once'")
    chains = chains_of(recipe, params, model.axes)
    for path, leaf in tree.flatten(params).items():  # before anything is measured
        for layer in tree.layer_paths(path):
            check_leaf(path, leaf, chains[layer])
    kept, held = hold_out(batches, held_out)
    given = _gradients(model, params, chains, kept, loss)
    where = places(given, chains)
    rows: list[dict[str, Any]] = []

    def compress(leaves: Leaves, stats: Stats, judged: Stats) -> dict[str, Any]:
        out = {}
        for path, leaf in leaves.items():
            chain = chains[tree.layer_paths(path)[0]]
            own = {**stats.get(path, {}), **(stats_of(path, given, where) or {})}
            out[path], row = compress_leaf(path, leaf, chain, own, key, judged.get(path))
            rows.append(row)
            if on_row is not None:
                on_row(row)
        return out

    work = _Work(
        _programs(model, cap),
        _programs(recipe.adapt(model), cap) if order == "sequential" else None,
        chains,
        [
            _Batch(_inputs(model, batch), held)
            for held, part in ((False, kept), (True, held))
            for batch in part
        ],
        compress,
    )
    in_turn = order == "sequential" and inner
    turns = _turns(chains, reads(model, params)) if in_turn else None
    parts = tree.unstack(params) if in_turn else params
    out = (_by_blocks if by_block else _whole)(work, parts, turns)
    result = tree.stack(tree.unflatten(out))
    judged = losses_of([(model, params), (recipe.adapt(model), result)], held, loss)
    protocol = {**protocol_of(kept, held), "order": order, "cap": cap}
    return result, report_of(params, result, rows, loss=judged, protocol=protocol)


class _Batch(NamedTuple):
    """A batch on its way: what the next part of the model is run on.

    `state` is the inputs, or later the activations, the context and the masks of what counts.
    """

    state: Any
    held: bool


class _Work(NamedTuple):
    """What all parts of a model are measured and compressed with.

    Attributes:
      run: the programs of the model as it is.
      anew: those of the compressed model, whose statistics count; None if those of the first do.
      chains: by layer path.
      batches: the kept and the held-out ones.
      compress: leaves, their statistics, those of held-out batches -> compressed leaves.
    """

    run: _Programs
    anew: _Programs | None
    chains: Mapping[str, Chain]
    batches: list[_Batch]
    compress: Callable[[Leaves, Stats, Stats], dict[str, Any]]

    def chain(self, path: str) -> Chain:
        return self.chains[tree.layer_paths(path)[0]]


# --------------------------------------------------------------------------------- part after part


def _whole(work: _Work, params: tree.Params, turns: Turns | None) -> dict[str, Any]:
    """Return the leaves of a model that does not come in parts."""
    leaves = tree.flatten(tree.split(params, work.chains))
    now = dict(leaves)
    run = work.anew or work.run
    out = {}
    for group in _in_turn(work, leaves, turns):
        measure = lambda spec, total, state: (run.whole(spec, total, now, state), None)
        out |= work.compress(group, *_summed(work, measure, group, work.batches))
        now.update(out if work.anew else {})
    return {path: out[path] for path in leaves}


def _by_blocks(work: _Work, params: tree.Params, turns: Turns | None) -> dict[str, Any]:
    """Return the leaves: what is in front of the blocks, the blocks, what is behind them."""
    run = work.run
    anew = work.anew or run
    blocks = params[tree.BLOCKS]
    rest = {name: node for name, node in params.items() if name != tree.BLOCKS}
    outside = tree.flatten(tree.split(rest, work.chains))
    now = dict(outside)  # as the next part sees them
    out: dict[str, Any] = {}
    behind = {}
    for group in _in_turn(work, outside, turns):
        measure = lambda spec, total, state: (anew.front(spec, total, now, blocks, state), None)
        stats, held = _summed(work, measure, group, work.batches)
        here = {
            path: leaf
            for path, leaf in group.items()
            if not work.chain(path) or _used(stats, path, "count")
        }
        out |= work.compress(here, stats, held)
        for path in group.keys() - here.keys():
            behind[path] = group[path]
            if work.anew and not needs_of(work.chain(path)) and _used(stats, path, "taken"):
                # behind the blocks it is done again, for the record of what it does as a head
                now[path], _ = compress_leaf(path, group[path], work.chain(path))
        now.update(out if work.anew else {})
    states = [_Batch(anew.start(now, blocks, batch.state), batch.held) for batch in work.batches]

    for number in progress(range(tree.depth(blocks)), "compress"):
        at = f"{tree.BLOCKS}/{number}/"
        layer = tree.flatten(_layer(blocks, number))
        leaves = {at + path: leaf for path, leaf in layer.items()}
        i = jnp.int32(number)
        done: dict[str, Any] = {}
        groups = list(_groups(work, leaves))
        for n, group in enumerate(groups, 1):
            moves = not work.anew and n == len(groups)
            measure = functools.partial(_measure_block, anew, at, layer, i, moves)
            done |= work.compress(group, *_summed(work, measure, group, states, moves))
        out |= done
        if work.anew:
            layer = {path[len(at) :]: leaf for path, leaf in done.items()}
            _step(work.anew, layer, i, states)
        give_back()

    for group in _groups(work, behind):
        measure = lambda spec, total, state: (run.head(spec, total, now, blocks, *state), None)
        rows = [_Batch(row, held) for state, held in states for row in _rows(state)]
        out |= work.compress(group, *_summed(work, measure, group, rows))
    return out


def _turns(chains: Mapping[str, Chain], found: Mapping[str, Read]) -> Turns:
    """Return the turn of each layer path: after all whose compression changes what it meets.

    The leaves of a layer have one turn, and so have layers of which none is in front of the other.

    Args:
      chains: by layer path.
      found: from `reads`.
    """
    together: dict[str, list[str]] = {}
    for path in chains:
        stack, inside, rest = path.rpartition(f"{tree.BLOCKS}/")
        key = f"{stack}{inside}{rest.partition('/')[0]}" if inside else path
        together.setdefault(key, []).append(path)
    front = lambda path: found[path].always if path in found else frozenset()
    turns: dict[str, int] = {}
    for paths in sorted(together.values(), key=lambda paths: max(len(front(p)) for p in paths)):
        before = set().union(*map(front, paths)) - set(paths)
        turn = max((turns.get(path, 0) + bool(chains.get(path)) for path in before), default=0)
        turns |= dict.fromkeys(paths, turn)
    return turns


def _in_turn(work: _Work, leaves: Leaves, turns: Turns | None) -> Iterator[dict[str, Any]]:
    """Cut leaves into groups by their turn, and so that their statistics fit into the budget."""
    of = lambda path: turns[tree.layer_paths(path)[0]] if turns else 0
    for turn in sorted(set(map(of, leaves))):
        yield from _groups(work, {path: leaves[path] for path in leaves if of(path) == turn})


def _used(stats: Stats, path: str, name: str) -> bool:
    """Return whether a leaf was measured, and was contracted (`count`) or looked up (`taken`)."""
    return path in stats and bool(jnp.any(stats[path][name] > 0))


def _step(run: _Programs, layer: Leaves, i: Any, states: list[_Batch]) -> None:
    """Replace all states by those behind a layer, one by one, so that each is freed."""
    for j, (state, held) in enumerate(states):
        states[j] = _Batch((run.step(layer, i, *state[:2]), *state[1:]), held)


def _measure_block(
    run: _Programs,
    at: str,
    layer: Leaves,
    i: Any,
    moves: bool,
    spec: Spec,
    total: Stats,
    state: Any,
) -> tuple[Stats, Any]:
    """Measure a block by names that are the same in all of them, so that it is compiled once.

    Returns:
      The total, and if `moves` what the next block is run on.
    """
    short = lambda path: path.removeprefix(at)
    own = tuple((short(path), names) for path, names in spec)
    total = {short(path): of for path, of in total.items()}
    total, y = run.block(own, moves, total, layer, i, *state)
    return {at + path: of for path, of in total.items()}, (y, *state[1:])


def _layer(blocks: tree.Params, number: int) -> tree.Params:
    """Return one layer without a leading axis, without copying the others."""
    for name in tree.segments(blocks):
        layers = tree.span(name)
        if layers is not None and number in layers:
            return tree.layer_slice(blocks[name], layers, range(number, number + 1))
    raise AssertionError


def _rows(state: Any) -> Iterator[Any]:
    """Cut activations and masks into rows, since the logits of one may be large; not on a mesh."""
    x, _, masks = state
    if auto_axes():
        return iter([(x, masks)])
    return (jax.tree.map(lambda a, i=i: a[i : i + 1], (x, masks)) for i in range(x.shape[0]))


def _inputs(model: Model, batch: Inputs) -> dict[str, Any]:
    """Return a batch without what only a loss reads, and refuse what `apply` would refuse."""
    left_out = ("labels", "targets", "weights", "views")
    inputs = by_name(batch, tuple(model.inputs(1, 1)))
    inputs = {name: array for name, array in inputs.items() if name not in left_out}
    check_inputs(unpadded(inputs), None, getattr(model.config, "vocab", None))
    return apart(inputs)


def _gradients(
    model: Model,
    params: tree.Params,
    chains: Mapping[str, Chain],
    batches: list[Inputs],
    loss: Loss | None,
) -> Stats:
    """Measure the gradients of the leaves whose chains want some."""
    layers = [path for path, chain in chains.items() if {*needs_of(chain)} & {*OF_LOSS}]
    if not layers:
        return {}
    return observe_gradients(model, params, batches, "|".join(map(re.escape, layers)), loss)


# ------------------------------------------------------------------------------------ measurements

# paths, and the statistics to measure of each
type Spec = tuple[tuple[str, tuple[str, ...]], ...]


def _spec(work: _Work, leaves: Leaves, held: bool) -> Spec:
    """Say what to measure: what the methods want, or of held-out batches what judges them."""
    return tuple(
        (path, ("gram",) if held else ("norms", *_of_inputs(work.chain(path))))
        for path, leaf in leaves.items()
        if work.chain(path) and len(tree.layer_shape(path, leaf)) >= 2
    )


def _of_inputs(chain: Chain) -> tuple[str, ...]:
    return tuple(name for name in needs_of(chain) if name not in OF_LOSS)


def _groups(work: _Work, leaves: Leaves) -> Iterator[dict[str, Any]]:
    """Cut leaves into groups whose statistics fit into the budget."""
    group: dict[str, Any] = {}
    total = 0
    for path, leaf in leaves.items():
        kinds = [names for held in (False, True) for _, names in _spec(work, {path: leaf}, held)]
        zeros = [jax.eval_shape(lambda n=names, s=leaf.shape: zeros_for(s, n)) for names in kinds]
        size = sum(4 * math.prod(array.shape) for array in jax.tree.leaves(zeros))
        if group and total + size > BUDGET:
            yield group
            group, total = {}, 0
        group[path] = leaf
        total += size
    if group:
        yield group


def _summed(
    work: _Work,
    measure: Callable[..., tuple[Stats, Any]],
    leaves: Leaves,
    batches: list[_Batch],
    moves: bool = False,
) -> tuple[Stats, Stats]:
    """Return the statistics of leaves, and those of the held-out batches.

    Args:
      work: says what is wanted.
      measure: (spec, total, state of a batch) -> the total and the state behind the part.
      leaves: to measure.
      batches: in front of the part that has the leaves.
      moves: whether each batch is replaced by its state behind the part, so that there are never
        both of all batches.
    """
    totals: dict[bool, Any] = {}
    specs = {held: _spec(work, leaves, held) for held in (False, True)}
    for held, spec in specs.items():
        totals[held] = {path: zeros_for(leaves[path].shape, names) for path, names in spec}
    for j, (state, held) in enumerate(batches):
        totals[held], behind = measure(specs[held], totals[held], state)
        if moves:
            batches[j] = _Batch(behind, held)
    judged = totals[True] if any(held for _, held in batches) else {}
    return totals[False], judged


class _Programs(NamedTuple):
    """Compiled functions of a model's parts; those that measure add to a total.

    `spec` says what is measured, leaves are flat, masks are those of `real_rows`.
    """

    start: Callable[..., Any]
    front: Callable[..., Any]
    block: Callable[..., Any]
    step: Callable[..., Any]
    head: Callable[..., Any]
    whole: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def _programs(model: Model, cap: float | None) -> _Programs:
    joined = lambda leaves, blocks: {**tree.unflatten(leaves), tree.BLOCKS: blocks}

    def added(
        spec: Spec, total: Stats, leaves: Leaves, masks: Any, run: Callable[[Any], Any]
    ) -> Any:
        zeros = {path: zeros_for(leaves[path].shape, names) for path, names in spec}

        def loss(zeros: Stats) -> tuple[jax.Array, Any]:
            out = run(tree.flatten(probed(tree.unflatten(leaves), zeros, cap, masks)))
            floats = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
            return sum((jnp.sum(a.astype(jnp.float32)) for a in floats), jnp.float32(0)), out

        found, out = jax.grad(loss, has_aux=True)(zeros)
        return jax.tree.map(jnp.add, total, found), out

    read = lambda inputs: {name: array for name, array in inputs.items() if name != COUNTS}

    def first(leaves: Leaves, blocks: tree.Params, inputs: dict[str, Any]) -> Any:
        return begin(model, joined(leaves, blocks), read(inputs))[:2]

    @jax.jit
    def start(outside: Leaves, blocks: tree.Params, inputs: dict[str, Any]) -> Any:
        return *first(outside, blocks, inputs), real_rows(inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def front(
        spec: Spec, total: Stats, outside: Leaves, blocks: Any, inputs: dict[str, Any]
    ) -> Stats:
        run = lambda leaves: first(leaves, blocks, inputs)
        return added(spec, total, outside, real_rows(inputs), run)[0]

    def run_block(layer: Leaves, i: Any, x: Any, context: Any) -> jax.Array:
        assert model.parts.block is not None
        return model.parts.block(tree.unflatten(layer), x, context, None, i, None, False)[0]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def block(
        spec: Spec,
        moves: bool,
        total: Stats,
        layer: Leaves,
        i: Any,
        x: Any,
        context: Any,
        masks: Any,
    ) -> tuple[Stats, Any]:
        run = lambda leaves: run_block(leaves, i, x, context)
        total, y = added(spec, total, layer, masks, run)
        return total, y if moves else None

    @functools.partial(jax.jit, static_argnums=0)
    def head(spec: Spec, total: Stats, outside: Leaves, blocks: Any, x: Any, masks: Any) -> Stats:
        run = lambda leaves: model.parts.head(joined(leaves, blocks), x, None, False)
        return added(spec, total, outside, masks, run)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def whole(spec: Spec, total: Stats, leaves: Leaves, inputs: dict[str, Any]) -> Stats:
        run = lambda leaves: model.apply(tree.unflatten(leaves), read(inputs)).logits
        return added(spec, total, leaves, real_rows(inputs), run)[0]

    return _Programs(start, front, block, jax.jit(run_block), head, whole)
