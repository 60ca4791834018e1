"""Checkpoints and data in stores of objects, by servers on this machine: as in a folder, and
nothing lies on the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, child, data, limits
from jaxmodel.checkpoint import stored
from jaxmodel.data.packed_shards import ShardWindows
from jaxmodel.data.sources import documents
from jaxmodel.errors import InputError
from jaxmodel.train.state import init_state
from tests.checkpoint.test_checkpoint import at, like
from tests.data.conftest import Bytes


@pytest.fixture(scope="module")
def state():
    """Of few arrays: each costs requests."""
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    return init_state(params, optax.adam(1e-3))


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    """The URL of a bucket."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "s3":
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
            for name, value in (
                ("ACCESS_KEY_ID", "me"),
                ("SECRET_ACCESS_KEY", "secret"),
                ("DEFAULT_REGION", "us-east-1"),
            ):
                patch.setenv(f"AWS_{name}", value)
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("weights")
        else:
            from tests.gcs import Server

            server = Server("weights")
            server.start()
            address = f"http://127.0.0.1:{server.port}"
            for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
                patch.setenv(name, address)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "me")
        yield f"{request.param}://weights"
        server.stop()


@pytest.fixture
def folder(bucket, request):
    return f"{bucket}/{request.node.originalname}"


def test_the_last_ones_stay_and_are_restored_bit_for_bit(folder, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with checkpoint.Checkpoints(folder, keep=checkpoint.RetentionPolicy(last=2)) as checkpoints:
        digests = {}
        for step in (1, 2, 3):
            now = at(state, step, 1.0 + step)
            digests[step] = checkpoint.fingerprint(now)
            checkpoints.save(now)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    with checkpoint.Checkpoints(folder) as again:
        for step in (3, 2):
            assert checkpoint.fingerprint(again.restore(like(state), at_most=step)) == digests[step]
    assert not any(tmp_path.iterdir())


def test_a_save_that_did_not_end_does_not_count_and_a_cut_off_one_is_set_aside(
    folder, state, capsys
):
    with checkpoint.Checkpoints(folder, keep=checkpoint.RetentionPolicy(last=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(at(state, step, 1.0 + step))
    store, place = fsspec.url_to_fs(folder, skip_instance_cache=True)
    store.rm_file(f"{place}/step-000000003/manifest.json")
    largest = max(
        store.find(f"{place}/step-000000002/arrays", detail=True).values(),
        key=lambda entry: entry["size"],
    )
    store.pipe_file(largest["name"], store.cat_file(largest["name"])[:-7])
    with checkpoint.Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(like(state))
    assert int(found.step) == 1 and checkpoint.fingerprint(found) == checkpoint.fingerprint(
        at(state, 1, 2.0)
    )
    said = capsys.readouterr().err
    assert "of step 2 has" in said and "set aside as step-000000002.bad" in said


def test_without_the_bucket_it_says_so(bucket):
    nowhere = bucket.replace("weights", "nowhere") + "/run"
    with pytest.raises(InputError, match=f"folder '{nowhere}' cannot be used .no such bucket"):
        checkpoint.Checkpoints(nowhere)


def test_batches_of_shards_in_a_bucket_are_those_of_a_folder(folder, tmp_path):
    texts = [f"text {i} of many, " * (i % 7 + 1) for i in range(50)]
    shards = [
        data.tokenize(texts, Bytes(), place, shard_tokens=300) for place in (folder, tmp_path)
    ]
    far, near = (data.Stream(ShardWindows(where, 16), 4, seed=1) for where in shards)
    assert len(shards[0].index["shards"]) > 5 and far.fingerprint == near.fingerprint
    for step in (0, 7):
        for name, array in far.batch(step).items():
            np.testing.assert_array_equal(array, near.batch(step)[name])


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_after_a_save_that_failed_the_next_one_counts(folder, state, monkeypatch, capsys):
    with checkpoint.Checkpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            right = stored._spec
            patch.setattr(
                stored,
                "_spec",
                lambda place, name: right(str(place).replace("weights", "nowhere"), name),
            )
            patch.setattr(stored, "PATIENCE", 2.0)
            checkpoints.save(at(state, 1))
            checkpoints.wait(raises=False)
        assert (
            "step 1 failed (not written within 2 s)" in capsys.readouterr().err
            and checkpoints.steps() == []
        )
        checkpoints.save(at(state, 2))
        checkpoints.wait()
        assert checkpoints.steps() == [2] and int(checkpoints.restore(like(state)).step) == 2


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_files_of_records_are_read_as_local_ones_are(folder, kind, tmp_path, monkeypatch):
    """Tried in another process, by a copy that is bounded and does not stay."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    records = pytest.importorskip("array_record.python.array_record_module")
    texts = [f"text {i} of many" for i in range(300)]
    near = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts, "other": texts[::-1]}), near)
    else:
        writer = records.ArrayRecordWriter(str(near), "group_size:10")
        for text in texts:
            writer.write(text.encode())
        writer.close()
    asked = []
    tried = child.tried
    monkeypatch.setattr(
        child, "tried", lambda *args, **more: (asked.append(args), tried(*args, **more))
    )
    rooms = tmp_path / "rooms"
    rooms.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rooms))
    store, place = fsspec.url_to_fs(f"{folder}-{kind}", skip_instance_cache=True)
    far = f"{folder}-{kind}/a.{kind}"
    store.pipe_file(f"{place}/a.{kind}", near.read_bytes())
    assert list(documents(far)) == list(documents(near)) == texts
    assert [Path(args[1]).parent.parent == rooms for args in asked] == [True, False]
    content = near.read_bytes()
    store.pipe_file(f"{place}/b.{kind}", content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"/b.{kind}' is not a complete") as error:
        list(documents(far.replace("/a.", "/b.")))
    assert str(rooms) not in str(error.value).partition(": ")[0]
    monkeypatch.setattr(limits, "_now", limits.Limits(download_bytes=1000))
    with pytest.raises(InputError, match=r"/a.* is larger than 1,000 bytes.*download_bytes=..."):
        list(documents(far))
    assert not [*rooms.iterdir()]


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_two_processes_save_there_and_one_begins_with_what_they_left(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} is followed by {i + 1}." for i in range(900)))
    sizes = (
        "--width 16 --depth 1 --heads 2 --context 16 --batch 4 --vocab 257 --eval-batches 1 "
        "--steps 4 --save-every 2"
    )

    def run(*more):
        command = [
            sys.executable,
            "-m",
            "jaxmodel",
            "train",
            *sizes.split(),
            "--data",
            str(text),
            "--heldout",
            str(text),
        ]
        options = [
            "--sample",
            "1",
            "--checkpoints",
            folder,
            "--runs",
            str(tmp_path / "runs"),
            "--json",
            "-",
            *more,
        ]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    two, _ = run("--processes", "2", "--mesh", "fsdp=2")  # so each has something to write
    assert two["processes"] == 2 and not [*(tmp_path / "runs").glob("*/checkpoints")]
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
    one, said = run()
    assert one["steps"] == 4 and one["history"] == [] and "restoring step 4" in said
    weights = [Path(run["out"], "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]
