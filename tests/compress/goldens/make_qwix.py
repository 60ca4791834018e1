"""What qwix computes, stored for `tests/compress/test_oracles.py`: run by hand.

    python -m venv /tmp/qwix && /tmp/qwix/bin/python -m pip install qwix==0.1.8
    # writes qwix.npz beside this file, in some seconds
    /tmp/qwix/bin/python tests/compress/goldens/make_qwix.py

Qwix scales the largest weight of a group to half a code above the highest one (7.5 in 4 bits), and
jaxmodel to the highest one (7), so the range is widened by 7.5 / 7 here: then the two agree, as
they do in NF4, where both scale it to 1. They do not agree on affine grids, whose zero point is a
whole code in qwix, and a number here.

    weight            [8, 64]; inputs [100, 64]
    int8/codes        a scale for each row
    int4/codes        groups of 16
    nf4/codes         groups of 16: the places in the sorted table; of weights whose largest one in
                      each group (nf4/weight) is a power of two, so that a scale of 16 bits is exact
    gptq/codes        4 bits a row, damping 0.01, the columns in their order
    gptq/grouped      the same in groups of 16, whose scales are those of the weights before
    awq/inputs        the size of each input: all |x| of a channel are equal, so that its mean is
                      its root mean square
    awq/factor        [64], normalised so that the largest and the smallest are inverses
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from qwix._src.core import qarray
from qwix.contrib import awq_core, gptq_core

ROWS, COLUMNS, GROUP = 8, 64, 16


def how(bits: int, group: int | None = None) -> qarray.HowToQuantize:
    top = 2 ** (bits - 1) - 1
    return qarray.HowToQuantize(
        qtype=jnp.int8 if bits == 8 else jnp.int4,
        channelwise_axes=(0,),
        tiled_axes={1: group} if group else {},
        calibration_method=f"absmax,{(top + 0.5) / top}",
    )


def main() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    inputs = (rng.normal(size=(100, COLUMNS)) @ rng.normal(size=(COLUMNS, COLUMNS)) / 8).astype(
        np.float32
    )
    size = np.exp(1.5 * rng.normal(size=COLUMNS)).astype(np.float32)
    w = jnp.asarray(weight)
    hessian = gptq_core.compute_hessian(jnp.asarray(inputs.T))

    grouped = weight.reshape(ROWS, -1, GROUP)
    largest = np.abs(grouped).max(-1, keepdims=True)
    exact = (grouped / largest * 2.0 ** np.round(np.log2(largest))).reshape(weight.shape)
    exact = exact.astype(np.float32)
    nf4 = qarray.HowToQuantize(qtype="nf4", channelwise_axes=(0,), tiled_axes={1: GROUP})

    found = {
        "weight": weight,
        "inputs": inputs,
        "int8/codes": qarray.quantize(w, how(8)).qvalue,
        "int4/codes": qarray.quantize(w, how(4, GROUP)).qvalue,
        "nf4/weight": exact,
        "nf4/codes": qarray.quantize(jnp.asarray(exact), nf4).qvalue,
        "gptq/codes": gptq_core.quantize_weight(w, hessian, how(4))[0].qvalue,
        "gptq/grouped": gptq_core.quantize_weight(w, hessian, how(4, GROUP))[0].qvalue,
        "awq/inputs": size,
        # the last of 21 ratios is 1, which jaxmodel does not try: it must not be the best
        "awq/factor": awq_core.search_optimal_scales(w, jnp.asarray(size), how(4), n_grid=21)[0],
    }
    stored = {
        name: np.asarray(a).astype(np.int8)
        if name.endswith(("codes", "grouped"))
        else np.asarray(a)
        for name, a in found.items()
    }
    np.savez_compressed(Path(__file__).with_name("qwix.npz"), **stored)


if __name__ == "__main__":
    main()
