"""jaxmodel: a functional JAX framework for the whole life of a big model.

Five ideas. *Params* are a plain nested dict whose leaves are arrays or compressed leaves. A *Model* is a frozen record of pure
functions. *Rules* `[(path regex, value), ...]` say everything that differs by leaf: axes, freezing, decay, bits, sparsity.
A *TrainState* and a seed determine the rest of a run. A *Transform* is `params -> params`.

    import jaxmodel
    from jaxmodel import compress

    bundle = jaxmodel.from_pretrained("smollm2-135m")
    print(jaxmodel.generate(bundle, "The capital of France is", max_new_tokens=8))

    params, report = compress.apply(compress.named("int8"), bundle.params)
    print(report.bits_per_weight)

Start with `jaxmodel/models/llama.py` (a model), `jaxmodel/compress/rtn.py` (a method), `docs/design.md` (the ideas and the
house). What stands below is imported when it is first used, so `import jaxmodel` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodel.errors import InputError
    from jaxmodel.generation import generate
    from jaxmodel.hub import Bundle, from_pretrained
    from jaxmodel.models import Model, Output
    from jaxmodel.models.sentences import embed_texts
    from jaxmodel.ops import Policy
    from jaxmodel.train import TrainConfig, fit

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "jaxmodel.hub",
    "InputError": "jaxmodel.errors",
    "Model": "jaxmodel.models",
    "Output": "jaxmodel.models",
    "Policy": "jaxmodel.ops",
    "TrainConfig": "jaxmodel.train",
    "embed_texts": "jaxmodel.models.sentences",
    "fit": "jaxmodel.train",
    "from_pretrained": "jaxmodel.hub",
    "generate": "jaxmodel.generation",
}
_PARTS = [
    "axes",
    "compress",
    "data",
    "errors",
    "evaluate",
    "files",
    "generation",
    "hub",
    "layers",
    "leaves",
    "models",
    "ops",
    "plan",
    "report",
    "schema",
    "sharding",
    "train",
    "tree",
]

__all__ = [
    "Bundle",
    "InputError",
    "Model",
    "Output",
    "Policy",
    "TrainConfig",
    "embed_texts",
    "fit",
    "from_pretrained",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"jaxmodel.{name}")
    raise AttributeError(f"module 'jaxmodel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS, "__version__"])
