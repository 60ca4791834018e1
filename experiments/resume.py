"""Kills and storage faults: a run broken anywhere ends in the same bits, and a bad checkpoint is
never taken for a good one.

A small GPT trains on packed documents of two texts, mixed 3 to 1, with token dropout, in two
micro-batches, with a moving average; a checkpoint every third step, asynchronous. Kills: a process
of this run gets SIGKILL at a random time, again and again, and the run goes on from what it left.
Faults: of copies of its checkpoints files are cut off, have bytes flipped, or vanish, or the disk
is full while it saves (a limit on the size of files: the kernel refuses the write as it does on a
full disk). Restarts: one more such run is killed five times and keeps its ledger, whose categories
are added up and held against a clock outside of its processes.

Command:  python experiments/resume.py [--quick] [--seed N] --json -
Cost:     about 20 minutes on two cores; --quick (10 kills, 40 faults) about 3.
Goals:    after 100 kills the parameters, the optimiser's state and the average have the same
          SHA-256 as those of the unbroken run; of 300 storage faults no corrupt restore and no lost
          last good step; the ledger's categories sum to the wall clock within 0.5 % over five
          restarts.
Measured: all goals met: 100 kills, the same SHA-256 (and of 8 runs that ended between two kills);
          300 faults, 0 corrupt restores, 0 lost good steps; the ledger 0.13 % off over five
          restarts, 81.0 of 81.1 s. On a busy machine.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from jaxmodel import checkpoint, data, distributed, losses, ops, report, train
from jaxmodel.data import augment
from jaxmodel.distributed import ledger
from jaxmodel.models import gpt2
from jaxmodel.progress import bar, progress

STEPS = 60
SAVE_EVERY = 3
RESTARTS = 5
MODEL = gpt2.Config(vocab=256, width=64, depth=2, heads=4, context=64)
LOG = Path(tempfile.gettempdir(), f"resume-{os.getpid()}.log")  # of the process that runs now
FAULTS = ("torn file", "flipped byte", "missing file", "missing marker", "full disk")


def stream(seed: int) -> data.Mixture:
    """Documents of two texts, as bytes, packed and mixed."""
    parts = []
    for name, weight in (("english_train", 3), ("english", 1)):
        documents = [
            list(text.encode()[:400])
            for text in data.split_documents(data.load_text(name).text)[:400]
        ]
        parts.append((data.Stream(data.pack(documents, MODEL.context + 1), 8, seed), weight))
    return data.Mixture(parts, batch_size=8)


def run(folder: Path, seed: int, steps: int = STEPS, book: Path | None = None) -> Any:
    """Train from what is in the folder to the end; the last state."""
    config = train.TrainConfig(
        steps=steps,
        gradient_accumulation_steps=2,
        ema_decay=0.99,
        save_every=SAVE_EVERY,
        log_every=10,
        seed=seed,
    )
    batches = stream(seed)
    keep = checkpoint.RetentionPolicy(last=3)
    with checkpoint.Checkpoints(
        folder, identity={"seed": seed}, data=batches.fingerprint, keep=keep
    ) as checkpoints:
        drops = augment.parse("token_dropout(0, rate=0.1)")
        supervisor = distributed.RunMonitor(
            distributed.GoodputRecorder(book, began=distributed.process_began())
        )
        state, _ = train.fit(
            model(), batches, config, augment=drops, checkpoints=checkpoints, supervisor=supervisor
        )
    supervisor.close()
    return state


def model() -> Any:
    """The model of the run."""
    return gpt2.model(MODEL, ops.Policy())


def like(seed: int) -> train.TrainState:
    """The shapes of a state of the run."""
    config = train.TrainConfig(steps=STEPS, ema_decay=0.99, seed=seed)
    return train.Program(model(), config, loss=losses.next_token).shapes()


def child(action: Any) -> int:
    """Run something in a process of its own, made by fork before JAX starts its devices; returns
    its id.
    """
    if process := os.fork():
        return process
    code = 1
    try:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def unbroken(folder: Path, seed: int) -> tuple[str, float]:
    """The digest of the run without a stop, and the seconds of a second one, whose programs are
    compiled.
    """
    for name in ("first", "whole"):
        began = time.perf_counter()
        note = folder / f"{name}.txt"
        if wait(
            child(
                lambda name=name, note=note: note.write_text(
                    checkpoint.fingerprint(run(folder / name, seed))
                )
            )
        ):
            raise SystemExit(f"the run without a stop failed:\n{LOG.read_text()[-2000:]}")
    return (folder / "whole.txt").read_text(), time.perf_counter() - began


def killed(
    folder: Path, seed: int, kills: int, seconds: float, chance: random.Random
) -> tuple[str, int, int]:
    """The digest after so many kills, how many processes saw one, and how many runs were finished
    and begun anew on the way.
    """
    done = restarts = 0
    place = folder / "killed"
    note = folder / "killed.txt"
    digest = ""
    with bar(kills, "kills") as shown:
        while done < kills or not digest:
            process = child(lambda: note.write_text(checkpoint.fingerprint(run(place, seed))))
            limit = time.monotonic() + (chance.uniform(0.0, seconds) if done < kills else 3600.0)
            while (
                time.monotonic() < limit
                and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.002)
            if time.monotonic() >= limit:
                os.kill(process, signal.SIGKILL)
            code = wait(process)
            if code == -signal.SIGKILL:
                done += 1
                shown.advance(1)
            elif code == 0:
                digest = note.read_text()
                if done < kills:  # it came to its end between two kills: from the beginning
                    restarts += 1
                    shutil.rmtree(place)
                    if digest != (folder / "whole.txt").read_text():
                        return digest, done, restarts
                    digest = ""
            else:
                raise SystemExit(
                    f"a run failed by itself with code {code}:\n{LOG.read_text()[-2000:]}"
                )
    return digest, done, restarts


def restarted(
    folder: Path, seed: int, kills: int, seconds: float, chance: random.Random
) -> tuple[float, dict[str, float]]:
    """The seconds that a run took from outside, with so many kills on the way, and what its ledger
    says of them.
    """
    place = folder / "restarted"
    file = folder / "ledger.jsonl"
    began = time.time()
    done = 0
    code = None
    while code != 0:
        process = child(lambda: run(place, seed, steps=6 * STEPS, book=file))
        limit = time.monotonic() + (chance.uniform(0.6, 0.9) * seconds if done < kills else 3600.0)
        while (
            time.monotonic() < limit
            and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        if time.monotonic() >= limit:
            os.kill(process, signal.SIGKILL)
            done += 1
        code = wait(process)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run failed by itself with code {code}:\n{LOG.read_text()[-2000:]}")
    assert done == kills, f"the run ended after {done} kills"
    outside = time.time() - began
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return outside, ledger.summary(lines)


def fault(kind: str, place: Path, seed: int, chance: random.Random) -> None:
    """Do something bad to the newest checkpoint of a folder, or to a save."""
    newest = max(path for path in place.iterdir() if path.name.startswith("step-"))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    if kind == "full disk":
        limit = chance.randrange(1, 400_000)

        def save() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run(place, seed, steps=int(newest.name[5:]) + SAVE_EVERY)

        wait(child(save))
        return
    victim = newest / "manifest.json" if kind == "missing marker" else chance.choice(files)
    content = victim.read_bytes()
    if kind.startswith("missing"):
        victim.unlink()
    elif kind == "torn file":
        victim.write_bytes(content[: chance.randrange(len(content))] if content else b"x")
    else:
        at = chance.randrange(max(len(content), 1))
        flipped = bytes([content[at] ^ (1 << chance.randrange(8))]) if content else b"x"
        victim.write_bytes(content[:at] + flipped + content[at + 1 :])


def faulty(folder: Path, seed: int, count: int, chance: random.Random) -> dict[str, list[int]]:
    """Of each kind of fault: how many there were, corrupt restores, lost good steps."""
    wanted = like(seed)
    template = folder / "template"
    known: dict[int, str] = {}
    with checkpoint.Checkpoints(
        template, identity={"seed": seed}, data=stream(seed).fingerprint, read_only=True
    ) as checkpoints:
        steps = checkpoints.steps()
        for step in steps:
            state = checkpoints.restore(wanted, at_most=step)
            assert state is not None and int(state.step) == step
            known[step] = checkpoint.fingerprint(state)
    found = {kind: [0, 0, 0] for kind in FAULTS}
    digest = stream(seed).fingerprint
    kinds = [kind for kind in FAULTS if kind != "full disk"]
    with bar(count, "faults") as shown:
        for i in range(count):
            # of a full disk fewer, since each needs a process that trains
            kind = "full disk" if (folder / "full" / str(i)).exists() else kinds[i % len(kinds)]
            place = folder / "full" / str(i) if kind == "full disk" else folder / "fault"
            if kind != "full disk":
                shutil.copytree(template, place)
                fault(kind, place, seed, chance)
            with checkpoint.Checkpoints(place, identity={"seed": seed}, data=digest) as checkpoints:
                state = checkpoints.restore(wanted)
            counts = found[kind]
            counts[0] += 1
            if state is None:
                counts[2] += 1
            else:
                step = int(state.step)
                good = step if kind == "full disk" and step not in known else None
                counts[1] += good is None and checkpoint.fingerprint(state) != known.get(step)
                counts[2] += step < (steps[-1] if kind == "full disk" else steps[-2])
            shutil.rmtree(place)
            shown.advance(1)
    return found


def full_disks(folder: Path, seed: int, places: list[int], chance: random.Random) -> None:
    """Copies of the checkpoints in which a save met a full disk: made before this process starts
    JAX, since they fork.
    """
    (folder / "full").mkdir()
    for i in progress(places, "full disks"):
        shutil.copytree(folder / "template", folder / "full" / str(i))
        fault("full disk", folder / "full" / str(i), seed, chance)


def numbers(kills: int, faults: int, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Kills, then faults."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        want, seconds = unbroken(folder, seed)
        got, done, ended = killed(folder, seed, kills, seconds, chance)
        outside, spent = restarted(folder, seed, RESTARTS, seconds, chance)
        wait(child(lambda: run(folder / "template", seed, steps=STEPS // 2)))
        full_disks(folder, seed, list(range(4, faults, 5)), chance)
        found = faulty(folder, seed, faults, chance)
    seconds_of = {category: spent[category] for category in ledger.CATEGORIES if category in spent}
    entries: list[tuple] = [
        ("kills", done, "", f">= {kills}"),
        ("same SHA-256 as the unbroken run", float(got == want), "", ">= 1"),
        ("runs that ended between two kills, with the same SHA-256", ended, ""),
        ("storage faults", sum(n for n, _, _ in found.values()), "", f">= {faults}"),
        ("corrupt restores", sum(n for _, n, _ in found.values()), "", "<= 0"),
        ("lost good steps", sum(n for _, _, n in found.values()), "", "<= 0"),
        *((f"faults: {kind}", n, "") for kind, (n, _, _) in found.items()),
        ("seconds of an unbroken run", seconds, "s"),
        ("restarts with a ledger", RESTARTS, ""),
        ("ledger: wall clock from outside", outside, "s"),
        (
            "ledger: sum of the categories off the wall clock",
            100 * abs(sum(seconds_of.values()) / outside - 1),
            "%",
            "<= 0.5",
        ),
        *((f"ledger: {category}", share, "s") for category, share in seconds_of.items()),
    ]
    return entries, {"steps": STEPS, "save_every": SAVE_EVERY, "sha256": want}


def experiment(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """In full or in its quick form."""
    return numbers(10, 40, seed) if quick else numbers(100, 300, seed)


if __name__ == "__main__":
    report.experiment(__doc__, "10 kills and 40 faults", experiment)
