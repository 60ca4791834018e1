"""The command line that every experiment has."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxmodel.report.json_out import check_target, clean_stdout, emit, rows
from jaxmodel.report.run import versions

type Result = tuple[Iterable[Sequence[Any]], Mapping[str, Any]]


def experiment(
    doc: str | None,
    quick: str,
    run: Callable[[bool, int], Result],
    args: Sequence[str] | None = None,
) -> None:
    """Run an experiment from the command line: `--quick`, `--seed` and `--json`.

    Its rows (see `rows`) are printed, or written to the file that `--json` names.

    Args:
      doc: the experiment's docstring; its first line is shown in the help.
      quick: a description of the quick form, for the help.
      run: `(quick, seed) -> (entries, protocol)`; the seed and the machine are added to the
        protocol.
      args: the command-line arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument(
        "--json",
        default="-",
        metavar="FILE",
        help="where the numbers go; '-' is standard output, the default",
    )
    options = parser.parse_args(args)
    check_target(options.json)
    began = time.perf_counter()
    with clean_stdout(options.json):
        entries, protocol = run(options.quick, options.seed)
    seconds = time.perf_counter() - began
    emit(
        rows(
            entries,
            seconds,
            {"quick": options.quick, "seed": options.seed, **protocol, **versions()},
        ),
        options.json,
    )
