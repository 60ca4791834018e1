"""Every architecture whose results others computed, against them: logits and gradients of
transformers and of torch.

What they computed is stored in tests/hub/goldens and tests/models/goldens beside the scripts that
made it: tiny models with random weights as folders that transformers wrote (gpt2, the Llama family,
bert, vit, clip, t5), networks and stacks of torch's own layers (images, transformer, rnn; how their
weights stand in our trees is said by the tests, which are read here), and two models that people
trained (SmolLM2-135M-Instruct, decoded from Q4_1 on both sides, and all-MiniLM-L6-v2). The tests
compare the same files; here the differences are shown.

Command:  python experiments/parity.py [--quick] [--seed N] --json -
Cost:     9 minutes on a busy machine where little is compiled yet; --quick about half of that.
Goals:    in float32 the largest difference of a logit <= 2e-4, with padding masks and at positions
          with gaps up to the last of the context; of a gradient <= 1e-3 of the largest of its
          tensor (which counts as a thousandth of the largest of all at least: the loss does not see
          a key's bias, whose gradient is rounding); sentence embeddings of MiniLM with a cosine >=
          0.99999 to the original's.
Measured: all goals met by 58 folders of transformers, 5 networks of images and 4 stacks: logits at
          most 5.4e-5 apart (t5-gated; the others 8.3e-6), gradients at most 7.2e-5 of the largest
          (vit-a); SmolLM2's loss of a token 3.6e-5 nats; MiniLM's least cosine of 50 sentences and
          a long text 0.99999994.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxmodel import evaluate, hub, losses, report, tree
from jaxmodel.models.sentences import embed_texts
from jaxmodel.progress import progress

TESTS = Path(__file__).parent.parent / "tests"
GOLDENS = TESTS / "hub" / "goldens"
INPUTS = ("tokens", "mask", "source", "source_mask")

type Arrays = Mapping[str, np.ndarray]


def read(name: str) -> dict[str, np.ndarray]:
    """A stored result."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def tests_of(name: str) -> Any:
    """A file of tests as a module."""
    spec = importlib.util.spec_from_file_location(name, TESTS / "models" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apart(got: Any, want: Any) -> float:
    """The largest difference."""
    return float(np.abs(np.asarray(got) - np.asarray(want)).max())


def relative(got: Arrays, want: Arrays) -> float:
    """The largest difference of any tensor, relative to the largest of it, which counts as a
    thousandth of all at least.
    """
    sizes = {name: float(np.abs(tensor).max()) for name, tensor in want.items()}
    least = max(sizes.values()) / 1000
    return max(apart(got[name], tensor) / max(sizes[name], least) for name, tensor in want.items())


# -------------------------------------------------------------------------- folders of transformers


def inputs_of(want: Arrays) -> dict[str, jax.Array]:
    """What `apply` takes: named `in:NAME`, or one of `INPUTS`."""
    named = {name.removeprefix("in:"): a for name, a in want.items() if name.startswith("in:")}
    found = named or {name: want[name] for name in INPUTS if name in want}
    return {name: jnp.asarray(a.astype(bool) if "mask" in name else a) for name, a in found.items()}


def logits(bundle: hub.Bundle, want: Arrays) -> float:
    """The largest difference of a logit: where no padding is written, and at positions with gaps
    where they are stored.
    """
    run = jax.jit(bundle.model.apply)
    inputs = inputs_of(want)
    of_tokens = want["logits"].ndim == 3 and "mask" in inputs
    written = np.asarray(inputs["mask"]) if of_tokens else np.ones(want["logits"].shape[:1], bool)
    worst = apart(np.asarray(run(bundle.params, inputs).logits)[written], want["logits"][written])
    if "apart" not in want:
        return worst
    gaps = {"tokens": jnp.asarray(want["apart"]), "positions": jnp.asarray(want["positions"])}
    return max(worst, apart(run(bundle.params, gaps).logits, want["apart_logits"]))


def gradients(bundle: hub.Bundle, want: Arrays) -> float:
    """The largest relative difference of a gradient of the stored loss.

    Gradients are a tree as the parameters are: saved like these they have the names and forms of
    transformers.
    """
    inputs = inputs_of(want)
    if "targets" in want:
        targets = jnp.asarray(want["targets"])
        weights = jnp.asarray(want["weights"])
    else:  # the next token
        targets = jnp.asarray(want["tokens"])[:, 1:]
        weights = jnp.asarray(want["mask"], jnp.float32)[:, 1:]

    def loss(params: tree.Params) -> jax.Array:
        scores = bundle.model.apply(params, inputs).logits
        scores = scores if "targets" in want else scores[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[
            ..., 0
        ]
        return -jnp.sum(picked * weights) / jnp.sum(weights)

    grads = jax.jit(jax.grad(loss))(bundle.params)
    with tempfile.TemporaryDirectory() as room:
        ours = load_file(
            dataclasses.replace(bundle, params=grads).save_pretrained(Path(room) / "grads")
            / "model.safetensors"
        )
    stored = {name.removeprefix("grad:"): a for name, a in want.items() if name.startswith("grad:")}
    bare = {
        name.partition(".")[2]: a for name, a in ours.items()
    }  # some files leave the prefix out
    return relative(bare | ours, stored)


def folders(quick: bool) -> Iterator[tuple]:
    """Every folder that transformers wrote."""
    found = sorted(
        path.parent.relative_to(GOLDENS).as_posix() for path in GOLDENS.rglob("config.json")
    )
    for name in progress(found, "folders"):
        bundle = hub.from_pretrained(GOLDENS / name)
        want = read(name)
        yield f"{Path(name).name} logits", logits(bundle, want), "", "<= 2e-4"
        if not quick:
            yield (
                f"{Path(name).name} gradients",
                gradients(bundle, want),
                "of the largest",
                "<= 1e-3",
            )


# ----------------------------------------------------------------------------------- torch's layers


def images(quick: bool) -> Iterator[tuple]:
    """Networks of convolutions, in inference and by the moments of the batch."""
    stored = tests_of("test_images")
    for name in progress(stored.CONFIGS, "images"):
        model, params, pixels = stored.load(name)
        learnt = jax.jit(
            lambda p, x, model=model: model.apply(p, x, rng=jax.random.key(0), train=True).logits
        )
        worst = apart(jax.jit(model.apply)(params, pixels).logits, stored.GOLDENS[f"{name}/logits"])
        worst = max(worst, apart(learnt(params, pixels), stored.GOLDENS[f"{name}/train"]))
        yield f"images {name} logits", worst, "", "<= 2e-4"
        if not quick:
            batch = {"pixels": pixels, "labels": jnp.arange(len(pixels), dtype=jnp.int32) % 3}
            loss = lambda p, model=model, batch=batch: losses.classification(
                model, p, batch, jax.random.key(0)
            )[0]
            grads = jax.jit(jax.grad(loss))(params)
            ours = tree.flatten(tree.unstack(grads) if "blocks" in grads else grads)
            yield (
                f"images {name} gradients",
                relative(ours, stored.golden(name, "grad")),
                "of the largest",
                "<= 1e-3",
            )


def stacks(quick: bool) -> Iterator[tuple]:
    """Stacks of an encoder and a decoder, and recurrent layers in both directions; no gradients are
    stored.
    """
    stored = tests_of("test_transformer")
    for form in stored.FORMS:
        model, params, inputs, want = stored.of_torch(form)
        yield (
            f"transformer {form}-norm logits",
            apart(jax.jit(model.apply)(params, inputs).logits, want["logits"]),
            "",
            "<= 2e-4",
        )
    stored = tests_of("test_rnn")
    for kind in stored.KINDS:
        model, params, inputs, want = stored.of_torch(kind)
        _, context = jax.jit(model.parts.embed)(params, inputs)
        shown = apart(np.asarray(context["memory"])[want["mask"]], want["memory"][want["mask"]])
        yield (
            f"rnn {kind} states",
            max(shown, apart(context["start"], want["start"])),
            "",
            "<= 2e-4",
        )


# ----------------------------------------------------------------------- models that people trained


def trained(quick: bool) -> Iterator[tuple]:
    """Embeddings of sentences, and the loss of each token of a text."""
    want = read("encoder-minilm")["embeddings"]
    text = (GOLDENS / "sentences.txt").read_text(encoding="utf-8")
    found = embed_texts(
        hub.from_pretrained("all-minilm-l6-v2"), [*text.splitlines(), text], batch_size=17
    )
    cosines = (
        np.sum(found * want, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(want, axis=1)
    )
    yield (
        "all-minilm-l6-v2 least cosine of 50 sentences and a long text",
        float(cosines.min()),
        "",
        ">= 0.99999",
    )
    if not quick:
        bundle = hub.from_pretrained("smollm2-135m", dtype="float32")
        stored = read("smollm2")
        nll = evaluate.token_nll(bundle.model, bundle.params, stored["windows"])
        yield "smollm2-135m loss of a token", apart(nll, stored["token_nll"]), "nats", "<= 2e-4"


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """All comparisons; nothing is random."""
    parts: tuple[Callable[[bool], Iterator[tuple]], ...] = (folders, images, stacks, trained)
    return [entry for part in parts for entry in part(quick)], {
        "folders": str(GOLDENS.relative_to(TESTS.parent))
    }


if __name__ == "__main__":
    report.experiment(__doc__, "logits only, without SmolLM2", run)
