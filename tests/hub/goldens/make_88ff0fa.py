"""Write 88ff0fa.zip: bundles of every family, plain and compressed, and a run's checkpoint, as
commit 88ff0fa of this project saved them.

Run with a checkout of that commit:
PYTHONPATH=CHECKOUT python make_88ff0fa.py tests/hub/goldens/88ff0fa.zip

In the archive: `bundles/MEMBER-FORM/` with `outputs.npz` (inputs by name, `logits`, and
`decoded`, the logits of the decoded weights in the plain model), and `run/`:
a checkpoint of step 2 in `run/checkpoints`, and `run/end.npz` with the losses and the last weights
of the run of six steps. Weights are multiples of 1/32, so that they take few bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import compress, data, hub, train, tree
from jaxmodel.hub import Bundle
from jaxmodel.models import (
    autoencoder,
    bert,
    clip,
    cnn,
    connected,
    densenet,
    gpt2,
    lenet,
    llama,
    mlp,
    resnet,
    rnn,
    t5,
    transformer,
    vit,
)

TEXT = {"vocab": 32, "width": 16, "depth": 2, "heads": 2}
IMAGE = dataclasses.replace(vit.SIZES["tiny"], image=8, width=16, depth=1, heads=2, mlp_width=32)
MEMBERS = {
    "autoencoder": (autoencoder, autoencoder.Config(16, 8, (16,), "variational")),
    "bert": (bert, dataclasses.replace(bert.SIZES["tiny"], **TEXT, mlp_width=32, context=16)),
    "bert-classify": (
        bert,
        dataclasses.replace(bert.SIZES["tiny-classify"], **TEXT, mlp_width=32, context=16),
    ),
    "clip": (
        clip,
        clip.Config(clip.Text(32, 16, 1, 2, 32, 16), dataclasses.replace(IMAGE, labels=()), 8),
    ),
    "cnn": (cnn, cnn.Config((8, 16), 10, 4)),
    "connected": (connected, dataclasses.replace(connected.SIZES["tiny"], width=32, depth=2)),
    "densenet": (densenet, dataclasses.replace(densenet.SIZES["tiny"], width=16, growth=8)),
    "gpt2": (gpt2, gpt2.Config(32, 16, 2, 2, 16)),
    "lenet": (lenet, lenet.Config((4, 8), (16,), 16, 4)),
    "llama": (llama, llama.Config(32, 16, 2, 4, 2, 8, 32, 16)),
    "llama-moe": (
        llama,
        llama.Config(32, 16, 2, 4, 2, 8, 32, 16, tied=False, experts=2, experts_per_token=1),
    ),
    "mlp": (mlp, mlp.Config(8, (16, 16), 4, dropout=0.1)),
    "resnet": (resnet, resnet.Config((1, 1), 8, classes=4, size=8, small=True)),
    "resnet-group": (
        resnet,
        resnet.Config((1, 1), 4, True, 4, 8, norm="group", groups=2, small=True),
    ),
    "rnn": (rnn, rnn.Config(32, 16, 2)),
    "rnn-gru": (rnn, rnn.Config(32, 16, 1, "gru", "multiplicative")),
    "t5": (t5, t5.Config(32, 16, 1, 2, 2, 8, 32, buckets=8, distance=6)),
    "transformer": (transformer, transformer.Config(32, 16, 1, 2, 2, 32)),
    "vit": (vit, IMAGE),
}
FORMS = {
    "plain": None,
    "int8": "rtn(bits=8)",
    "int4": "rtn(bits=4, group=8)",
    "sparse": "magnitude(0.5) | rtn(bits=4)",
}
"""In the recipes int8 and int4 of that time families without attention had no place, so that their
matrices are told one by one.
"""


def weights(model) -> tree.Params:
    rng = np.random.default_rng(0)

    def one(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = np.round(rng.normal(size=a.shape) * 0.25 * 32) / 32
        if path.endswith("variance"):
            drawn = np.abs(drawn) + 0.5
        if path == "scale" or path.endswith("norm/weight") or path.endswith("norm/scale"):
            drawn = drawn + 1
        return jnp.asarray(drawn, a.dtype)

    return tree.map_leaves(one, jax.eval_shape(model.init, jax.random.key(0)))


def inputs_of(model) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(
            rng.integers(0, model.config.vocab, a.shape)
            if jnp.issubdtype(a.dtype, jnp.integer)
            else np.round(rng.normal(size=a.shape) * 8) / 8,
            a.dtype,
        )
        for name, a in model.inputs(2, 6).items()
    }


def compressed(bundle: Bundle, form: str) -> Bundle:
    if FORMS[form] is None:
        return bundle
    if form in ("int8", "int4"):
        try:
            return compress.compress_bundle(bundle, compress.named(form))[0]
        except ValueError:
            pass
    matrices = [
        layer
        for path, leaf in tree.flatten(bundle.params).items()
        if not re.search("norm|positions|bias|score", path)
        for layer in tree.layer_paths(path)
        if len(tree.layer_shape(path, leaf)) > 1 and tree.layer_shape(path, leaf)[-1] % 8 == 0
    ]
    rules = [(re.escape(path), FORMS[form]) for path in matrices]
    return compress.compress_bundle(bundle, [*rules, (".*", ())])[0]


def floats(path: str, leaf: Any) -> jax.Array:
    return leaf.decode() if hasattr(leaf, "decode") else leaf


def save_bundles(top: Path) -> None:
    for name, (module, config) in MEMBERS.items():
        model = module.model(config)
        apply = jax.jit(model.apply)
        given = inputs_of(model)
        bundle = Bundle(model, weights(model), None, {"name": name})
        for form in FORMS:
            folder = top / f"{name}-{form}"
            try:
                compressed(bundle, form).save_pretrained(folder)
                again = hub.from_pretrained(folder)
                logits = jax.jit(again.model.apply)(again.params, given).logits
                decoded = apply(tree.map_leaves(floats, again.params), given).logits
            except Exception as error:
                print(name, form, type(error).__name__, error)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            assert np.all(np.isfinite(logits)), name
            np.savez_compressed(folder / "outputs.npz", logits=logits, decoded=decoded, **given)
            print(folder.name, float(jnp.std(logits)))


class Killed(Exception):
    """The end of a run before its last step."""


def stop(row: dict[str, Any]) -> None:
    if row["step"] == 4:
        raise Killed


def save_run(top: Path) -> None:
    model = gpt2.model(gpt2.Config(16, 8, 2, 2, 8))
    stream = data.Stream(data.windows(np.arange(99) * 7 % 16, length=9, stride=8), batch_size=4)
    config = train.TrainConfig(
        steps=6, accumulate=2, average=0.9, warmup=2, clip=1.0, spike=6.0, save_every=2, log_every=1
    )
    folder = top / "run" / "checkpoints"
    keep = train.Keep(last=1)
    state, history = train.fit(model, stream, config)
    with (
        train.Checkpoints(folder, keep=keep, data=stream.fingerprint) as checkpoints,
        contextlib.suppress(Killed),
    ):
        train.fit(model, stream, config, checkpoints=checkpoints, callbacks=[stop])
    losses = [row["loss"] for row in history if "loss" in row]
    flat = {path.replace("/", "."): leaf for path, leaf in tree.flatten(state.params).items()}
    np.savez_compressed(top / "run" / "end.npz", losses=np.asarray(losses), **flat)
    print(losses, sorted(p.name for p in folder.iterdir()))


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        (top / "bundles").mkdir()
        save_bundles(top / "bundles")
        save_run(top)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(top.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(top))


if __name__ == "__main__":
    main(sys.argv[1])
