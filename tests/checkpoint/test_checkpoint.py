"""Checkpoints: what is restored is what was saved, bit for bit, or a clear refusal; the last good
one is never lost.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, compress, optim, train
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2
from jaxmodel.train.state import init_state

MODEL = gpt2.model(gpt2.SIZES["tiny"])


def at(state, step, scale=1.0):
    """The state at another step, with other values."""
    params = jax.tree.map(lambda a: a * jnp.asarray(scale, a.dtype), state.params)
    return dataclasses.replace(
        state, step=jnp.int32(step), data_step=jnp.int32(step), params=params
    )


def like(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


@pytest.fixture(scope="module")
def state():
    optimizer = optax.adamw(1e-3)
    start = lambda key: init_state(MODEL.init(key), optimizer, average=True, guard=optim.Guard(4.0))
    return jax.jit(start)(jax.random.key(0))


@pytest.fixture(scope="module")
def once(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("saved") / "c"
    digests = {}
    with checkpoint.Checkpoints(folder, keep=checkpoint.RetentionPolicy(last=3)) as checkpoints:
        for step in (1, 2, 3):
            now = at(state, step, 1.0 + step)
            digests[step] = checkpoint.fingerprint(now)
            checkpoints.save(now)
    return folder, digests


@pytest.fixture
def saved(tmp_path, once):
    """A folder with the steps 1, 2, 3, and their digests."""
    return shutil.copytree(once[0], tmp_path / "c"), once[1]


def newest(folder):
    return folder / "step-000000003"


def test_a_restore_is_the_state_bit_for_bit(saved, state):
    folder, digests = saved
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step, digest in digests.items():
            found = checkpoints.restore(like(state), at_most=step)
            assert checkpoint.fingerprint(found) == digest and int(found.step) == step
            assert jax.tree.structure(found) == jax.tree.structure(state)


def test_another_process_cannot_save_there(tmp_path, state):
    program = """
import sys
from jaxmodel.checkpoint import Checkpoints
held = Checkpoints(sys.argv[1])
print('in', flush=True)
input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(
            InputError,
            match=f"checkpoints: process {other.pid} on .* is saving to {str(tmp_path)!r}; stop it "
            f"first",
        ):
            checkpoint.Checkpoints(tmp_path)
        with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert checkpoints.steps() == []
    finally:
        other.communicate("\n")
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        checkpoint.Checkpoints(tmp_path) as again,
    ):  # of one process
        checkpoints.save(at(state, 1))
        checkpoints.wait()
        assert again.steps() == [1]


def test_a_failed_save_is_forgotten_with_the_next_in_all_processes(tmp_path, state, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._arrays, "wait", lambda: 1 / 0)
        checkpoints.save(at(state, 1))
        checkpoints.wait(raises=False)
    checkpoints._arrays.wait()
    with monkeypatch.context() as patch:  # not the first process, which writes the manifest
        patch.setattr("jax.process_index", lambda: 1)
        checkpoints._finish(checkpoints._place(2), 2, {}, [])
    assert checkpoints._problem is None
    checkpoints.close()


def test_an_empty_folder_has_nothing(tmp_path, state):
    with checkpoint.Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(like(state)) is None and checkpoints.steps() == []


def test_donating_the_state_after_a_save_does_not_tear_it(tmp_path, state):
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda a: a * jnp.asarray(3, a.dtype), s), donate_argnums=0
    )
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 6):
            now = jax.tree.map(jnp.copy, at(state, step))
            digest = checkpoint.fingerprint(now)
            checkpoints.save(now)
            jax.block_until_ready(overwrite(now))
            checkpoints.wait()
            assert checkpoint.fingerprint(checkpoints.restore(like(state))) == digest


def test_retention_keeps_the_last_the_best_and_the_regular(tmp_path, state):
    with checkpoint.Checkpoints(
        tmp_path, keep=checkpoint.RetentionPolicy(last=2, best=1, every=4)
    ) as checkpoints:
        for step, score in ((1, 5.0), (2, 1.0), (3, 3.0), (4, 4.0), (5, None), (6, 2.0)):
            checkpoints.save(at(state, step), score=score)
    assert checkpoints.steps() == [2, 4, 5, 6]


def damage(kind, folder):
    files = sorted(
        p
        for p in newest(folder).rglob("*")
        if p.is_file() and p.name != "manifest.json" and p.stat().st_size > 100
    )
    if kind == "torn":
        files[0].write_bytes(files[0].read_bytes()[:-7])
    elif kind == "flipped":
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2] ^= 4
        files[-1].write_bytes(content)
    elif kind == "missing":
        files[0].unlink()
    elif kind == "no manifest":
        (newest(folder) / "manifest.json").unlink()
    elif kind == "torn manifest":
        file = newest(folder) / "manifest.json"
        file.write_bytes(file.read_bytes()[:-40])
    elif kind == "changed manifest":
        file = newest(folder) / "manifest.json"
        file.write_text(file.read_text().replace('"data_step": 3', '"data_step": 4'))


@pytest.mark.parametrize(
    "kind", ["torn", "flipped", "missing", "no manifest", "torn manifest", "changed manifest"]
)
def test_a_bad_checkpoint_is_said_and_the_one_before_is_taken(kind, saved, state, capsys):
    folder, digests = saved
    damage(kind, folder)
    with checkpoint.Checkpoints(folder, keep=checkpoint.RetentionPolicy(last=3)) as checkpoints:
        found = checkpoints.restore(like(state))
        assert int(found.step) == 2 and checkpoint.fingerprint(found) == digests[2]
        said = capsys.readouterr().err
        assert kind == "no manifest" or (
            "of step 3" in said and "set aside as step-000000003.bad" in said
        )
        checkpoints.save(at(state, 3, 9.0))  # and its number is free again
    assert checkpoints.steps() == [1, 2, 3]


def test_reading_only_changes_nothing(saved, state, capsys):
    folder, _ = saved
    damage("torn", folder)
    before = sorted(folder.rglob("*"))
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        assert int(checkpoints.restore(like(state)).step) == 2
        checkpoints.save(at(state, 9))
    assert (
        sorted(folder.rglob("*")) == before
        and "the previous step is used" in capsys.readouterr().err
    )


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path, state):
    with checkpoint.Checkpoints(
        tmp_path, identity={"model": {"width": 32, "depth": 3}, "seed": 0}
    ) as checkpoints:
        checkpoints.save(state)
    said = r"with another config: model.width was 32, is 64; seed was 0, is 1"
    identity = {"model": {"width": 64, "depth": 3}, "seed": 1}
    with (
        checkpoint.Checkpoints(tmp_path, identity=identity) as checkpoints,
        pytest.raises(InputError, match=said),
    ):
        checkpoints.restore(like(state))


def test_other_data_is_refused(tmp_path, state):
    with checkpoint.Checkpoints(tmp_path, data="a" * 64) as checkpoints:
        checkpoints.save(state)
    said = r"data: its fingerprint was aaaaaaaaaaaa when step 0 .* and is bbbbbbbbbbbb"
    with (
        checkpoint.Checkpoints(tmp_path, data="b" * 64) as checkpoints,
        pytest.raises(InputError, match=said),
    ):
        checkpoints.restore(like(state))


def test_other_arrays_are_refused(tmp_path, state):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        params = {**state.params, "positions": jnp.zeros((7, 32))}
        with pytest.raises(
            InputError,
            match=re.escape(
                "params.positions is float32[128, 32] in the checkpoint, float32[7, 32] now"
            ),
        ):
            checkpoints.restore(like(dataclasses.replace(state, params=params)))


def test_compressed_leaves_and_their_static_fields(tmp_path, state):
    params, _ = compress.apply(compress.get_recipe("int4-rtn"), state.params, axes=MODEL.axes)
    now = train.TrainState(jnp.int32(1), jnp.int32(1), params, (), {})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(now)
        checkpoints.wait()
        assert checkpoint.fingerprint(checkpoints.restore(like(now))) == checkpoint.fingerprint(now)
        pad = dataclasses.replace(params["embed"], pad=0, activations="int8")
        other = dataclasses.replace(now, params={**params, "embed": pad})
        with pytest.raises(InputError, match='params.embed.activations was absent, is "int8"'):
            checkpoints.restore(like(other))


def test_a_restore_elsewhere_says_that_bits_may_differ(tmp_path, state, capsys):
    with checkpoint.Checkpoints(
        tmp_path, environment={"cpu": {"count": 2}, "jaxlib": "0.12.0"}
    ) as checkpoints:
        checkpoints.save(state)
    with checkpoint.Checkpoints(
        tmp_path, environment={"cpu": {"count": 64}, "jaxlib": "0.12.0"}
    ) as checkpoints:
        checkpoints.restore(like(state))
    assert (
        "differ slightly from that of an uninterrupted run: cpu.count was 2, is 64"
        in capsys.readouterr().err
    )


def test_a_failed_save_is_said_and_loses_nothing(saved, state, capsys, monkeypatch):
    folder, digests = saved
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints._place(4).write_text("a file where the folder should be")
        checkpoints.save(at(state, 4))
        with pytest.raises(
            InputError, match=r"the last state could not be saved .*; the last good step is 3"
        ):
            checkpoints.wait()
        assert "checkpoint of step 4 failed" in capsys.readouterr().err
        assert checkpoint.fingerprint(checkpoints.restore(like(state))) == digests[3]
        checkpoints._place(4).unlink()
        checkpoints.save(at(state, 5))
    assert checkpoints.steps()[-1] == 5


def test_what_an_interrupted_save_left_is_removed_at_the_next(saved, state):
    folder, _ = saved
    left = folder / "step-000000004" / "arrays.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert int(checkpoints.restore(like(state)).step) == 3
        checkpoints.save(at(state, 5))
    assert not left.parent.exists()


def test_the_manifest_is_for_readers_too(saved):
    folder, _ = saved
    record = json.loads((newest(folder) / "manifest.json").read_text())
    assert record["step"] == 3 and record["arrays"]["params.embed"] == [[256, 32], "float32"]
    assert all(size > 0 and len(digest) == 64 for size, digest in record["files"].values())
    assert np.isfinite(record["step"])
