"""On a TPU the codes of a compressed model are widened where they are multiplied: no float32 copy
of a weight is made.

Read from what the compiler makes of a decode step for chips that are not here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import leaves, ops, plan, tree
from jaxmodel.models import llama

CONFIG = llama.Config(
    vocab=1152, width=256, mlp_width=640, depth=2, heads=4, kv_heads=2, head_width=64, context=128
)
FORMS: dict[str, dict[str, Any]] = {
    "f32": {},
    "int8": {"bits": 8},
    "int4": {"bits": 4, "group": 64},
    "W8A8": {"bits": 8, "activations": "int8"},
}
SLICES = ("v5e:2x2", "v6e:2x2")


def coded(leaf: Any, form: dict[str, Any]) -> Any:
    """The shapes of a matrix in codes."""
    group = form.get("group")

    def make() -> leaves.QTensor:
        codes = jnp.zeros(leaf.shape, jnp.int8)
        groups = leaf.shape[-1] // group if group else 1
        return leaves.QTensor.from_codes(
            codes, jnp.ones((*leaf.shape[:-1], groups), jnp.float16), **form
        )

    return jax.eval_shape(make)


def wide_copies(text: str, matrices: set[tuple[int, ...]]) -> list[str]:
    """The float32 results that have the size of a matrix, but those inside of a fusion."""
    inner = set(re.findall(r"calls=%?([\w.\-]+)", text))
    found = []
    for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", part)
        if name is None or name[1] in inner:
            continue
        for line in part.splitlines()[1:]:
            result = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
            if result is None or result[2] in ("parameter", "get-tuple-element", "tuple", "while"):
                continue
            for dims in re.findall(r"f32\[([\d,]+)\]", result[1]):
                shape = tuple(n for n in map(int, dims.split(",")) if n > 1)
                if tuple(sorted(shape[-2:])) in matrices:
                    found.append(f"{result[2]} f32[{dims}]")
    return found


def run_all() -> dict[str, dict[str, list[str]]]:
    """For every slice and form, the float32 copies of weights in a decode step."""
    found: dict[str, dict[str, list[str]]] = {}
    model = llama.model(CONFIG, ops.Policy(compute_dtype="bfloat16"))
    make = model.init_cache
    assert make is not None
    params = jax.eval_shape(model.init, jax.random.key(0))
    cache = jax.eval_shape(lambda: make(4, 128))
    tokens = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    matrices = {
        tuple(sorted(leaf.shape[-2:]))
        for path, leaf in tree.flatten(params).items()
        if "/attn/" in path or "/mlp/" in path
    }
    for name in SLICES:
        mesh = jax.sharding.Mesh(np.array(plan.topology(name)[:1]), ("data",))
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        for form, settings in FORMS.items():
            if form == "f32" and name != SLICES[0]:
                continue
            made = tree.map_leaves(
                lambda path, leaf, settings=settings: (
                    coded(leaf, settings)
                    if settings and ("/attn/" in path or "/mlp/" in path)
                    else leaf
                ),
                params,
            )
            step = jax.jit(lambda params, tokens, cache: model.apply(params, tokens, cache).logits)
            given = jax.tree.map(
                lambda a, whole=whole: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
                (made, tokens, cache),
            )
            text = step.lower(*given).compile().as_text() or ""
            found.setdefault(name, {})[form] = wide_copies(text, matrices)
    return found


@pytest.fixture(scope="module")
def found():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, of the extra `plan`, is not installed")
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["int8", "int4", "W8A8"])
def test_codes_are_not_widened_in_memory(found, form):
    assert found[SLICES[0]]["f32"]  # where the weights are float32, they are seen
    for name in SLICES:
        assert found[name][form] == [], name


MODULE = """
%fused (p: s8[640,256]) -> bf16[640,256] {
  %p = s8[640,256]{1,0} parameter(0)
  %wide = f32[640,256]{1,0} convert(%p)
  ROOT %out = bf16[640,256]{1,0} convert(%wide)
}

ENTRY %main (a: s8[2,640,256]) -> f32[640,256] {
  %a = s8[2,640,256]{2,1,0} parameter(0)
  %first = bf16[640,256]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%fused
  ROOT %copy = f32[1,256,640]{2,1,0:T(8,128)} convert(%first)
}
"""


def test_a_copy_is_found():
    assert wide_copies(MODULE, {(256, 640)}) == ["convert f32[1,256,640]"]
    assert wide_copies(MODULE, {(256, 512)}) == []


if __name__ == "__main__":
    print(json.dumps(run_all()))
