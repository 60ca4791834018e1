"""What holds in every test: one CPU device, strict numerics, shapes checked, compiled programs kept
between runs.

`make test` runs two processes of tests side by side; with `-p no:xdist`, or `-n 0`, there is one,
for a debugger.

How to write an annotation so that the check works: `from __future__ import annotations`,
`x: Float[Array, "B T D"]`, and every name in it imported at run time, not under TYPE_CHECKING
(beartype evaluates the strings at the first call). A letter means one size over all arguments and
the result of a call; `...` any axes, `""` none. Under jit the check runs while tracing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent

# In the environment, so that processes that tests start (command line, notebooks) have it too; read
# by `import jax`.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"
os.environ["JAXMODEL_CACHE"] = str(REPO / ".cache" / "jaxmodel")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax"))
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
    "false"  # else gcsfs asks Google's servers what kind of bucket it has
)
# Every program, however small: most are, and reading one takes a tenth of compiling it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import optax  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402
from hypothesis import settings  # noqa: E402

_jaxtyped = jaxtyping.jaxtyped


def _checked(*, typechecker: object) -> Callable[[Any], Any]:
    """What the import hook puts on every function and class: shapes are compared only where an
    annotation has some.

    Jaxtyping binds the arguments and checks them twice at every call, which is a third of the time
    of reading a config.
    """

    def decorate(fn: Any) -> Any:
        if any(base.__name__ == "Member" for base in getattr(fn, "__mro__", ())):
            return fn  # it checks its settings itself, and says what is allowed
        shaped = any(
            re.search("['\"]", str(annotation))
            for annotation in getattr(fn, "__annotations__", {}).values()
        )
        if (
            not isinstance(fn, types.FunctionType) or shaped or fn.__closure__
        ):  # of a closure beartype would keep all alive
            return _jaxtyped(fn, typechecker=typechecker)
        return beartype(conf=BeartypeConf(violation_type=TypeError))(fn)

    return decorate


jaxtyping.jaxtyped = _checked
jaxtyping.install_import_hook("jaxmodel", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Nearly all of the time is compilation of programs that run once. Not in the environment: the
# command line in processes of its own, the README and the first notebook are compiled as users have
# them; the other pages and notebooks ask for this too.
jax.config.update("jax_disable_most_optimizations", True)

# The same examples in every run; no deadline, since the first example of a shape compiles.
settings.register_profile("house", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("house")


def _standard[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """`fn` under JAX's own rules of promotion."""

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return fn(*args, **kwargs)

    return call


# Optax mixes float and integer scalars (Adam's `decay**count`, every schedule), which strict
# promotion does not allow. So what runs inside a gradient transformation is exempt; what computes
# gradients and applies updates is not.
_new = optax.GradientTransformation.__new__
optax.GradientTransformation.__new__ = lambda cls, init, update: _new(
    cls, _standard(init), _standard(update)
)


def pytest_collection_finish() -> None:
    """Leave what has been imported out of the garbage collector's rounds, of which there are many:
    each trace makes thousands of objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


_number = itertools.count(1)


@pytest.fixture(autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Forget compiled programs before the process has as many memory maps as Linux allows (65,530).

    Each program that XLA compiles for a CPU keeps some; at the limit the next compilation ends in a
    segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(_number) % 64 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


class Eight:
    """A process with eight simulated CPU devices that answers requests, see `run_checks.py`.

    It is started with the first of them, and anew after it died.
    """

    def __init__(self, log: Path):
        self.log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer; in `error` how the request failed, if it did."""
        if self._process is None:
            self._process = self._started()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(timeout, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if line:
            return json.loads(line)
        self.end()
        end = self.log.read_text(errors="replace")[-4000:]
        return {"out": "", "error": f"the process died, or took more than {timeout} s\n{end}"}

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, str(REPO / "tests" / "run_checks.py")],
                env=environment8(),
                cwd=REPO,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )


def environment8() -> dict[str, str]:
    """Of a process with eight devices: rank promotion raises; dtypes and shapes are not checked."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    env["XLA_FLAGS"] = (
        # see sharding.simulate_devices
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    return env


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Eight]:
    """The process with eight devices that all tests of this one share."""
    process = Eight(tmp_path_factory.mktemp("eight") / "log")
    yield process
    process.end()


@pytest.fixture(scope="session")
def devices8(eight: Eight) -> Callable[..., str]:
    """A function that runs Python in a process with eight simulated CPU devices and returns its
    stdout.

    `devices8("import jax; print(jax.device_count())")` runs a snippet, `devices8(path, "arg")` a
    file. If it fails, so does the test, with the traceback. The process is one that other tests
    have run in, or with `fresh=True`, which costs seconds, one of its own.
    """

    def run(program: str | Path, *args: object, fresh: bool = False, timeout: float = 1200) -> str:
        source = str(program) if isinstance(program, Path) else textwrap.dedent(program)
        words = list(map(str, args))
        if not fresh:
            got = eight.ask({"source": source, "arguments": words}, timeout)
            if got["error"]:
                pytest.fail(f"on eight devices\n{got['out']}{got['error']}", pytrace=False)
            return got["out"]
        command = [sys.executable, *([source] if isinstance(program, Path) else ["-c", source])]
        done = subprocess.run(
            [*command, *words],
            env=environment8(),
            cwd=REPO,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.fail(
                f"exit code {done.returncode} on eight devices\n{done.stdout}{done.stderr}",
                pytrace=False,
            )
        return done.stdout

    return run


@pytest.fixture(scope="session")
def outcomes8(eight: Eight) -> Callable[[str, Sequence[str]], dict[str, str]]:
    """`outcomes8(__file__, names)` runs checks of a test file on eight devices: how each failed, ""
    if not.

    See `run_checks.py`.
    """

    def run(file: str, names: Sequence[str]) -> dict[str, str]:
        got = eight.ask({"file": file, "names": list(names)}, 1200)
        if got["error"]:
            pytest.fail(f"on eight devices\n{got['out']}{got['error']}", pytrace=False)
        return json.loads(got["out"].splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def sound_page():
    """A function that reads a report's page and checks what every page must be."""

    def read(place):
        page = place.read_text(encoding="utf-8")
        assert "`" not in page and not re.search(
            r"https?://(?!www\.w3\.org)|<script|<link|<img", page
        )
        assert (
            page.count("<table>")
            == len(re.findall(r'<div class="wide(?: fold)?"><table>', page))
            > 0
        )
        seen = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
        assert "resolved" not in page and len(re.findall("<dt>", seen)) == 0, (
            "long lists are folded"
        )
        assert page.count("<details>") >= 3 and "<details open" not in page
        from jaxmodel.report import processor

        assert processor() in page, "beside its speeds"
        for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page):
            assert not re.fullmatch(r"-?\d+\.\d{7,}", cell), "no raw number"
        return page

    return read
