"""The entry point: read the options, run the verb, keep its results.

Errors of the user become one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib.metadata
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tyro

from jaxmodel.cli import config_file
from jaxmodel.cli.options import VERBS, Completion, Launch, Rerun, Resume, Train, check
from jaxmodel.cli.paths import with_standard_input
from jaxmodel.cli.words import checked, grouped, launched, parted
from jaxmodel.errors import InputError, printable
from jaxmodel.report.json_out import check_target, clean_stdout, emit
from jaxmodel.report.table import console_for

ABOUT = """Functional JAX models: train, compress, evaluate, generate.

Verbs that compute leave a run folder, runs/<time>-<verb>/. `jaxmodel --version` prints the version.

The environment variable JAXMODEL_DATA may name a folder with texts and images that come with no
package (wikitext2-test.txt, wikitext2-valid.txt, tinyshakespeare.txt, mnist.npz), and
JAXMODEL_CACHE a folder for tokenised texts."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one verb and exit.

    The exit code is 0; 1 if a rerun differs; 2 for bad input or a state that could not be saved;
    130 after Ctrl-C, 143 after SIGTERM, and 141 if nobody reads the output.
    """
    if "JAX_PLATFORMS" not in os.environ and not any(
        map(glob.glob, ("/dev/accel*", "/dev/nvidia*", "/dev/vfio/*", "/dev/kfd", "/dev/dxg"))
    ):
        os.environ["JAX_PLATFORMS"] = (
            "cpu"  # no accelerator: an installed libtpu would print lines of noise
        )
    try:
        words = sys.argv[1:] if args is None else args
        if list(words[:1]) in (["--version"], ["-V"]):
            print(f"jaxmodel {importlib.metadata.version('jaxmodel')}")
            raise SystemExit(0)
        with _terminable(), _undropped():
            _, code = run(read(words))
            sys.stdout.flush()
    except InputError as error:
        print(f"jaxmodel: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        code = 2
    except (
        BrokenPipeError
    ):  # who read standard output, such as `head`, has seen enough; what is kept is kept
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"jaxmodel: {str(error.filename)!r} cannot be used: {error.strerror}", file=sys.stderr
        )
        code = 2
    except KeyboardInterrupt as end:
        told = isinstance(end, _Terminated)
        print(f"jaxmodel: {'terminated' if told else 'interrupted'}", file=sys.stderr)
        code = 143 if told else 130
    if (
        distributed := sys.modules.get("jaxmodel.distributed.startup")
    ) is not None and distributed.by_mpi():
        distributed.leave(code)
    raise SystemExit(code)


class _Terminated(KeyboardInterrupt):
    """The exception for SIGTERM, which ends a verb as Ctrl-C does."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work inside in order; `train` does more with it."""

    def end(*_: Any) -> None:
        raise _Terminated

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _undropped() -> Iterator[None]:
    """Repeat Ctrl-C and SIGTERM if Python drops the exception that they raise.

    It does so in callbacks of the garbage collector (JAX has one) and in `__del__`, and the work
    would go on as if nothing had happened.
    """
    before = sys.unraisablehook
    waiting = []

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            return before(dropped)
        number = signal.SIGTERM if issubclass(dropped.exc_type, _Terminated) else signal.SIGINT
        waiting.append(
            threading.Timer(0.1, os.kill, (os.getpid(), number))
        )  # behind the callback, which is short
        waiting[-1].daemon = True
        waiting[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in waiting:
            timer.cancel()


def read(args: Sequence[str]) -> Any:
    """Return the options of a command line.

    Raises:
      InputError: what tyro says in a box, as one line.
      SystemExit: after printing help.
    """
    outer, inner = list(args), list[str]()
    if outer[:1] != ["launch"]:
        outer = launched(config_file.expanded(outer))
    if outer[:1] == ["launch"]:
        outer, inner = parted(outer)
    options = _parsed(checked([*outer, *inner[:1]]))
    if isinstance(options, Launch):
        if not inner:
            raise InputError(
                f"launch: {options.command[0]!r} given; allowed: train or resume, with its options"
            )
        inner = config_file.expanded(inner)  # once, as it may be standard input
        read(inner)  # prints its help, and refuses what is wrong
        return dataclasses.replace(options, command=tuple(inner))
    if isinstance(options, Completion):
        with contextlib.suppress(SystemExit):  # which has no code
            _parsed(["--tyro-print-completion", options.shell])
        raise SystemExit(0)
    if isinstance(options, Train) and options.print_config:
        sys.stdout.write(config_file.dumped(options))
        raise SystemExit(0)
    return options


def _parsed(words: Sequence[str]) -> Any:
    kinds: list[Any] = []
    for name, cls in VERBS.items():  # in the list of verbs only the first sentence of each
        first = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
        about = None if words[:1] == [name] else first
        kinds.append(Annotated[cls, tyro.conf.subcommand(name, description=about)])
    union = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    said = io.StringIO()
    shown = io.TextIOWrapper(
        io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8", write_through=True
    )
    helps = "--help" in words or "-h" in words
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(shown) if helps else contextlib.nullcontext(),
        ):
            return tyro.cli(union, prog="jaxmodel", description=ABOUT, args=words)
    except SystemExit as end:
        if end.code != 2:
            if helps:
                shown.seek(0)
                sys.stdout.write(grouped(shown.read(), words[0]))
            raise
    raise InputError(
        re.sub(r"^Error parsing \w+: ", "", _one_line(said.getvalue()))
    )  # which options refused themselves


def run(options: Any) -> tuple[Any, int]:
    """Run a verb in a run folder of its own; return its results and the exit code."""
    from jaxmodel.cli import rerun

    check(options)
    options = with_standard_input(options)
    if isinstance(options, Launch):
        return _launch(options, read(options.command))
    check_target(options.json)
    if isinstance(options, Resume):
        how = None if {"mesh", "devices"} & options.given.keys() else rerun.launched(options.folder)
        if how is not None:
            return _launch(how, options)
        with rerun.resumed(options) as work:
            return _do(options, work, "train", options.folder)
    return _do(options, options, rerun.name_of(options))


def _launch(how: Launch, options: Any) -> tuple[Any, int]:
    """Start the processes of a run of `train`, or of one that goes on."""
    from jaxmodel.cli import launching, rerun, training, verbs

    check_target(options.json)
    verb = verbs.Verb(
        functools.partial(launching.run, how),
        training.show,
        functools.partial(launching.prepare, how),
        training.code,
    )
    if isinstance(options, Resume):
        with rerun.resumed(options) as work:
            work = launching.with_mesh(how, work)
            return _do(options, work, "train", options.folder, verb)
    return _do(options, launching.with_mesh(how, options), "train", None, verb)


def _do(
    options: Any, work: Any, name: str, resumed: str | None = None, verb: Any = None
) -> tuple[Any, int]:
    from jaxmodel.cli import folders, rerun, verbs

    if verb is None and name == "rerun":
        verb = verbs.Verb(_rerun, rerun.show, _prepare_rerun, rerun.code)
    verb = verb or verbs.find(name)
    verb.prepare(work)
    with clean_stdout(options.json):
        if verb.keeps:
            with folders.dropped_on_failure(folders.of_run(name, work, resumed), resumed) as folder:
                result = verb.run(work, folder)
            folder.save_json("report.json", result)
        else:
            folder = None
            result = verb.run(work, None)
    try:
        emit(
            result, options.json
        )  # before anything is shown, which may be to a pipe that nobody reads to its end
    finally:
        with clean_stdout(options.json):
            verb.show(result, console_for(options.json))
            if folder is not None:
                print(f"{folder.folder}/", file=sys.stderr)
    return result, verb.code(result)


def _prepare_rerun(options: Rerun) -> None:
    from jaxmodel.cli import launching, rerun, verbs

    again = rerun.options_of(options.folder)
    how = rerun.launched(options.folder)
    if how is not None and isinstance(again, Train):
        return launching.prepare(how, launching.with_mesh(how, again))
    verbs.find(rerun.name_of(again)).prepare(again)


def _rerun(options: Rerun, folder: Any) -> dict[str, Any]:
    from jaxmodel.cli import rerun

    again = rerun.redirect(rerun.options_of(options.folder), folder)
    how = rerun.launched(options.folder)
    result, _ = run(again) if how is None else _launch(how, again)
    return rerun.compare(options.folder, result, folder)


def _one_line(box: str) -> str:
    """Return a message of tyro in one line: what is wrong, and the options perhaps meant."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours, where standard output is a terminal
    parts: list[list[str]] = [[]]
    for line in (line.strip(" │") for line in box.splitlines()):
        if line and set(line) <= set("─-"):
            parts.append([])
        elif line and line[0] not in "╭╰" and not line.startswith("For full helptext"):
            parts[-1].append(line)
    if "╭" not in box:  # the frame for terminals without such characters has the title inside
        parts = parts[1:]
    text = [" ".join(parts[0])]
    for part in parts[1:]:
        if part and part[0].startswith("Perhaps"):
            meant = dict.fromkeys(m[0] for line in part[1:] if (m := re.match(r"--\S+", line)))
            text.append(f"perhaps you meant {' or '.join(meant)}")
        elif part and part[0].startswith("Available"):
            text.append(" ".join(part))
    return "; ".join(text)
