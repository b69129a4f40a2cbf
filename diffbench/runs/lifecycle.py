"""Train, resume and open runs of every kind."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from diffbench.autoencoders import io
from diffbench.config.kinds import BaseConfig, RunConfig
from diffbench.config.layers import COMMAND_LINE, Layer, located
from diffbench.config.load import from_layers, read_layers, to_yaml
from diffbench.core import distributed
from diffbench.core.errors import UserError
from diffbench.core.files import locked, sweep, write_bytes, write_text
from diffbench.data.latents import LatentSet
from diffbench.data.sets import describe, describe_sizes
from diffbench.evaluation.curves import NAME as CURVES
from diffbench.evaluation.curves import read_curves
from diffbench.runs import build, weights
from diffbench.runs.autoencoder import AutoencoderRun
from diffbench.runs.base import Run, open_run
from diffbench.runs.classifier import ClassifierRun
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.folder import (
    CONFIG_FILE,
    check_place,
    check_resumable,
    claim_folder,
    folder_for,
    has_checkpoint,
    read_config,
    reference_curves,
    refuse_links,
    set_aside,
    update_config,
)
from diffbench.runs.ranks import run_ranks

C = TypeVar("C", bound=BaseConfig)

KINDS: dict[str, type[Run[Any]]] = {kind.kind: kind for kind in (DenoiserRun, ClassifierRun, AutoencoderRun)}
"""Classes of runs by the `kind` of their config."""


def load(folder: str | Path, ema: float | None = None) -> DenoiserRun:
    """Load a trained denoiser with its averaged weights, on the CPU, ready to sample.

    Args:
        folder: the run folder.
        ema: decay of the average, one of `config.ema.decays`; by default the first.

    Raises:
        UserError: if the folder is not a denoiser's run, or has no weights yet, or no such average.
    """
    return open_run(folder, [DenoiserRun]).use_average(ema)


def open_any(folder: str | Path) -> Run[Any]:
    """Open the run in a folder, of any kind, without building its network."""
    return open_run(folder, list(KINDS.values()))


def encode(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Encode the data of a latent-space experiment into the cache, ahead of training; see `DenoiserRun.sets`."""
    stack = read_layers(path, overrides)
    config = from_layers(stack)
    with located(stack):
        if not isinstance(config, RunConfig) or config.autoencoder is None:
            raise ValueError(
                "autoencoder: missing: there is nothing to encode in pixel space; choose an experiment with this key"
            )
        DenoiserRun.check(config)
    run = DenoiserRun(folder_for(Path(path), overrides, config), with_autoencoder(config))
    run_ranks(config.trainer.processes, "encode", str(path), *overrides)
    for part in run.sets:
        assert isinstance(part, LatentSet)
        numbers, size = part.mean[0].numel(), part.nbytes / 2**20
        print(f"{len(part):,} latents of {part.name}, {numbers:,} numbers each, {size:,.1f} MiB")


def train(path: str | Path, overrides: Sequence[str] = (), restart: bool = False) -> Any:
    """Train or resume the experiment in a YAML, unless it is complete; return its `Run` with averaged weights.

    Args:
        path: the YAML.
        overrides: key=value strings.
        restart: whether to start over; an existing run folder is renamed.

    Raises:
        UserError: for anything in config or folder that the user can fix.
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved; with several processes also the code of
            one that failed; 0 in every process but rank 0 of a torchrun or srun job.
    """
    stack = read_layers(path, overrides)
    config = from_layers(stack)
    curves = reference_curves(Path(path), overrides, config)
    return train_in(folder_for(Path(path), overrides, config), config, stack, restart, curves)


def train_in(
    folder: Path, config: BaseConfig, stack: Sequence[Layer] = (), restart: bool = False, curves: Path | None = None
) -> Any:
    """Train a config in a given run folder; see `train`.

    Args:
        stack: the layers of the config, to name in errors.
        curves: file of reference curves for this run, which is copied into the folder.
    """
    kind = KINDS[config.kind]
    if restart and (folder / CONFIG_FILE).exists() and distributed.rank_and_world()[1] > 1:
        raise UserError(f"{COMMAND_LINE}: restart: not possible with several processes; move {folder} away")
    with located(stack):  # find as many errors as possible before making the folder or importing Lightning
        check_place(folder)
        fresh = restart or not has_checkpoint(folder)
        if fresh and isinstance(config, RunConfig) and config.init_from is not None:
            with located(key="init_from"):
                open_run(config.init_from, [DenoiserRun])
        kind.check(config)
        start = kind.start(config) if fresh else None
    config = with_autoencoder(config)
    refuse_links(folder)
    if distributed.rank_and_world()[0] > 0:  # everything below is done by the first process alone
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            fit(kind(folder, config), True, start)
        raise SystemExit(0)
    if restart and (folder / CONFIG_FILE).exists():
        with locked(folder):
            print(f"restart: the earlier run is now {set_aside(folder)}")
    with locked(folder) as lock:
        existed = claim_folder(folder, config)
        if existed:
            check_resumable(folder, config)
        if curves is not None and not (folder / CURVES).exists():
            read_curves(curves)
            write_bytes(folder / CURVES, curves.read_bytes())
        fit(kind(folder, config), existed, start, lock)
        kind(folder, config).finish()
        return kind(folder, config).use_average()


def branch(trunk: Path, folder: Path, config: BaseConfig) -> None:
    """Copy the training state of the run `trunk` into a new folder, which `train_in` then continues under `config`.

    Both configs must agree on all steps so far. Exported averages, scores and samples are not copied.
    """
    staged = folder.with_name(f".{folder.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(
        trunk, staged, ignore=shutil.ignore_patterns(".*", "ema-*", "results.jsonl", "evaluations", "wandb*")
    )
    before = read_config(trunk)
    if isinstance(before, RunConfig) and isinstance(config, RunConfig):  # the run folder that replaced an experiment
        config = dataclasses.replace(config, autoencoder=before.autoencoder)
    write_text(staged / CONFIG_FILE, to_yaml(config))
    os.replace(staged, folder)


def fit(run: Run[Any], existed: bool, start: dict[str, Tensor] | None, lock: int | None = None) -> None:
    """Train or resume a run, unless it is complete; export its averages.

    If training takes several processes, this starts them, unless torchrun or srun did: then each process calls this.

    Args:
        existed: whether the folder already holds this run.
        start: weights to start from, or None.
        lock: open lock file of the folder, inherited by the training processes.
    """
    from diffbench.training.checkpoint import newest, pending, step_of
    from diffbench.training.logger import check_log

    settings, first = run.config.trainer, distributed.rank_and_world()[0] == 0
    sweep(run.folder)
    checkpoint = newest(run.folder / "checkpoints") if existed else None
    done = step_of(checkpoint) if checkpoint else 0
    images = done * settings.batch_size
    if checkpoint and (done > settings.max_steps or (done == settings.max_steps and not pending(checkpoint))):
        _finish_complete(run, checkpoint, images)
        return
    if checkpoint:
        check_log(run.folder, checkpoint)
    if first:
        run.prepare()
        if existed:
            update_config(run.folder, run.config)
    if checkpoint is None and start is not None:
        print(f"initial weights from {getattr(run.config, 'init_from', None)}")
    _describe(run, f"resuming at {images:,} images" if checkpoint else "starting")
    arguments = [str(run.folder), *([str(checkpoint)] if checkpoint else [])]
    if not run_ranks(settings.processes, "train", *arguments, keep=[] if lock is None else [lock]):
        train_here(run, checkpoint, start)


def _finish_complete(run: Run[Any], checkpoint: Path, images: int) -> None:
    """Report that a run is complete; export its averages if a kill prevented that."""
    print(f"{run.folder}: complete at {images:,} images")
    if distributed.rank_and_world()[0] == 0:
        if not run.complete:
            weights.export_from(checkpoint, run.folder, run.network, images)
        update_config(run.folder, run.config, complete=True)


def _describe(run: Run[Any], state: str) -> None:
    """Print the data, size and precision of a run that starts or resumes."""
    print(f"data: {describe(run.train_set, run.held_out)}")
    if sizes := describe_sizes(run.train_set):
        print(f"sizes (height x width): {sizes}")
    cost = f"{run.cost.parameters:,} parameters, {run.cost.gmacs:.4f} GMACs"
    print(f"{run.folder}: {state}, {cost}, {run.config.trainer.precision}")


def train_here(run: Run[Any], checkpoint: Path | None, start: dict[str, Tensor] | None) -> None:
    """Train in this process, as one rank of its job; rank 0 exports the averages."""
    from diffbench.training import trainer

    run.use_threads()
    if checkpoint is None and start is not None:
        run.network.load_state_dict(start, strict=True)
    c, data = run.config, run.data_module()
    ema = trainer.fit(run.module(), data, run.folder, c, run.callbacks(), checkpoint, run.hparams())
    for decay in ema.averages:
        average = ema.full_average(decay)
        if distributed.rank() == 0:
            weights.export(run.folder, run.network, decay, average, c.trainer.max_steps * c.trainer.batch_size)
    distributed.leave_group()


def with_autoencoder(config: C) -> C:
    """Replace an autoencoder's experiment by its run folder in a config; train it first if it is missing."""
    if not isinstance(config, RunConfig) or not build.is_experiment(config.autoencoder):
        return config
    folder, wanted, arguments = _autoencoder(config)
    if autoencoder_arguments(config):
        if distributed.rank_and_world()[1] > 1:
            raise UserError(f"autoencoder: {arguments[0]} is not trained yet; train it before starting these processes")
        print(f"{folder}: training the autoencoder first (autoencoder={arguments[0]})", flush=True)
        train(arguments[0], arguments[1:])
    else:
        claim_folder(folder, wanted)
    return dataclasses.replace(config, autoencoder=str(folder))


def autoencoder_arguments(config: RunConfig) -> list[str]:
    """Return the arguments of `train` that train a config's autoencoder; none if it is trained already."""
    if not build.is_experiment(config.autoencoder):
        return []
    folder, _, arguments = _autoencoder(config)
    return [] if (folder / build.INSIDE / io.CONFIG).is_file() else arguments


def _autoencoder(config: RunConfig) -> tuple[Path, BaseConfig, list[str]]:
    """Return the run folder of a config's autoencoder experiment, its config, and the arguments of `train`."""
    source = str(config.autoencoder)
    own, overrides = build.autoencoder_experiment(config)
    return folder_for(Path(source), overrides, own), own, [source, *overrides]
