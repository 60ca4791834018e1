"""What stands in front of each leaf does not depend on the mesh where it is asked."""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxmodel.models import gpt2
from jaxmodel.models.reads import reads


def test_on_a_mesh_with_stages():
    model = gpt2.model(gpt2.SIZES["tiny"])
    mesh = AbstractMesh((2, 2), ("pipeline", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        found = reads(model)
    assert found == reads(model)
    assert "blocks/0/attn/q" in found["blocks/1/attn/o"].ever
