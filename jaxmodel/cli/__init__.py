"""`jaxmodel VERB`: options, errors as one line, run folders."""

import signal
import threading

_quiet = threading.current_thread() is threading.main_thread()
_before = signal.getsignal(signal.SIGINT)
if _quiet:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C while modules are imported ends without a traceback

from jaxmodel.cli.main import main  # noqa: E402

if _quiet and _before is not None:
    signal.signal(signal.SIGINT, _before)

__all__ = ["main"]
