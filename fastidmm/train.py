"""The loop: batch, step, record; from step 0 or from a checkpoint to the same bits."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastidmm import checkpoint
from fastidmm.assemble import Cadence, Parts, State, assemble
from fastidmm.capture import left_uncaptured, stepped
from fastidmm.errors import Gone, Interrupted, NumericalError, OutOfMemoryError
from fastidmm.evaluate import Score, knn, outputs, score
from fastidmm.forecast import Course, Outlook, keep
from fastidmm.interrupt import Left, Stop, stoppable
from fastidmm.logs import told
from fastidmm.progress import Clock, Progress, say
from fastidmm.quality import alignment, rankme, retrieval, spread, two_crops, uniformity
from fastidmm.ranks import world
from fastidmm.record import Record, environment, plain
from fastidmm.step import Stepped
from fastidmm.store import Store
from fastidmm.watch import Watch

SURROUNDINGS = ("fastidmm", "torch", "python", "machine", "device", "threads")
MEMORY_OF_STRIKES = 100  # steps
# Three lines down, since the next rows are drawn over as many as the last: over empty ones.
HEARD = b" stopping once this step is made and kept; asked again, at once.\n\n\n"


def train(record: Record) -> dict[str, float]:
    """Train what the record's recipe says, from its newest checkpoint, to the end.

    What was forecast of its seconds, once it had begun, and what they came to.
    """
    record.check()
    if record.finished:
        say(f"{record.folder} is finished: {record.steps} steps of {record.total_steps}.")
        return {}
    parts: Parts | None = None
    try:
        with (
            record.locked(),
            told(record),
            stoppable(among_ranks=world().size > 1, heard=HEARD) as stop,
        ):
            parts = assemble(record)
            restore(parts)
            run, num = parts.recipe.run, len(parts.store)
            if run.num_images:
                say(f"training on {num} images, chosen by class and seed {run.seed}.")
            if num < run.batch_size:
                say(
                    f"the store has {num} images, fewer than a batch of "
                    f"{run.batch_size}: one step of all of them per epoch."
                )
            if why := left_uncaptured(parts):
                say(why)
            outlook = Outlook(course_of(parts), sum(g.count for g in parts.method.views))
            while not attempted(parts, stop, outlook):
                roll_back(parts)
            if parts.state.ended:
                best = parts.state.best_step // parts.loader.steps_per_epoch
                say(f"ended early: no better score on held-out images since epoch {best}.")
            # Also after the last step: what follows in the same command is not begun, nor before
            # the first rank has written what it reads.
            if world().any(stop.requested):
                at = f"stopped at step {parts.state.step}"
                raise Interrupted(f"{at}; `fastidmm resume {record.folder}` goes on.")
            if outlook.told:
                keep(record.folder, outlook.told)
            return outlook.told
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            "the GPU's memory cannot hold a step: lower --resolution or --batch-size"
            f"{smaller_parts(parts)}, or close what else runs there."
        ) from None
    except Gone as problem:
        at = f"at step {parts.state.step + 1}" if parts else "before the first step"
        raise Gone(
            f"{problem} {at}; `fastidmm resume {record.folder}` goes on from the last checkpoint."
        ) from None


def smaller_parts(parts: Parts | None) -> str:
    """What else to lower, where ranks could not cut a batch in the middle of a pass."""
    if parts is None or world().size == 1 or parts.method.rows_independent:
        return ""
    if not parts.method.can_be_cut():
        return ""
    return f", begin with --set run.micro_batches={2 * parts.state.micro_batches}"


def course_of(parts: Parts) -> Course:
    """How many steps, looks and checkpoints the recipe means."""
    run, every = parts.recipe.run, Cadence.of(parts)
    return Course(
        len(parts.store),
        run.batch_size,
        run.epochs,
        knn=every.knn,
        score=every.score if parts.judge is not None else 0,
        checkpoint=every.checkpoint,
    )


def attempted(parts: Parts, stop: Stop, outlook: Outlook) -> bool:
    """Whether the run was brought to its end or stopped; false: it must roll back."""
    clock = Clock()
    outlook.restart(parts.state.step)
    with closing(stepped(parts, clock)) as coming, progress_of(parts) as progress:
        return steps(parts, stop, coming, clock, outlook, progress)


def progress_of(parts: Parts) -> Progress:
    """What shows how far a run is, and warns where it learns nothing."""
    record, state, recipe = parts.record, parts.state, parts.recipe
    warmed_up = (recipe.optim.warmup_epochs or 0) * parts.loader.steps_per_epoch
    watch = Watch(parts.method.guessing(), warmed_up)
    name, epochs = record.folder.name, recipe.run.epochs
    return Progress(name, watch, epochs=epochs, steps=record.total_steps, done=state.step)


def steps(
    parts: Parts,
    stop: Stop,
    coming: Iterator[Stepped],
    clock: Clock,
    outlook: Outlook,
    progress: Progress,
) -> bool:
    """Steps until the run is done or asked to stop (true), or must roll back (false)."""
    state, record, method = parts.state, parts.record, parts.method
    device = parts.store.device
    every = Cadence.of(parts)
    skipped_since = torch.full((), state.skipped, device=device)
    if state.step == 0:
        save(parts, clock)
    method.train()
    total = record.total_steps
    if state.line and not made_good(parts, every, clock, stop, progress):
        return True
    while state.step < total and not state.ended:
        made = next(coming)
        clock.images += made.num_images
        skipped_since = skipped_since + made.skipped
        state.step += 1
        done = state.step == total
        logged = done or any(every.due(state.step, n) for n in (every.log, every.knn, every.score))
        if logged:
            line = metrics(parts, made, skipped_since) | clock.rates()
            skipped_since = torch.zeros_like(skipped_since)
            try:
                record.log(line | looks(parts, every, clock, stop, done=done))
            except Left:
                state.line = plain(line)
            done = done or state.ended
        # A new best and what it is the best of must not part.
        best = state.best_step == state.step
        # Once: a signal from here on is heard after the next step.
        if asked := world().any(stop.requested):
            stop.requested = True
        keep = done or best or asked or every.due(state.step, every.checkpoint)
        # What several ranks do of a line they must all do after the same step.
        lines = record.flush(wait=keep or (logged and world().size > 1))
        left = [state.line] if state.line else []
        if strikes(parts, lines + left, progress):
            return False
        outlook.arrived(lines, clock)
        if keep:
            state.skipped = float(skipped_since)
            save(parts, clock)
        if asked:
            break
    if state.step == total:
        outlook.end()
    return True


def metrics(parts: Parts, made: Stepped, skipped: Tensor) -> dict[str, Any]:
    """What a metric line says of a step just made."""
    return {
        "epoch": -(-parts.state.step // parts.loader.steps_per_epoch),
        "step": parts.state.step,
        **made.numbers(),
        "skipped": skipped,
    }


def made_good(parts: Parts, every: Cadence, clock: Clock, stop: Stop, progress: Progress) -> bool:
    """Tell the line whose evaluation was left; false: it is left again."""
    state, record = parts.state, parts.record
    try:
        found = looks(parts, every, clock, stop, done=state.step == record.total_steps)
    except Left:
        return False
    record.log(state.line | found)
    state.line = {}
    for line in record.flush(wait=True):  # its strikes were counted
        progress.show(line)
    save(parts, clock)
    return True


def strikes(parts: Parts, lines: list[dict[str, Any]], progress: Progress) -> bool:
    """Show metric lines, and count skipped steps: true when the run must roll back."""
    state = parts.state
    for line in lines:
        progress.show(line)
        if not line["skipped"]:
            continue
        if line["step"] - state.last_strike > MEMORY_OF_STRIKES:
            state.strikes = 0
        state.strikes, state.last_strike = state.strikes + int(line["skipped"]), line["step"]
        say(f"step {line['step']}: loss or gradients not finite, the step was skipped.")
        if state.strikes >= 3 and state.attempt:
            raise NumericalError(
                f"loss or gradients are not finite again at step {line['step']}: try a lower "
                "--set optim.lr, or --precision fp32, then start a new run."
            )
        if state.strikes >= 2:
            return True
    return False


def roll_back(parts: Parts) -> None:
    """Go back to the last checkpoint, and meet other pictures from there."""
    seen = parts.state
    restore(parts)
    parts.state.attempt = parts.counters.attempt = seen.attempt + 1
    parts.state.strikes, parts.state.last_strike = 2, seen.last_strike
    say(f"back to step {parts.state.step}, attempt {parts.state.attempt}.")


def save(parts: Parts, clock: Clock) -> None:
    """Write a checkpoint of everything the next step depends on."""
    tensors = checkpoint.tables(parts.method, parts.optimizer, parts.scaler)
    if not world().first:
        return
    state = parts.state
    state.seconds += clock.lap()
    values = {name: getattr(state, name) for name in State.__slots__}
    with beside(parts, clock, "checkpoint"):
        checkpoint.save(parts.record.checkpoints, state.step, tensors, values, parts.record.sums)


@contextmanager
def beside(parts: Parts, clock: Clock, what: str) -> Iterator[None]:
    """Time what is no step, once the device has made the steps before it."""
    if parts.store.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    with clock.beside(what):
        yield


def restore(parts: Parts) -> None:
    """Take up the newest checkpoint, where there is one, and cut the metrics to it."""
    path = checkpoint.newest(parts.record.checkpoints)
    kept = checkpoint.beside(path) if path else {}
    if path is not None:
        take_up(parts, *checkpoint.load(path, checkpoint.MODEL, checkpoint.OPTIMIZER))
        if (changed := changes(parts)) and world().first:
            say(f"{changed}: the run goes on to the same numbers but for rounding, not to the bit.")
    parts.record.cut(parts.state.step, kept)
    world().meet()  # before the first rank writes any more, all have read


def changes(parts: Parts) -> str:
    """What numbers are rounded by, and is not what the run began with, in words."""
    began, today = parts.record.environment(), environment(parts.store, parts.store.device)
    changed = (key for key in SURROUNDINGS if began.get(key) != today[key])
    return " and ".join(f"{key} {began.get(key)} is {today[key]} today" for key in changed)


def take_up(parts: Parts, tensors: list[dict[str, Tensor]], values: dict[str, Any]) -> None:
    """Be where a checkpoint's tensors and state were."""
    model, optimizer = tensors
    checkpoint.own_rows(parts.method, parts.optimizer, model, optimizer)
    parts.method.load_state_dict(model)
    checkpoint.load_optimizer(parts.optimizer, parts.scaler, optimizer)
    parts.state = State(**{**values, "ranks": world().size})
    parts.counters.attempt = parts.state.attempt


def looks(
    parts: Parts, every: Cadence, clock: Clock, stop: Stop, *, done: bool
) -> dict[str, float]:
    """What a metric line says of features, and of a classifier, when due.

    The first rank looks, the others wait for what it finds.
    """

    def unless_left() -> dict[str, float] | None:
        try:
            return seen(parts, every, clock, stop, done=done)
        except Left:
            return None

    found = world().tell(unless_left)
    if found is None:
        raise Left
    if "holdout_top1" in found:
        keep_best(parts, found["holdout_top1"])
    return found


def seen(parts: Parts, every: Cadence, clock: Clock, stop: Stop, *, done: bool) -> dict[str, float]:
    """As `looks`, by this rank."""
    found: dict[str, float] = {}
    step = parts.state.step
    if done or every.due(step, every.knn):
        with beside(parts, clock, "knn"):
            found |= parts.with_room(partial(features_seen, parts, stop))
    if parts.judge is not None and (done or every.due(step, every.score)):
        split = "holdout" if parts.recipe.run.holdout else "test"
        with beside(parts, clock, "score"):
            judged = parts.with_room(partial(classified, parts, parts.judge, stop))
        found |= {f"{split}_top1": judged.value, f"{split}_num": judged.num}
    return found


def features_seen(parts: Parts, stop: Stop) -> dict[str, float]:
    """What the training images' features look like; with labels, their leave-one-out kNN top-1.

    The test split is never looked at.
    """
    store, run = parts.store, parts.recipe.run
    features = outputs(
        parts.method.backbone_for_export(),
        store,
        resolution=run.resolution,
        dtype=parts.dtype,
        stop=stop,
    )
    found = {}
    if store.learnable:
        known, near = store.with_labels(), features
        if len(known) < len(store):  # a million features are not copied for nothing
            near = features[store.label >= 0]
        votes = knn(near, known.label, near, known.num_classes, own=True, stop=stop)
        found["knn_top1"] = score(votes, known.label).value
    found |= {
        "spread": spread(features),
        "rankme": rankme(features),
        "uniformity": uniformity(features),
    }
    if parts.method.classifier() is None:  # else classes are learnt, and not to tell images apart
        one, other = two_crops(
            parts.method.backbone_for_export(), store, parts.method.views[0], run.seed, parts.dtype
        )
        found |= {"alignment": alignment(one, other), "retrieval_top1": retrieval(one, other)}
    return found


def classified(parts: Parts, store: Store, stop: Stop) -> Score:
    """Top-1 of the method's classifier as it stands."""
    classifier = parts.method.classifier()
    assert classifier is not None, "only methods that learn classes are given images to judge by"
    resolution = parts.recipe.run.resolution
    found = outputs(classifier, store, resolution=resolution, dtype=parts.dtype, stop=stop)
    return score(found, store.label)


def keep_best(parts: Parts, value: float) -> None:
    """Keep the weights that did best on the held-out images; end where patience does."""
    state, run = parts.state, parts.recipe.run
    if value > state.best or not state.best_step:
        state.best, state.best_step = value, state.step
        if world().first:
            tensors = {checkpoint.MODEL: parts.method.state_dict()}
            checkpoint.save(parts.record.best, state.step, tensors, {"holdout_top1": value})
    waited = (state.step - state.best_step) / parts.loader.steps_per_epoch
    state.ended = bool(run.patience) and waited >= run.patience
