"""The law of axes: units of a set that is in no order may change places, in all leaves that have
them.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxmodel import axes, tree


def test_units_in_no_order_change_places_and_the_model_computes_the_same(case):
    want = np.asarray(case.apply(case.params, case.inputs))
    known = axes.groups(case.model.axes, case.params)
    units = {
        name: np.arange(group.size)[::-1]
        for name, group in known.items()
        if not group.ordered and group.size > 1
    }
    select = jax.jit(functools.partial(axes.select, case.model.axes))

    def error(units):
        moved = select(case.params, units)
        assert tree.fingerprint(moved) != tree.fingerprint(case.params)
        return np.abs(np.asarray(case.apply(moved, case.inputs)) - want).max() / max(
            1, np.abs(want).max()
        )

    if units and not error(units) < 1e-5:
        assert not [name for name, index in units.items() if not error({name: index}) < 1e-5]


def test_every_set_of_units_that_a_law_can_try_is_tried(case):
    """Of a model with layers, at least one set is in no order, so that the law above says
    something.
    """
    known = axes.groups(case.model.axes, case.params)
    free = {name.split("/")[-1] for name, group in known.items() if not group.ordered}
    opaque = case.name.startswith(
        "connected/"
    )  # patterns of edges and of blocks, which no letters say
    by_groups = getattr(case.model.config, "norm", "") == "group"
    assert free or opaque or by_groups


def test_units_that_go_are_gone_in_all_leaves(case):
    """One unit less of each set: the shapes fit each other, so that the model runs, and no other
    leaf has changed.
    """
    known = axes.groups(case.model.axes, case.params)
    before = tree.flatten(case.apart)
    for name, group in known.items():
        if group.fixed or group.size < 4:
            continue
        smaller = axes.shapes(
            case.model.axes, case.params, {name: group.size - 2}
        )  # those of `select`
        after = tree.flatten(smaller)
        changed = {path for path in before if before[path].shape != after[path].shape}
        assert changed == {member.path for member in group.members}
        assert axes.groups(case.model.axes, smaller)[name].size == group.size - 2
