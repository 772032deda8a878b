"""Training loop for reward feedback, supervised flow matching and reward models.

Each step takes one optimizer step for every objective in turn: two for reward feedback alternated
with supervised flow matching (arXiv 2511.21541), one for a reward model. A run that is killed and
resumed computes the same numbers as an uninterrupted run, bit for bit on CPU.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.memory.optimizers import gradient_norm
from prfl_fast.models.experts import Experts
from prfl_fast.parallel.ranks import OtherRankError, Ranks
from prfl_fast.training.agreement import Agreement
from prfl_fast.training.checkpoint import (
    begin_checkpoint,
    check_free,
    find_checkpoint,
    link_final,
    list_checkpoints,
    load_checkpoint,
    random_state,
    random_states,
    rank_seed,
    restore_random_state,
    restore_rank,
)
from prfl_fast.training.config import RunIdentity, TrainConfig, TrainResult
from prfl_fast.training.evaluation import Evaluated, EvaluationInterrupted, PeriodicEvaluation
from prfl_fast.training.logging import TrainingLog, check_loggers, show_record
from prfl_fast.training.model_files import check_savable
from prfl_fast.training.objectives import Objective, load_states, one_expert, states_of
from prfl_fast.training.oom import OutOfMemoryError, is_out_of_memory, phase_of, report
from prfl_fast.training.saving import Saving
from prfl_fast.training.sharded_checkpoint import any_sharded, load_average, load_optimizer
from prfl_fast.training.signals import collect_signals
from prfl_fast.training.updates import Updater, detached, read_means
from prfl_fast.utils.checks import check
from prfl_fast.utils.folder_lock import hold_folder
from prfl_fast.utils.io import clean_temporaries
from prfl_fast.utils.progress import step_progress
from prfl_fast.utils.sharded import delayed_reduction, discard_gradients, local_part

NON_FINITE_LIMIT = 5
_log = logging.getLogger("prfl_fast")


class NonFiniteTrainingError(RuntimeError):
    """Error that ends a training with NaN or infinite values; it names the saved state."""


class Trainer:
    """Train the parameters of ``model`` that require gradients.

    A run writes ``log.jsonl`` (one record per step), TensorBoard's files and checkpoints
    (:mod:`prfl_fast.training.checkpoint`) into ``folder``, or nothing if it is None. It holds the
    folder meanwhile (:func:`prfl_fast.utils.folder_lock.hold_folder`); ``final`` there links to the
    newest saved model. SIGINT, SIGTERM and SIGHUP end the run after the current step and save it; a
    second signal ends it at once. An exception in an objective, for example for a sample that
    cannot be read, is raised after the steps before it are saved.

    An update whose loss or gradient is not finite is skipped: weights, optimizer and average do not
    change. Five steps in a row with a skipped update end the run.

    After an :class:`OutOfMemoryError` in a forward or backward, :meth:`run` continues from the
    state before that update, for example after a call of ``activation_checkpointing``.

    Of two experts (:class:`prfl_fast.models.Experts`) that both train, each step trains one, in the
    share of the first objective's gradient points or noise levels that are its own.

    Args:
        model: the model to train. Its parameters and persistent buffers are saved; of a model with
            an adapter, only the adapter is saved.
        objectives: objectives by name, in the order of their optimizer steps.
        resume: ``"auto"`` continues from the newest checkpoint in ``folder``, if there is one. A
            path continues from that checkpoint, ``"last-good"`` from the newest one that is not
            damaged. None starts a new run and rejects a folder that holds checkpoints.
        identity: plain values that describe the run (batch size, number of solver steps, ...). They
            are saved, and a resumed run must have the same values. A :class:`RunIdentity` has those
            of the data and models as well.
        tensorboard: write TensorBoard's files; needs a folder.
        on_step: called with each step's record after the step.
        advise: called when a device is full; returns a sentence that suggests a memory policy.
        evaluation: its figures are logged as ``eval/<name>``, before the first step under step 0;
            a contact sheet is written to ``samples`` in the folder.
        mesh: mesh of the ranks of the run (:func:`prfl_fast.parallel.make_mesh`); None is one
            process. Each data rank draws micro-batches and noise of its own, an update has the mean
            gradient of all, and rank 0 alone writes the folder and shows the progress.

    Raises:
        ValueError: if there is nothing to train, the optimizer cannot train a parameter's dtype,
            ``model`` cannot be saved into ``folder``, or the checkpoint is damaged, of another
            model, or of other settings or inputs.
        MissingExtraError: if the package of the optimizer or of a log is not installed.
    """

    def __init__(  # noqa: PLR0913 - the public face of a run
        self,
        model: nn.Module,
        objectives: Mapping[str, Objective],
        config: TrainConfig,
        *,
        folder: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | None = "auto",
        identity: Mapping[str, Any] | RunIdentity | None = None,
        progress: bool = False,
        tensorboard: bool = False,
        on_step: Callable[[dict[str, Any]], object] | None = None,
        advise: Callable[[], str] | None = None,
        evaluation: PeriodicEvaluation | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        check(bool(objectives), "objectives", objectives, "at least one")
        self.model, self.objectives, self.config = model, dict(objectives), config
        self.folder = None if folder is None else Path(folder)
        self.ranks = ranks = Ranks(mesh)
        self.progress, self.tensorboard = progress and ranks.main, tensorboard
        self.on_step, self.advise = on_step, advise
        self.evaluation = evaluation or PeriodicEvaluation(lambda tick: Evaluated({}))
        self._signals: list[Any] = []  # received by this run
        check(not tensorboard or folder is not None, "folder", folder, "a path for tensorboard")
        check_loggers(tensorboard, config.wandb)
        if isinstance(model, Experts) and model.trained:
            model.use(model.trained[0])  # states of optimizer and average are made on the device
        self._updater = update = Updater(model, config)
        self.parameters, self.optimizer, self.ema = update.parameters, update.optimizer, update.ema
        self._agreement = Agreement(ranks, update)
        self.generator = torch.Generator().manual_seed(rank_seed(config.seed, ranks.data_rank))
        self.result = TrainResult()
        self._in_a_row = 0  # steps with a skipped update, up to the last step
        # Micro-batches drawn so far by all ranks, which share one pass over the data.
        self._draws = dict.fromkeys(self.objectives, 0)
        # Updates already taken in the current step: metrics, and True if the update was applied.
        self._done: dict[str, tuple[dict[str, float], bool]] = {}
        self._partly_updated = False  # True after an incomplete optimizer step
        self._log: TrainingLog | None = None
        if not isinstance(identity, RunIdentity):
            identity = RunIdentity(identity or {})
        self._identity = {**config.fixed(), **identity.settings, "objectives": list(objectives)}
        self._inputs = dict(identity.inputs)
        self._saved_step: int | None = None
        self._saving: Saving | None = None  # the checkpoint that threads of the ranks write
        ok = not config.save_async or any_sharded(self.parameters)
        check(ok, "save_async", config.save_async, "False, as the weights are not sharded")
        if self.folder is not None:
            check_savable(model, shards=ranks.several)
            ranks.on_main(check_free, self.folder)
        self._newest = ranks.on_main(self._newest_step)
        self.resumed_from = ranks.on_main(find_checkpoint, self.folder, resume)
        if self.resumed_from is not None:
            self._restore(self.resumed_from, identity.accept_changed_inputs)

    def _restore(self, path: Path, accept_inputs: bool) -> None:
        run: Any = {"settings": self._identity, "inputs": self._inputs}
        run |= {"accept_inputs": accept_inputs, "ranks": self.ranks}
        state, ema = load_checkpoint(path, self.model, **run)
        if state["parameters"] != list(self.parameters):
            raise ValueError(f"{path}: trained other parameters. Freeze the same ones in this run")
        load_optimizer(self.optimizer, state["optimizer"], path, self.ranks)
        if self.ema is not None:
            load_average(self.ema, ema, path, self.ranks)
        self.result.step, self.result.skipped = state["step"], state["skipped"]
        self._in_a_row, self._draws = state["in_a_row"], dict(state["draws"])
        self._done = {n: (dict(m), ok) for n, (m, ok) in state.get("done", {}).items()}
        load_states(self.objectives, state.get("objectives", {}))
        self.evaluation.load_state_dict(state.get("evaluation", self.evaluation.state_dict()))
        restore_rank(state, self.generator, self.ranks, self.config.seed)
        if self.folder is not None and path.resolve().parent == self.folder.resolve():
            self._saved_step = self.result.step

    def _newest_step(self) -> int:
        found = [] if self.folder is None else list_checkpoints(self.folder)
        return found[-1][0] if found else -1

    def save(self) -> Path:
        """Write a checkpoint of the current state and return its path.

        Raises:
            ValueError: if the trainer has no folder, or a step is incomplete.
            NonFiniteTrainingError: if a parameter is NaN or infinite. Earlier checkpoints are kept.
            OSError: if the checkpoint cannot be written. Earlier checkpoints are kept.
        """
        check(self.folder is not None, "folder", self.folder, "a folder to save to")
        self._check_whole()
        if self._done:
            raise ValueError(
                f"Step {self.result.step + 1} is incomplete: only {', '.join(self._done)} was "
                "updated. Call run() to finish it, then save"
            )
        return self._save()

    def _save(self, whole: bool = True) -> Path:
        """Write a checkpoint, of an incomplete step too, which a resumed run then completes.

        Without ``whole``, sharded weights are not gathered, and may be written in the background.
        """
        assert self.folder is not None
        self._finish_save()
        bad = (n for n, p in self.parameters.items() if not torch.isfinite(local_part(p)).all())
        for name in filter(None, self.ranks.gather(next(bad, None))):
            raise NonFiniteTrainingError(
                f"{name} has NaN or infinite values at step {self.result.step}: not saved"
            )
        if self._log is not None:  # the log must hold every step that a checkpoint holds
            self._log.flush()
        state = {
            "step": self.result.step,
            "skipped": self.result.skipped,
            "in_a_row": self._in_a_row,
            "draws": dict(self._draws),
            "done": dict(self._done),
            "parameters": list(self.parameters),
            "optimizer": self.optimizer.state_dict(),
            "objectives": states_of(self.objectives),
            "evaluation": self.evaluation.state_dict(),
            **random_states(self.generator, self.ranks),
        }
        step = self.result.step
        rest: Any = {"settings": self._identity, "inputs": self._inputs, "ranks": self.ranks}
        rest |= {"whole": whole, "ema": self.ema, "keep_last": self.config.keep_last}
        rest["best_step"] = self.evaluation.best_step
        rest["background"] = background = self.config.save_async and not whole
        with self._held():
            self._saving = begin_checkpoint(self.folder, step, self.model, state, **rest)
            path = self._saving.path
            if not background:
                self._finish_save()
        return path

    def _finish_save(self, wait: bool = True) -> None:
        """Complete the checkpoint that is being written; not ``wait``: if all ranks have done."""
        saving = self._saving
        if saving is None or (not wait and self.ranks.agree(not saving.written.done())):
            return
        self._saving = None
        saving.finish()
        self._newest = self._saved_step = saving.step

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the folder, if there is one, on rank 0."""
        with contextlib.ExitStack() as stack:
            if self.folder is not None:
                self.ranks.on_main(stack.enter_context, hold_folder(self.folder))
            yield

    def run(self) -> TrainResult:
        """Train to ``config.steps``.

        Raises:
            NonFiniteTrainingError: if five steps in a row had a non-finite loss or gradient. The
                state, with the weights of the last good update, is saved first.
            OutOfMemoryError: if a device is full. Gradients are dropped and nothing is saved.
            ValueError: if an objective computes no gradient, or cannot read a sample. The state
                before its update is saved first.
            FolderInUseError: if another run works in the folder.
        """
        self._check_whole()
        with self._held():
            return self._run()

    def _open_log(self) -> None:
        """Prepare the folder for the first step."""
        assert self.folder is not None
        newest, known = self._newest_step(), self._newest
        hint = "Another run has worked in the folder since: start again"
        expected = f"{known}, as when this run read the folder"
        check(newest <= known, "newest checkpoint's step", newest, expected, hint=hint)
        clean_temporaries(self.folder)
        if self._saved_step == self.result.step:  # the newest one may be damaged
            link_final(self.folder / f"step-{self.result.step:08d}")
        begun = self.result.step if self.result.step or self._done else -1
        self._log = TrainingLog(self.folder, begun, self.tensorboard, self.config.wandb)

    def _run(self) -> TrainResult:
        if self.folder is not None:
            self.ranks.on_main(self._open_log)
        try:
            step, steps = self.result.step, self.config.steps
            shown = self.progress and step < steps
            with (
                # A run without a folder has nothing to save, so signals keep their usual effect.
                collect_signals(self.folder is not None, told=not self.ranks.several) as signals,
                step_progress("train", step, steps) if shown else contextlib.nullcontext() as bar,
            ):
                self._signals = signals
                if not self.ranks.several:
                    self._agreement.signals = signals
                self._take_steps(bar)
                if self._agreement.signals:
                    self.result.stopped_by = self._agreement.signals[0]
            self._finish_save()
            if self.folder is not None and (self._done or not self.ranks.on_main(self._has_model)):
                self._save()
        finally:
            if self._saving is not None:  # after an error that other ranks may not know of
                self._saving.discard()
                self._saving = None
            if self._log is not None:
                self._log.close()
                self._log = None
        return self.result

    def _has_model(self) -> bool:
        """Return True if the current state is saved, with its weights as a model."""
        assert self.folder is not None
        model = self.folder / f"step-{self.result.step:08d}" / "model"
        return self._saved_step == self.result.step and model.is_dir()

    def _check_whole(self) -> None:
        if self._partly_updated:
            raise ValueError(
                "An optimizer step did not end, so only some weights may have been updated. "
                "Start again from the last checkpoint"
            )

    def _take_steps(self, bar: Any) -> None:
        try:
            if self.result.step == 0 and not self._done and (figures := self._evaluate(0)):
                self._write({"step": 0, **figures})
            steps, evaluation = self.config.steps, self.evaluation
            agreed = self._agreement
            while self.result.step < steps and not (agreed.signals or evaluation.exhausted):
                self._step(bar)
        except EvaluationInterrupted:
            # By a signal; a resumed run repeats the evaluation after the same updates.
            if self.ranks.several:
                self._agreement.poll(self._signals)

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Return the figures of an evaluation after ``step``; none if it is not due."""
        try:
            return self.evaluation.run(step, self.generator, self._signals, self._log, self.ranks)
        except Exception as error:
            if not self.ranks.sharded:
                self._agreement.error = error
            self._save_before(error)
            raise

    def _write(self, record: dict[str, Any]) -> None:
        self.result.history.append(record)
        if self._log is not None:
            self._log.write(record)

    def _step(self, bar: Any) -> None:
        start = time.perf_counter()
        step = self.result.step + 1
        record: dict[str, Any] = {"step": step, "lr": self._updater.set_rates(step)}
        bad = []
        for name, objective in self.objectives.items():
            if name not in self._done:
                self._done[name] = self._update(name, objective)
            metrics, finite = self._done[name]
            for key, value in metrics.items():
                record[f"{name}/{key}"] = value if math.isfinite(value) else None
            if not finite:
                bad.append(name)
        seconds = round(time.perf_counter() - start, 6)
        record |= self._evaluate(step)
        self._done = {}
        self.result.step = step
        self.result.skipped += len(bad)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        record |= {"skipped": self.result.skipped, "seconds": seconds}
        self._write(record)
        if bar is not None:
            show_record(bar, record)
        if self._in_a_row >= NON_FINITE_LIMIT:
            where = "" if self.folder is None else f"; the last good state is in {self.save()}"
            raise NonFiniteTrainingError(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient "
                f"(last: {', '.join(bad)} at step {step}){where}"
            )
        every = self.config.save_every
        best = self.evaluation.best_step == step
        if self.folder is not None and (best or (every and step % every == 0)):
            self._save(whole=best or step == self.config.steps)
        else:
            self._finish_save(wait=False)
        if self.on_step is not None:
            self.on_step(record)

    def _update(self, name: str, objective: Objective) -> tuple[dict[str, float], bool]:
        """Take one optimizer step for one objective; return its metrics, and False if skipped."""
        discard_gradients(self.model)
        # The state before the update, from which run() continues after a full device.
        draws, random = self._draws[name], random_state(self.generator)
        states = states_of(self.objectives)
        try:
            means, norm = self._gradients(name, objective)
        except BaseException as error:  # for example a sample with NaN: the steps so far are good
            failure = None
            try:
                if is_out_of_memory(error):
                    count = self.config.gradient_accumulation_steps
                    done = (self._draws[name] - draws) // self.ranks.data_ranks
                    place = f"{phase_of(error)} of micro-batch {done + 1}"
                    place = place if done < count else "norm of the gradients"
                    failure = self._out_of_memory(f"objective {name!r}, {place}", error)
            finally:  # after the report, because advise() may draw random numbers
                discard_gradients(self.model)
                self._draws[name] = draws
                load_states(self.objectives, states)
                restore_random_state(random, self.generator)
            if failure is not None:
                raise failure from error
            full = isinstance(error, OtherRankError) and error.out_of_memory
            if isinstance(error, Exception) and not full:
                self._save_before(error)
            raise
        try:
            finite = all(math.isfinite(means[key]) for key in ("loss", "grad_norm") if key in means)
            self._updater.apply(norm, finite)
            return means, finite
        except BaseException as error:
            self._partly_updated = True
            if is_out_of_memory(error):
                place = f"the optimizer step of objective {name!r}"
                raise self._out_of_memory(place, error) from error
            raise

    def _save_before(self, error: Exception) -> None:
        """Save the state before an update that raised ``error``, unless it is saved already."""
        fresh = self.result.step == 0 and not self._done
        if self.folder is None or fresh or self._saved_step == self.result.step:
            return
        if self.ranks.several and self._agreement.error is not error:
            return  # the other ranks do not know of it, so they would not save
        try:
            self._finish_save()
            if self._saved_step == self.result.step:
                return
            path = self._save()
        except Exception as failure:  # noqa: BLE001 - of any type after an error of the device
            _log.error("step %d could not be saved: %s", self.result.step, failure)
            return
        if isinstance(error, ValueError) and len(error.args) == 1:
            error.args = (f"{error}. Step {self.result.step} is saved in {path}",)

    def _gradients(
        self, name: str, objective: Objective
    ) -> tuple[dict[str, float], torch.Tensor | None]:
        """Accumulate the gradient of one update; return the mean of each metric, and its norm."""
        if self.ranks.several:
            metrics: list[Mapping[str, Any]] = [self._agreed_means(name, objective)]
        else:
            metrics = self._micro_batches(name, objective)
        gradients = self._updater.gradients()
        norm = gradient_norm(gradients) if gradients else None
        # One process waits for the device here alone in an update: whether it is applied depends on
        # the loss and on the norm (before clipping).
        means = read_means([*metrics, *([] if norm is None else [{"grad_norm": norm}])])
        expected = "a gradient in at least one trainable parameter"
        ok = norm is not None or not math.isfinite(means["loss"])
        check(ok, f"gradient of objective {name!r}", None, expected)
        return means, norm

    def _micro_batches(self, name: str, objective: Objective) -> list[Mapping[str, Any]]:
        """Accumulate the gradients of this rank's micro-batches; return the metrics of each."""
        metrics: list[Mapping[str, Any]] = []
        count = self.config.gradient_accumulation_steps
        for number in range(count):
            draw = self._draws[name] + self.ranks.data_rank
            late = number < count - 1 and self.ranks.sharded
            sync = delayed_reduction(self.model) if late else contextlib.nullcontext()
            # Gradients of the micro-batches add up in .grad, so each has a share of 1 / count.
            with sync, one_expert(self.model, self.objectives, self.result.step):
                found = objective(draw, self.generator, 1 / count)
            metrics.append(detached(found))
            del found  # a graph would keep activations beside those of the next micro-batch
            self._draws[name] += self.ranks.data_ranks
        return metrics

    def _agreed_means(self, name: str, objective: Objective) -> Mapping[str, float]:
        """Return the metrics of all ranks, and leave the mean gradient of all in ``.grad``."""
        means: Mapping[str, float] = {}
        failure: Exception | None = None
        try:
            means = read_means(self._micro_batches(name, objective))
        except Exception as error:
            if self.ranks.sharded:  # the others wait for this rank in their forward or backward
                raise
            failure = error
        return self._agreement.update(means, failure, self._signals, objective)

    def _out_of_memory(self, place: str, error: BaseException) -> OutOfMemoryError:
        """Free gradients and the failed forward, and return the report."""
        held: Any = {"average": self.ema or {}, "others": self.objectives}
        place = f"{place}, step {self.result.step + 1}"
        return report(error, place, self.advise, self.model, self.optimizer, **held)
