"""`jaxmodel train`, `resume` and `replay`.

A run is a pure function of its config, so a run folder is all that these need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxmodel.cli.options import Replay, Train, defaults
from jaxmodel.errors import InputError
from jaxmodel.progress import step
from jaxmodel.report.json_out import to_plain

CHECKPOINTS = "checkpoints"


def prepare(options: Train) -> None:
    """Refuse wrong options, simulate devices and meet the other processes, before JAX starts."""
    from jaxmodel import sharding
    from jaxmodel.cli import refusals
    from jaxmodel.distributed import startup

    refusals.check(options)
    if options.devices != 1:
        sharding.simulate_devices(options.devices)
    startup.initialize()


def prepare_replay(options: Replay) -> None:
    """Simulate as many devices in this process as the run had in all, before JAX starts."""
    from jaxmodel import sharding
    from jaxmodel.cli import rerun

    devices = rerun.trained_by(options.folder).devices
    how = rerun.launched(options.folder)
    if how is not None and devices == 1:
        devices = how.processes * how.devices_per_process
    if devices > 1:
        sharding.simulate_devices(devices)


def run(options: Train, folder: Any) -> dict[str, Any]:
    """Train in a run folder, from its last checkpoint on if there is one."""
    import jax

    from jaxmodel import checkpoint, distributed, hub, report, train
    from jaxmodel.distributed import faults
    from jaxmodel.generation import generate
    from jaxmodel.report import training as page

    began = time.perf_counter()
    job = _Job(options, folder)
    first = jax.process_index() == 0
    with (
        contextlib.ExitStack() as stack,
        job.checkpoints() as checkpoints,
        faults.stop_signals(options.notices) as stop,
        faults.Watchdog(options.watchdog) as watchdog,
    ):
        trackers = page.trackers(stack, folder, options.tensorboard) if first else []
        writer = page.Writer(folder, options.steps, trackers, defaults(options)) if first else None
        start = checkpoints.latest() or 0  # asked by all processes, answered by the first
        if writer is not None:
            writer.rewind(start)
        ledger = distributed.GoodputRecorder(
            folder.path("ledger.jsonl"), began=distributed.process_began()
        )
        supervisor = distributed.RunMonitor(
            ledger, watchdog, stop, folder.path("profile") if options.profile else None
        )
        state, history = job.fit([writer] if writer is not None else [], checkpoints, supervisor)
        supervisor.close()
        problem = _unsaved(checkpoints)
    done = int(state.step)
    early = options.patience > 0 and done < options.steps and not stop(done)
    result: dict[str, Any] = {
        "out": None,
        "parameters": sum(a.size for a in jax.tree.leaves(state.params)),
        "mesh": dict(job.mesh.shape) if job.mesh is not None else {},
        "devices": job.mesh.size if job.mesh is not None else 1,
        "processes": jax.process_count(),
        "processor": report.processor(folder.versions),
        "data": job.corpus.described,
        "steps": done,
        "stopped": done < options.steps and not early,
        "fingerprint": checkpoint.fingerprint(state) if jax.process_count() == 1 else None,
        "ledger": ledger.summary(),
        "problem": problem,
    }
    rows = writer.rows() if writer is not None else history
    unit = "tokens" if any("tokens_per_second" in row for row in rows) else "rows"
    speeds = [row[f"{unit}_per_second"] for row in rows if f"{unit}_per_second" in row]
    steady = speeds[1:] or speeds  # the first row holds the compilation
    judged = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    result |= {
        "loss": rows[-1]["loss"] if rows else None,
        "heldout_loss": judged[-1] if judged else None,
        f"{unit}_per_second": sum(steady) / len(steady) if steady else None,
        "history": rows,
    }
    params = train.gather(train.averaged(state))
    if first and not result["stopped"]:
        out = options.out or str(folder.path("bundle"))
        texts = ", ".join(
            os.path.basename(text) if os.path.isabs(text) else text for text in options.data
        )
        card = {**job.card, "trained_on": texts, "steps": done, "seed": options.seed}
        bundle = hub.Bundle(job.single, params, job.corpus.tokenizer, card)
        with step("save"):
            if job.lora is None:
                bundle.save_pretrained(out)
            else:
                hub.save_adapters(bundle, out, base=options.init, also=job.head)
        if jax.process_count() == 1 and job.writes:
            room = options.context - len(job.corpus.tokenizer.encode(job.prompt))
            result["sample"] = job.prompt + generate(
                bundle, job.prompt, max_new_tokens=min(64, room), temperature=0.8, seed=options.seed
            )
        result["out"] = out
    result["seconds"] = time.perf_counter() - began
    if writer is not None:
        writer.page(result)
    return result


def show(result: dict[str, Any], console: Any) -> None:
    """Print the result in two lines."""
    if result["stopped"]:
        how, there = (
            ("stopped", "the last good checkpoint")
            if result["problem"]
            else ("stopped and saved", "there")
        )
        console.print(f"{how} at step {result['steps']}; jaxmodel resume goes on from {there}")
        return
    if result["out"] is None:
        return  # of several processes the first shows what came out
    done = f"its checkpoint of step {result['steps']} was the last: nothing was left to train"
    if result["history"]:
        judged = any("heldout_loss" in row for row in result["history"])
        heldout = f", held-out {_shown(result['heldout_loss'])}" if judged else ""
        goodput = f"goodput {100 * result['ledger']['goodput']:.0f} %"
        unit = "tokens" if result.get("tokens_per_second") is not None else "rows"
        speed = f"{result[f'{unit}_per_second'] or 0:.0f} {unit}/s on {result['processor']}"
        done = f"loss {_shown(result['loss'])}{heldout}, {speed}, {goodput}"
    mesh = "".join(f", {axis}={length}" for axis, length in result["mesh"].items())
    console.print(
        f"{result['parameters']:,} parameters on {result['devices']} "
        f"device{'s' * (result['devices'] > 1)}{mesh}: {done}, "
        f"saved in {result['out']}",
        markup=False,
    )
    if "sample" in result:
        console.print(result["sample"], markup=False)


def code(result: dict[str, Any]) -> int:
    """Return 0; raise what was wrong with the last checkpoint, now that all else is kept."""
    if result["problem"]:
        raise InputError(result["problem"])
    return 0


def replay(options: Replay, folder: Any) -> dict[str, Any]:
    """Compute one step of a run again and compare it with what the run recorded."""
    from jaxmodel import checkpoint, distributed, report
    from jaxmodel.cli import rerun

    again = rerun.trained_by(options.folder)
    if options.step > again.steps:
        raise InputError(f"--step: {options.step} given; allowed: 1 to {again.steps}")
    before = report.read_run(options.folder)
    again = dataclasses.replace(
        again, log_every=1, eval_every=again.eval_every or max(1, again.steps // 4)
    )
    job = _Job(again, folder)
    supervisor = distributed.RunMonitor(stop=lambda step: step >= options.step)
    with job.checkpoints(before.folder, read_only=True, at_most=options.step - 1) as checkpoints:
        start = checkpoints.latest() or 0
        state, history = job.fit([lambda row: folder.log(**row)], checkpoints, supervisor)
        if (end := int(state.step)) < options.step:
            raise InputError(f"--step: {options.step} given; the run stopped early at step {end}")
        row = to_plain(history[-1])
        written = {r["step"]: r for r in _rows(before.folder)}.get(options.step)
        _same_batch(
            row, written or {}, [n for n in checkpoints.steps() if options.step <= n < again.steps]
        )
    same = (
        None
        if written is None
        else all(written.get(name) == row[name] for name in ("loss", "grad_norm"))
    )
    return {
        "folder": options.folder,
        "step": options.step,
        "from": start,
        "data_step": int(state.data_step) - 1,
        "loss": row["loss"],
        "grad_norm": row["grad_norm"],
        "written": None
        if written is None
        else {name: written.get(name) for name in ("loss", "grad_norm")},
        "same": same,
        "fingerprint": checkpoint.fingerprint(state),
    }


def show_replay(result: dict[str, Any], console: Any) -> None:
    """Print the step beside what was recorded."""
    console.print(
        f"step {result['step']} (batch {result['data_step']}), computed again from step "
        f"{result['from']}: "
        f"loss {result['loss']!r}, gradient norm {result['grad_norm']!r}"
    )
    if result["written"] is None:
        console.print("the run wrote no row for this step")
    else:
        console.print(
            "the same bits as the run wrote"
            if result["same"]
            else f"the run wrote {result['written']}"
        )


def _same_batch(row: dict[str, Any], written: dict[str, Any], later: list[int]) -> None:
    """Refuse a step that the run made of another batch, because it went back to before it.

    Args:
      row: the step as it is computed now.
      written: the row that the run recorded.
      later: the steps of later checkpoints.
    """
    step = row["step"]
    batch = row["data_step"]
    if (then := written.get("data_step", batch)) != batch:
        allowed = (
            f"steps behind the checkpoint of step {later[0]}"
            if later
            else "none, as no later checkpoint was kept"
        )
        raise InputError(
            f"--step: {step} given; the run went back there and made it of batch {then}, but a "
            f"replay from the checkpoint before "
            f"comes to batch {batch}; allowed: {allowed}"
        )


class _Job:
    """What the options of a run resolve to."""

    def __init__(self, options: Train, folder: Any):
        import jax

        from jaxmodel import adapt, axes, tree
        from jaxmodel.cli import corpus, refusals, resolved, tasks
        from jaxmodel.hub.bundle import check_target
        from jaxmodel.ops import MESH_AXES
        from jaxmodel.train.placing import check_rows

        self.lora = refusals.lora(options)
        self.head: str | None = None  # leaves of a head that trains beside adapters
        if jax.process_index() == 0:
            kept = "config.json" if self.lora is None else "adapter_config.json"
            check_target(options.out or folder.path("bundle"), kept)
        self.folder = folder
        self.place = options.checkpoints
        self.mesh = _mesh(options)
        self.augment = _augment(options)
        self.settings = refusals.config(options)
        begun = None
        self.params = None
        kind = corpus.kind(options)
        key = jax.random.key(options.seed)
        if options.init is None:
            model = _new(options)
            task = tasks.chosen(options, model, kind)
            model = _new(options, task)
            if kind == "answers" and task == "language":
                raise InputError(
                    "--data: chats, or prompts with completions, given for a new model; allowed: "
                    "with --init"
                )
        else:
            check_rows(options.batch, self.mesh)
            begun, task = _begun(options, kind)
            model = begun.model.with_policy(_policy(options))
            self.params = begun.params
            self.card = {**begun.card}
            self.base = {"model": options.init, "weights": tree.fingerprint(begun.params)}
            if task != "classify":
                model, self.params = tasks.with_head(model, self.params, task, key)
                if self.lora is not None:
                    tasks.check_known(self.params, begun.params, task)
                    model = self._with_adapters(options, model, ())
        self.task = task
        if task == "language":
            _rehearse(options, model, self.params, self.settings.trainable)
        self.corpus = corpus.read(options, task, kind, model, begun)
        processor = self.corpus.tokenizer
        self.labels = self.corpus.labels
        if begun is None:
            made: dict[str, Any] = {}
            if task != "classify" or kind != "images":
                made["vocab"] = processor.vocab_size
            if task == "seq2seq":
                made["start"] = next(iter(processor.eos_ids), 0)
            if self.labels is not None:
                made |= {"labels": self.labels, "classes": len(self.labels)}
            model = _new(options, task, **made)
            self.card = {"name": options.model or "gpt2-small-from-scratch"}
            self.base = None
        elif self.labels is not None and self.labels != tuple(_classes(begun)):
            model, self.params = adapt.replace_head(begun.model, begun.params, self.labels, key)
            model = model.with_policy(_policy(options))
        if begun is not None and task == "classify" and self.lora is not None:
            assert self.params is not None
            model = self._with_adapters(options, model, axes.heads(model.axes, self.params))
        if self.labels is not None and not hasattr(model.config, "labels"):
            self.card = {**self.card, "labels": list(self.labels)}
        if options.trainable:
            shapes = jax.eval_shape(model.init, key) if self.params is None else self.params
            rules = tasks.trainable(options.trainable, shapes)
            self.settings = dataclasses.replace(self.settings, trainable=rules)
        self.loss = tasks.loss_of(task, model, processor)
        self.prompt = self.corpus.prompt if options.sample is None else options.sample
        self.writes = task == "language"
        if self.writes and not 1 <= len(processor.encode(self.prompt)) < options.context:
            raise InputError(
                f"--sample: {self.prompt!r} given; allowed: at least one token and fewer than the "
                f"context of {options.context}"
            )
        self.single = model
        self.model = model.with_policy(dataclasses.replace(_policy(options), axes=MESH_AXES))
        folder.resolve(
            train=self.settings,
            model=resolved.of_model(self.model),
            base=self.base,
            mesh=dict(self.mesh.shape) if self.mesh is not None else {},
            data=self.corpus.described,
            augment=str(self.augment) if self.augment else None,
        )

    def _with_adapters(self, options: Train, model: Any, head: Collection[str]) -> Any:
        """Return the model with adapters beside its weights, which train, and its head if any."""
        import jax

        from jaxmodel import adapt

        assert self.params is not None
        model, self.params = adapt.lora(model, self.params, self.lora, jax.random.key(options.seed))
        self.head = "|".join(map(re.escape, sorted(head))) or None
        rules = (*((path, True) for path in [self.head] if path), *adapt.ADAPTERS)
        self.settings = dataclasses.replace(self.settings, trainable=rules)
        if jax.process_index() == 0 and "targets" not in (options.lora or ""):
            _say_without(model, self.params)
        return model

    def checkpoints(self, run: Path | None = None, **options: Any) -> Any:
        """Return the checkpoints of this run, or of another one."""
        from jaxmodel import checkpoint, report

        place = self.place or (run or self.shared) / CHECKPOINTS
        changed = report.read_run(self.shared).config.get("changed", ())  # by `resume` with options
        keep = checkpoint.RetentionPolicy(last=3)
        return checkpoint.Checkpoints(place, keep=keep, allow_changes=changed, **options)

    @property
    def shared(self) -> Path:
        """Return the folder that all processes of the run share."""
        import jax

        place = Path(self.folder.folder)
        return place if jax.process_index() == 0 else place.parent

    def fit(
        self, callbacks: list[Any], checkpoints: Any, supervisor: Any
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Train."""
        from jaxmodel import train

        return train.fit(
            self.model,
            self.corpus.stream,
            self.settings,
            callbacks,
            params=self.params,
            heldout=self.corpus.heldout,
            loss=self.loss,
            mesh=self.mesh,
            augment=self.augment,
            checkpoints=checkpoints,
            supervisor=supervisor,
        )


def _mesh(options: Train) -> Any:
    import jax

    from jaxmodel import sharding

    text = options.mesh or ("data=*" if jax.process_count() > 1 else None)
    return None if text is None else sharding.make_mesh(text)


def _augment(options: Train) -> Any:
    from jaxmodel.data import augment

    return augment.parse(options.augment) if options.augment else None


def _policy(options: Train) -> Any:
    from jaxmodel.ops import Policy

    more: dict[str, Any] = {
        name: getattr(options, name) for name in ("remat", "microbatches", "unroll")
    }
    return Policy(options.dtype, options.activation_dtype, **more)


def _new(options: Train, task: str | None = None, **more: Any) -> Any:
    """Return the model that is made new, with the vocabulary and the classes of its data."""
    from jaxmodel.cli import tasks
    from jaxmodel.models import gpt2

    make = gpt2.model if options.model is None else tasks.size(options)[0].model
    return make(tasks.new_config(options, task, **more), _policy(options))


def rehearse(options: Train) -> None:
    """Trace the first step of a new GPT on shapes, which needs no text."""
    _rehearse(options, _new(options), None)


def _rehearse(options: Train, model: Any, params: Any, trainable: Any = None) -> None:
    """Trace the first step on shapes, before texts are tokenised."""
    import jax
    import numpy as np

    from jaxmodel import data, losses, train
    from jaxmodel.cli import refusals
    from jaxmodel.ops import MESH_AXES

    few = np.zeros(8, np.int32)
    one = data.Stream(data.pack([few], 8) if options.pack else few[None], 1).batch(0)
    shape = (options.batch, options.context)
    batch = {name: jax.ShapeDtypeStruct(shape, np.asarray(a).dtype) for name, a in one.items()}
    model = model.with_policy(dataclasses.replace(model.policy, axes=MESH_AXES))
    config = dataclasses.replace(refusals.config(options), trainable=trainable)
    augment = _augment(options)
    vocab = model.config.vocab
    if odd := [
        link for link in getattr(augment, "links", ()) if getattr(link, "token", 0) >= vocab
    ]:
        raise InputError(
            f"--augment: {odd[0]} given; allowed: tokens of the vocabulary, 0 to {vocab - 1}"
        )
    train.Program(
        model, config, loss=losses.next_token, mesh=_mesh(options), augment=augment
    ).rehearse(batch, params)


def _classes(bundle: Any) -> tuple[str, ...]:
    """Return the names of the classes that a bundle knows."""
    config = bundle.model.config
    return tuple(map(str, bundle.card.get("labels", ()) or getattr(config, "labels", ())))


def _begun(options: Train, kind: str | None) -> tuple[Any, str]:
    """Return the bundle whose weights the training begins with, and what is learnt.

    Raises:
      InputError: a model that does not fit the data or the task, or whose context is shorter than
        the rows.
    """
    from jaxmodel import hub, ops, schema
    from jaxmodel.hub import foreign
    from jaxmodel.hub.bundle import read_config

    assert options.init is not None
    told = Path(options.init, "config.json")
    if (
        told.is_file() and schema.read(told).get("model_type") != foreign.KIND
    ):  # before the weights are read
        family, config, _ = read_config(told.parent)
        _check_begun(options, kind, family.model(config, ops.Policy()))
    bundle = hub.from_pretrained(options.init)
    return bundle, _check_begun(options, kind, bundle.model)


def _check_begun(options: Train, kind: str | None, model: Any) -> str:
    from jaxmodel.cli import refusals, tasks

    task = tasks.chosen(options, model, kind)
    most = getattr(model.config, "context", options.context)
    if options.context > most and kind != "images":
        raise InputError(
            f"--context: {options.context} given; allowed: at most the {most} of {options.init!r}"
        )
    if options.lora is not None:
        refusals.targets(options, model)
    return task


MATRICES = ("matrix", "experts", "router")


def _say_without(model: Any, params: Any) -> None:
    """Print the matrices of the layers that got no adapter, such as those of experts."""
    from jaxmodel import axes, tree
    from jaxmodel.adapt.adapters import is_adapter

    leaves = tree.flatten(params)
    role = axes.role_of(model.axes)
    without = {
        re.sub(r".*blocks/[^/]*/", "", path)
        for path, leaf in leaves.items()
        if "blocks/" in path and not is_adapter(path) and f"{path}_lora/down" not in leaves
        if role(tree.layer_paths(path)[0], tree.layer_shape(path, leaf)) in MATRICES
    }
    if without:
        names = ", ".join(sorted(without))
        print(
            f"jaxmodel: --lora: {names} have no adapters and stay as they are",
            file=sys.stderr,
            flush=True,
        )


def _unsaved(checkpoints: Any) -> str | None:
    """Wait for the last checkpoint and return what is wrong with it.

    Of several processes the first gets to know it.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    problem = None
    try:
        checkpoints.wait()
    except InputError as error:
        problem = str(error)
    if jax.process_count() == 1:
        return problem
    bad = np.flatnonzero(multihost_utils.process_allgather(np.bool_(problem is not None)))
    if jax.process_index() or not len(
        bad
    ):  # the others must not end with an error while the first keeps what was trained
        return None
    return problem or f"checkpoints: rank {bad[0]} could not save its part of the last state"


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    from jaxmodel.report import training as page

    return page.read_rows(folder / "metrics.jsonl")
