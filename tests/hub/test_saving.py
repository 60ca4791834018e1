"""Saving a bundle: what stood there survives whatever goes wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxmodel import layers, tree
from jaxmodel.errors import InputError
from jaxmodel.hub import (
    bundle as bundles,
    from_pretrained,
    train_bpe,
)
from tests.hub.conftest import (
    SHARD,
    contents,
    plain,
    save_refused,
    variant,
)


def test_takes_the_place_of_a_whole_bundle(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "models" / "out"
    processor = train_bpe([], vocab_size=257)
    dataclasses.replace(plain("gpt2", vocab=257), processor=processor).save_pretrained(
        str(out)
    )  # parents are made
    shutil.copy(stored / "shards" / SHARD, out)
    variant("llama", "int4-rtn").save_pretrained(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "jaxmodel.json",
        "model.safetensors",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755
    (tmp_path / "link").symlink_to(out)
    plain("gpt2").save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and from_pretrained(out).model is plain("gpt2").model
    (tmp_path / "empty").mkdir()
    assert (
        from_pretrained(plain("gpt2").save_pretrained(tmp_path / "empty")).card
        == plain("gpt2").card
    )


def test_where_a_bundle_cannot_go(tmp_path: Path, stored: Path) -> None:
    (tmp_path / "file").write_text("mine")
    save_refused(plain("gpt2"), tmp_path / "file", "out: ", "file' is a file; allowed: a folder")
    with pytest.raises(InputError, match="below' cannot be made .*; choose a place"):
        plain("gpt2").save_pretrained(tmp_path / "file" / "below")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    save_refused(plain("gpt2"), tmp_path / "photos", "'a.jpg'", "choose an empty or new folder")
    shutil.copytree(stored / "gpt2-plain", tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("mine")  # a bundle, but not only
    save_refused(plain("gpt2"), tmp_path / "bundle", "'notes.txt'")
    (tmp_path / "weights").mkdir()
    shutil.copy(stored / "gpt2-plain" / "model.safetensors", tmp_path / "weights")
    save_refused(plain("gpt2"), tmp_path / "weights", "no config.json")


def test_params_that_do_not_fit_the_config(tmp_path: Path) -> None:
    bundle = plain("llama")
    fused = dataclasses.replace(bundle, params=layers.fuse(bundle.params))
    save_refused(fused, tmp_path / "out", "'blocks/0/attn/k' is missing", "fused")
    short = dataclasses.replace(
        bundle, params={**bundle.params, "embed": bundle.params["embed"][:-1]}
    )
    save_refused(short, tmp_path / "out", "'embed' has shape [255, 32]", "needs [256, 32]")
    assert not (tmp_path / "out").exists()


def test_others_may_read_a_bundle_if_the_umask_lets_them(tmp_path: Path) -> None:
    """Each file as any new file, and a folder that is replaced stays as open as it was."""
    for umask, mode in ((0o022, 0o644), (0o007, 0o660), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            folder = plain("gpt2").save_pretrained(tmp_path / f"out-{umask}")
        finally:
            os.umask(old)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    folder.chmod(0o770)
    plain("gpt2").save_pretrained(folder)
    assert folder.stat().st_mode & 0o777 == 0o770


@pytest.mark.parametrize("stage", ["save_file", "write_text", "fsync", "mkdir", "rename"])
def test_full_disk(
    stage: str, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stored / "gpt2-plain", tmp_path / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"save_file": bundles, "write_text": Path, "fsync": os, "mkdir": Path, "rename": Path}[
        stage
    ]
    if (
        stage == "rename"
    ):  # where folders cannot be swapped at once: the second rename fails, the first is undone
        monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
        rename = Path.rename
        second = lambda a, b: not a.name.endswith("-old") and b.name == "out"
        monkeypatch.setattr(Path, "rename", lambda a, b: full() if second(a, b) else rename(a, b))
    elif stage == "fsync":  # of a file; a folder need not be synced
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: full() if os.path.isfile(f"/proc/self/fd/{fd}") else fsync(fd)
        )
    else:
        monkeypatch.setattr(owner, stage, full)
    save_refused(
        variant("llama", "plain"),
        tmp_path / "out",
        "cannot be written",
        "No space left",
        "is unchanged",
    )
    monkeypatch.undo()
    assert tree.fingerprint(from_pretrained(tmp_path / "out").params) == tree.fingerprint(
        plain("gpt2").params
    )


def test_swap_without_the_systems_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plain("gpt2").save_pretrained(tmp_path / "out")
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: types.SimpleNamespace(renameat2=lambda *args: -1)
    )
    variant("llama", "plain").save_pretrained(out)
    assert from_pretrained(out).model is plain("llama").model and [
        path.name for path in tmp_path.iterdir()
    ] == ["out"]


# In a process of its own: a file larger than the system allows, then a kill.
PROGRAM = """
import os, resource, signal, sys
from jaxmodel import hub, tree
from jaxmodel.errors import InputError
from jaxmodel.hub import bundle as bundles
from jaxmodel.hub import saving

source, out, stage = sys.argv[1:]
bundle = hub.from_pretrained(source)
if stage == "weights":
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        bundle.save_pretrained(out)
    except InputError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(sorted(os.listdir(os.path.dirname(out))), flush=True)

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

save_file = bundles.save_file
def half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    kill()

sync = saving._sync
if stage == "weights":
    bundles.save_file = half
else:
    saving._sync = lambda path: kill() if path == bundles.Path(out).parent else sync(path)
bundle.save_pretrained(out)
"""


@pytest.mark.parametrize("stage", ["weights", "swapped"])
def test_file_limit_and_kill(stage: str, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stored / "gpt2-plain", out)
    command = [sys.executable, "-c", PROGRAM, str(stored / "llama-plain"), str(out), stage]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2]
    )
    assert done.returncode == -9, done.stderr
    *message, listing = done.stdout.splitlines()
    assert listing == "['out']"
    if stage == "weights":
        assert (
            len(message) == 1
            and "cannot be written" in message[0]
            and "File too large" in message[0]
        )
        assert contents(out) == contents(stored / "gpt2-plain")
        kind = "gpt2"
    else:
        kind = "llama"
    assert tree.fingerprint(from_pretrained(out).params) == tree.fingerprint(plain(kind).params)
    assert (
        stage == "swapped" or len(list(tmp_path.iterdir())) == 2
    )  # what the kill left beside is in nobody's way
    plain("llama").save_pretrained(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and is cleared away
    assert from_pretrained(out).model is plain("llama").model
