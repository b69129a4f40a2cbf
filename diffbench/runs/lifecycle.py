"""Runs of every kind: trained, resumed, loaded."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffbench.autoencoders import io as files
from diffbench.config.kinds import BaseConfig, RunConfig
from diffbench.config.layers import Layer, blaming
from diffbench.config.load import from_layers, read_layers
from diffbench.core import ranks
from diffbench.core.errors import UserError
from diffbench.core.files import locked
from diffbench.core.launcher import launch
from diffbench.data.latents import LatentSet
from diffbench.runs import classifier, spaces
from diffbench.runs.autoencoder import AutoencoderRun
from diffbench.runs.base import Trained, open_run
from diffbench.runs.denoiser import Run, load
from diffbench.runs.folder import check_place, check_same, folder_for, has_checkpoint, refuse_links

__all__ = ["KINDS", "Run", "encode", "load", "load_any", "train", "train_in"]

C = TypeVar("C", bound=BaseConfig)

KINDS: dict[str, type[Trained[Any]]] = {
    "denoiser": Run,
    "classifier": classifier.ClassifierRun,
    "autoencoder": AutoencoderRun,
}
"""The `kind` of a config -> what trains it."""


def load_any(folder: str | Path, ema: float | None = None) -> Trained[Any]:
    """A trained run of any kind; see `load`."""
    return open_run(folder, KINDS, ema)


def encode(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Encodes the data of an experiment in latent space, so that training finds the latents; see `Run.sets`.

    Raises:
        UserError: for anything in the config that the user can mend.
    """
    stack = read_layers(path, overrides)
    config = from_layers(stack)
    with blaming(stack):
        if not isinstance(config, RunConfig) or config.autoencoder is None:
            raise ValueError(
                "autoencoder: missing: nothing is encoded in pixel space; choose an experiment that has it"
            )
        Run.check(config)
    if config.trainer.processes > 1 and ranks.place()[1] == 1:
        with_autoencoder(config)
        command = [sys.executable, "-m", "diffbench.runs.worker", "encode", str(path), *overrides]
        if code := launch(command, config.trainer.processes):
            raise SystemExit(code)
    run = Run(folder_for(Path(path), overrides, config), with_autoencoder(config))
    for part in run.sets:
        assert isinstance(part, LatentSet)
        numbers, size = part.mean[0].numel(), part.nbytes / 2**20
        print(f"{len(part):,} latents of {part.name}, {numbers:,} numbers each, {size:,.1f} MiB")


def train(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Trains the experiment of a YAML, resumes it, or finds it complete; returns it with averaged weights.

    Returns:
        The `Run`, or what else the config's kind is.

    Raises:
        UserError: for anything in config or folder that the user can mend.
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved; the code of a process that failed, where
            several train; 0 in all but the first of those that torchrun or srun started.
    """
    stack = read_layers(path, overrides)
    config = from_layers(stack)
    return train_in(folder_for(Path(path), overrides, config), config, stack)


def train_in(folder: Path, config: BaseConfig, stack: Sequence[Layer] = ()) -> Any:
    """Trains a config in a run folder, resumes it, or finds it complete; see `train`.

    Args:
        folder: the run folder.
        config: what is trained.
        stack: the layers that the config consists of, named in errors.
    """
    kind = KINDS[config.kind]
    with blaming(stack):  # all that can be found before the folder is made, or Lightning imported
        kind.check(config)
        check_place(folder)
        start = None if has_checkpoint(folder) else kind.start(config)
    config = with_autoencoder(config)
    refuse_links(folder)
    if ranks.place()[0] > 0:  # the first process does what is done once
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            kind(folder, config).fit(True, start)
        raise SystemExit(0)
    with locked(folder) as held:
        existed = check_same(folder, config)
        run = kind(folder, config)
        run.lock = held
        run.fit(existed, start)
        trained = kind(folder, config)
        trained.use_average(trained.ema)
        return trained


def with_autoencoder(config: C) -> C:
    """The config with the autoencoder's run in place of its experiment, which is trained first where it is missing."""
    if not isinstance(config, RunConfig) or not spaces.is_experiment(config.autoencoder or ""):
        return config
    folder, wanted, words = _autoencoder(config)
    if autoencoder_missing(config):
        if ranks.place()[1] > 1:
            raise UserError(
                f"autoencoder: {words[0]} is not trained yet; train it first, then start these processes again"
            )
        print(f"{folder}: not trained yet, and trained first, as autoencoder={words[0]} says", flush=True)
        train(words[0], words[1:])
    else:
        check_same(folder, wanted)
    return dataclasses.replace(config, autoencoder=str(folder))


def autoencoder_missing(config: RunConfig) -> list[str]:
    """The words that `train` the experiment of a config's autoencoder, or none where that is done."""
    if not spaces.is_experiment(config.autoencoder or ""):
        return []
    folder, _, words = _autoencoder(config)
    return [] if (folder / spaces.INSIDE / files.CONFIG).is_file() else words


def _autoencoder(config: RunConfig) -> tuple[Path, BaseConfig, list[str]]:
    """The folder of the autoencoder's run that a config's experiment means, its config, and the words for `train`."""
    source = str(config.autoencoder)
    wanted, overrides = spaces.experiment(config)
    return folder_for(Path(source), overrides, wanted), wanted, [source, *overrides]
