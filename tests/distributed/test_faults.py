"""What comes from outside: signals and notices of maintenance save and stop; a watchdog names what
hangs.
"""

from __future__ import annotations

import http.server
import os
import signal
import threading
import time

import pytest

from jaxmodel.distributed import faults


def until(condition, seconds=20.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_and_the_handler_goes_away(number, capsys):
    before = signal.getsignal(number)
    with faults.stop_signals() as stop:
        assert not stop(1)
        os.kill(os.getpid(), number)
        assert until(lambda: stop(2))
    assert signal.getsignal(number) == before
    assert f"{signal.Signals(number).name}: saving and stopping" in capsys.readouterr().err


@pytest.fixture
def metadata():
    """A metadata server on loopback; what it says is in `said`."""
    said = ["NONE"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said[0].encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", said
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_notice_of_maintenance_stops_the_run(metadata, monkeypatch, capsys):
    host, said = metadata
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    monkeypatch.setattr(faults, "NOTICE_EVERY", 0.02)
    with faults.stop_signals() as stop:
        time.sleep(0.2)
        assert not stop(1)
        said[0] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert until(lambda: stop(2))
    assert "maintenance notice (TERMINATE_ON_HOST_MAINTENANCE)" in capsys.readouterr().err


def test_without_a_server_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    with faults.stop_signals() as stop:
        assert not stop(1)
        assert not any(
            thread.name == "notices" and thread.is_alive() for thread in threading.enumerate()
        )


def test_the_watchdog_says_where_a_run_hangs(capfd):
    codes = []
    with faults.Watchdog(0.3, codes.append) as watchdog:
        watchdog.at("step 7: compute")
        assert until(lambda: bool(codes))
    said = capfd.readouterr().err
    assert codes == [faults.STUCK]
    assert "no step for 0 s: this process is at step 7: compute" in said and "Thread" in said


@pytest.mark.parametrize("place", ["compile", "evaluate", "checkpoint"])
def test_the_watchdog_waits_longer_for_what_is_no_step(place):
    codes = []
    with faults.Watchdog(0.1, codes.append) as watchdog:
        watchdog.at(f"step 3: {place}")
        time.sleep(0.5)
    assert not codes


def test_a_process_whose_launcher_is_gone_stops(monkeypatch, capsys):
    monkeypatch.setenv(faults.LAUNCHER, str(os.getppid()))
    monkeypatch.setattr(faults, "NOTICE_EVERY", 0.02)
    with faults.stop_signals() as stop:
        time.sleep(0.2)
        assert not stop(1)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert until(lambda: stop(2))
    assert "which started this one, is gone: saving and stopping" in capsys.readouterr().err


def test_the_watchdog_leaves_a_run_that_moves_alone():
    codes = []
    with faults.Watchdog(1.0, codes.append) as watchdog:
        for i in range(30):
            watchdog.at(f"step {i}: data")
            time.sleep(0.05)
    assert not codes
