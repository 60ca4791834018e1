"""On eight devices every augmentation does what it does on one, and only mixing moves images: one
row across each edge.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve()


def test_rows_cut_over_eight_devices(devices8) -> None:
    found = json.loads(devices8(HERE).splitlines()[-1])
    assert found["different"] == []
    assert found["moved"] == []
    assert found["mixing moved"] == ["f32[1,10,9,3]", "f32[1,4]"]


def program() -> None:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxmodel import sharding
    from jaxmodel.data import augment

    sys.path.insert(0, str(HERE.parent))
    from test_laws import MIXES, SETTINGS, batch_of

    batch = batch_of(3, rows=16)
    batch["pixels"] = batch["pixels"][:, :10, :9]
    mesh = sharding.make_mesh("data=4,fsdp=2")
    cut = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    touched = ("pixels", "labels", "tokens", "source", "source_mask", "targets", "weights")

    def run(names):
        made = {name: augment.parse(SETTINGS[name][0]) for name in names}

        def every(key, batch):
            outs = {name: one(key, batch) for name, one in made.items()}
            return {
                f"{name} {k}": v
                for name, out in outs.items()
                for k, v in out.items()
                if k in touched
            }

        with jax.set_mesh(mesh):
            lowered = jax.jit(every).lower(jax.random.key(0), cut)
            compiled = lowered.compile()
            out = compiled(jax.random.key(0), cut)
        return out, jax.jit(every)(jax.random.key(0), batch), compiled.as_text()

    pure, pure_alone, text = run([name for name in SETTINGS if name not in MIXES])
    mixing, mixing_alone, mixing_text = run(["mixup"])
    collective = (
        r"= (\S+?)\{?[\d,]*\}? "
        r"(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    )
    out = pure | mixing
    alone = pure_alone | mixing_alone
    same = lambda a, b: np.allclose(a, b, atol=1e-6) and a.addressable_shards[0].data.shape[0] == 2
    moved, mixing_moved = (sorted(re.findall(collective, t)) for t in (text, mixing_text))
    print(
        json.dumps(
            {
                "different": [k for k in out if not same(out[k], alone[k])],
                "moved": moved,
                "mixing moved": mixing_moved,
            }
        )
    )


if __name__ == "__main__":
    program()
