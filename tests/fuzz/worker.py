"""The process in which cases are read: a line of JSON for each comes in, one with how it ended goes
out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _load(folder: Path) -> Any:
    from jaxmodel import hub

    gguf = sorted(folder.glob("*.gguf"))
    bundle = hub.from_pretrained(gguf[0] if gguf else folder)
    if isinstance(bundle.processor, hub.Tokenizer):
        bundle.processor.decode(bundle.processor.encode("A dog runs. 12 <s>"))


def _chat(folder: Path) -> Any:
    from jaxmodel.hub import tokenizer

    return tokenizer.from_folder(folder).apply_chat([{"role": "user", "content": "hi"}])


def _tokenizer(folder: Path) -> Any:
    from jaxmodel.hub import tokenizer

    made = tokenizer.from_folder(folder)
    return made.decode(made.encode("A dog runs. ab 12 <s>", special=True), skip_special=False)


def _recipe(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        _main(
            "compress",
            str(folder.parents[2] / "samples" / "plain"),
            "--recipe",
            str(file),
            "--out",
            f"out-{file.name}",
        )


def _documents(folder: Path) -> Any:
    from jaxmodel.data import documents

    return sum(map(len, documents(sorted(map(str, folder.iterdir())))))


def _images(folder: Path) -> Any:
    import numpy as np

    from jaxmodel.data import ImageFolder

    images = ImageFolder(str(folder), (8, 8))
    return images.take(np.arange(len(images)))["pixels"].sum()


def _shards(folder: Path) -> Any:
    import numpy as np

    from jaxmodel.data import PackedShards, Shards

    shards = Shards(folder)
    return [shards.doc(i) for i in range(len(shards))], PackedShards(shards, 16).take(np.arange(1))


def _checkpoints(folder: Path) -> Any:
    import jax

    from jaxmodel import checkpoint, train

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda *axes, dtype="float32": jax.ShapeDtypeStruct(axes, dtype, sharding=one)
    like = train.TrainState(shape(dtype="int32"), shape(dtype="int32"), {"w": shape(4, 3)}, (), {})
    with checkpoint.Checkpoints(folder, identity={"a": 1}) as checkpoints:
        return checkpoints.restore(like)


def _main(*words: str) -> Any:
    """A command line; other exit codes than 0 go on to who called."""
    from jaxmodel.cli import main

    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise


READERS: dict[str, Callable[[Path], Any]] = {
    "load": _load,
    "chat": _chat,
    "documents": _documents,
    "images": _images,
    "shards": _shards,
    "checkpoints": _checkpoints,
    "generate": lambda folder: _main(
        "generate", str(folder), "--prompt", "hi", "--max-new-tokens", "2"
    ),
    "adapters": lambda folder: _main(
        *("generate", str(folder.parents[2] / "samples" / "plain"), "--adapter", str(folder)),
        *("--prompt", "hi", "--max-new-tokens", "2"),
    ),
    "predict": lambda folder: _main(
        "predict", str(folder), "--input", str(folder.parents[2] / "samples/data.txt/a.txt")
    ),
    "recipe": _recipe,
    "tokenizer": _tokenizer,
    "rerun": lambda folder: _main("rerun", str(folder)),
    "resume": lambda folder: _main("resume", str(folder), "--steps", "3"),
    "replay": lambda folder: _main("replay", str(folder), "--step", "2"),
}


def _told() -> int:
    """The peak of this process's memory since it was set back, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def one(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case; `{"end": "right" | "refused" | what was wrong, "said", "peak"}`."""
    from jaxmodel.errors import InputError

    os.chdir(case["room"])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    out = io.StringIO()
    err = io.StringIO()
    end = "right"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if "words" in case:
                _main(*case["words"])
            else:
                READERS[case["reader"]](Path(case["folder"]))
    except InputError as error:
        end = "refused" if "\n" not in str(error) else "several lines"
        err.write(f"jaxmodel: {error}\n")
    except SystemExit as error:
        news = "jaxmodel: step [0-9]|.* is set aside as "  # of resume
        lines = [
            line
            for line in err.getvalue().splitlines()
            if re.match("jaxmodel: ", line) and not re.match(news, line)
        ]
        if error.code != 1 or case["whole"]:
            end = (
                "refused"
                if error.code == 2 and len(lines) == 1
                else f"code {error.code} and {len(lines)} lines"
            )
        if "Traceback" in err.getvalue():
            end = "traceback"
    except BaseException:
        end = "traceback"
        err.write(traceback.format_exc())
    return {"end": end, "said": err.getvalue()[-3000:], "peak": _told()}


def serve() -> None:
    """Until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints on standard output is no answer
    sys.stdout = sys.stderr
    import jaxmodel.cli  # noqa: F401

    for line in sys.stdin:
        answers.write(json.dumps(one(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
