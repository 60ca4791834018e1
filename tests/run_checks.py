"""Runs checks of a test file in this process and says, as JSON, how each failed:
`run_checks.py FILE NAME...`.

A name is that of a function of the file, with its arguments behind colons:
`check_equal:gpt2:data=8`. For checks that need another process than pytest's, one with eight
devices; see `outcomes8`.

`run_checks.py` alone serves: it reads requests, a line of JSON each, and answers each with a line.
So the many tests that need such a process, which takes seconds to start, share one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import runpy
import sys
import traceback
import types
from pathlib import Path
from typing import Any


def run(file: Path, names: list[str]) -> dict[str, str]:
    """The name of each check and how it failed, "" if it did not."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for name in names:
        function, *arguments = name.split(":")
        try:
            getattr(module, function)(*arguments)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


def run_program(source: str, arguments: list[str]) -> None:
    """Run a file (if it is the path of one) or a text as a program of its own."""
    sys.argv = [source if source.endswith(".py") else "-c", *arguments]
    if source.endswith(".py"):
        runpy.run_path(source, run_name="__main__")
        return
    own = sys.modules["__main__"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(source, "<program>", "exec"), vars(main))
    finally:
        sys.modules["__main__"] = own


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`{"out": what it printed, "error": a traceback, or ""}`."""
    out = io.StringIO()
    error = ""
    try:
        with contextlib.redirect_stdout(out):
            if "names" in request:
                print(json.dumps(run(Path(request["file"]), request["names"])))
            else:
                run_program(request["source"], request["arguments"])
    except BaseException:
        error = traceback.format_exc()
    return {"out": out.getvalue(), "error": error}


def forget_programs() -> None:
    """Before there are as many memory maps as Linux allows; see `few_memory_maps`."""
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()


def serve() -> None:
    """Until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints on standard output is no answer
    here = Path.cwd()
    gc.set_threshold(10_000, 20, 50)  # as in conftest.py
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
        os.chdir(here)
        forget_programs()


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
    else:
        serve()
