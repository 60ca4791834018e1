"""Models by name: what installed packages carry, sizes whose weights are at the hub, ids and
revisions of the hub.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle, from_pretrained
from jaxmodel.models import gpt2


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = gpt2.model(gpt2.SIZES["tiny"])
    return Bundle(model, jax.jit(model.init)(jax.random.key(0)), None, {"name": "tiny"})


@pytest.fixture(scope="module")
def stored(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle.save_pretrained(tmp_path_factory.mktemp("stored") / "tiny")


def refused(source: str | Path, *parts: str, **options: Any) -> None:
    """Loading raises InputError in one line that has all the parts."""
    with pytest.raises(InputError) as caught:
        from_pretrained(source, **options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_unknown_names() -> None:
    refused(
        "smollm2-135",
        "'smollm2-135' is not known",
        "nearest: smollm2-135m",
        "existing folder",
        "org/name",
    )
    refused("a/b/c", "'a/b/c' is not known")
    refused(
        "gpt2/tiny",
        "'gpt2/tiny' is a size without weights; allowed: all-minilm-l6-v2, smollm2-135m, "
        "smollm2-135m-instruct",
    )
    refused("./not/here", "'./not/here' is not known")
    refused("smollm2-135m", "'float12'", "bfloat16", dtype="float12")


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, stored: Path) -> None:
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name in ("org/absent", "openai-community/gpt2-xl"):
            raise OSError("404 Client Error.\nRepository not found, and much more")
        return str(stored)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    monkeypatch.setattr(
        sys.modules["huggingface_hub"], "snapshot_download", snapshot_download, raising=False
    )
    assert from_pretrained("org/name").model is bundle.model
    assert asked[0][0] == "org/name" and "*.safetensors" in asked[0][1]["allow_patterns"]
    refused("org/absent", "'org/absent'", "404 Client Error.")
    given = {"revision": "v1", "token": "hf_x", "cache_dir": "there", "local_files_only": True}
    from_pretrained("org/name", **given)
    assert given.items() <= asked[-1][1].items()
    from_pretrained("org/name@v2")
    assert asked[-1][0] == "org/name" and asked[-1][1]["revision"] == "v2"
    refused("org/name@v2", "revision: 'v1' given, but 'org/name@v2' asks for 'v2'", revision="v1")
    refused(stored, "only a hub id has revisions", revision="v1")
    for size in ("gpt2", "gpt2/gpt2"):  # a size whose weights are at the hub
        assert (
            from_pretrained(size).model is bundle.model and asked[-1][0] == "openai-community/gpt2"
        )
    refused(
        "gpt2-xl",
        "'gpt2-xl' is 'openai-community/gpt2-xl' at the hub, which cannot be loaded from the hub: "
        "404",
    )


def test_a_hub_id_from_the_hubs_own_cache_without_a_network(
    bundle: Bundle, stored: Path, tmp_path: Path
) -> None:
    """The real library, told to stay offline: a snapshot that is in its cache is found, any other
    is one clear line.
    """
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(stored, snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("0" * 40)
    program = (
        "import sys; from jaxmodel import hub, tree; "
        "print(tree.fingerprint(hub.from_pretrained(sys.argv[1]).params))"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2]
    )
    done = run([sys.executable, "-c", program, "org/name"])
    assert done.stdout.strip() == tree.fingerprint(bundle.params), done.stderr
    absent = run([sys.executable, "-m", "jaxmodel", "eval", "org/other"])
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1, absent.stderr
    assert "'org/other' is not a folder here and cannot be loaded from the hub" in absent.stderr
