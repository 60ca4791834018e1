"""What commit 88ff0fa saved still loads and computes the same: bundles of every family, plain and
compressed, and the checkpoint of a run, which goes on.

goldens/make_88ff0fa.py wrote the files with that commit.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import checkpoint, data, hub, train, tree
from jaxmodel.models import families, gpt2

ARCHIVE = Path(__file__).parent / "goldens" / "88ff0fa.zip"
FORMS = ("plain", "int8", "int4", "sparse")
AS_STORED = ("llama-int8", "llama-moe-sparse", "resnet-int4", "rnn-int8")
"""Of these what is stored runs as it is, activations rounded too; of the others the decoded weights
do, by one program for all forms of a member.
"""

with zipfile.ZipFile(ARCHIVE) as archive:
    MEMBERS = sorted({name.split("/")[1].rpartition("-")[0] for name in archive.namelist()} - {""})


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("88ff0fa")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def test_every_family_of_that_time_is_there():
    since = {"gpt_oss", "modernbert", "parallel", "misnamed"}  # younger, or declared by tests
    assert {member.partition("-")[0] for member in MEMBERS} == set(families()) - since


@pytest.mark.parametrize("member", MEMBERS)
def test_bundles(top, member):
    apply = None
    for form in FORMS:
        folder = top / "bundles" / f"{member}-{form}"
        bundle = hub.from_pretrained(folder)
        stored = dict(np.load(folder / "outputs.npz"))
        logits, decoded = stored.pop("logits"), stored.pop("decoded")
        apply = jax.jit(bundle.model.apply) if apply is None else apply  # of the plain form
        params = tree.map_leaves(
            lambda _, leaf: leaf.decode() if hasattr(leaf, "decode") else leaf, bundle.params
        )
        inputs = {name: jnp.asarray(value) for name, value in stored.items()}
        np.testing.assert_allclose(apply(params, inputs).logits, decoded, rtol=1e-5, atol=1e-5)
        if folder.name in AS_STORED:
            found = jax.jit(bundle.model.apply)(bundle.params, inputs).logits
            np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on(top):
    model = gpt2.model(gpt2.Config(16, 8, 2, 2, 8))
    stream = data.Stream(data.windows(np.arange(99) * 7 % 16, length=9, stride=8), batch_size=4)
    config = train.TrainConfig(
        steps=6,
        gradient_accumulation_steps=2,
        ema_decay=0.9,
        warmup_steps=2,
        max_grad_norm=1.0,
        spike=6.0,
        save_every=2,
        log_every=1,
    )
    end = dict(np.load(top / "run" / "end.npz"))
    with checkpoint.Checkpoints(top / "run" / "checkpoints", data=stream.fingerprint) as saved:
        assert saved.steps() == [2]
        state, history = train.fit(model, stream, config, checkpoints=saved)
    assert [row["step"] for row in history if "loss" in row] == [3, 4, 5, 6]
    losses = [row["loss"] for row in history if "loss" in row]
    np.testing.assert_allclose(losses, end.pop("losses")[2:], rtol=1e-5)
    for path, leaf in tree.flatten(state.params).items():
        np.testing.assert_allclose(leaf, end[path.replace("/", ".")], rtol=1e-5, atol=1e-5)
