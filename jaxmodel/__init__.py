"""A functional JAX framework for the whole life of a big model.

Five ideas. *Params* are a plain nested dict whose leaves are arrays or compressed leaves. A *Model*
is a frozen record of pure functions. *Rules* `[(path regex, value), ...]` say everything that
differs by leaf: axes, freezing, decay, bits, sparsity. A *TrainState* and a seed determine the rest
of a run. A *Transform* is `params -> params`.

    import jaxmodel
    from jaxmodel import compress

    bundle = jaxmodel.from_pretrained("smollm2-135m")
    print(jaxmodel.generate(bundle, "The capital of France is", max_new_tokens=8))

    smaller, report = compress.compress_bundle(bundle, compress.get_recipe("int8"))
    print(report.bits_per_weight)

Start with `jaxmodel/models/llama.py` (a model), `jaxmodel/compress/rtn.py` (a method),
`docs/design.md` (the ideas and the house). What `__init__.pyi` lists is imported when it is first
used, so `import jaxmodel` costs little.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
