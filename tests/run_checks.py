"""Runs checks of a test file in this process and says, as JSON, how each failed:
`run_checks.py FILE NAME...`.

A name is that of a function of the file, with its arguments behind colons:
`check_equal:gpt2:data=8`. For checks that need another process than pytest's, one with eight
devices; see `outcomes8`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path


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


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
