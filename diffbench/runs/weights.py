"""Averaged weights of a run: exported, and read from the exports or the newest checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffbench.config.kinds import BaseConfig
from diffbench.core.errors import UserError
from diffbench.core.tensors import by_name, read_state
from diffbench.core.tensors import read as read_tensors
from diffbench.core.tensors import write as write_tensors


def export_path(folder: Path, decay: float) -> Path:
    return folder / f"ema-{decay}.safetensors"


def read(folder: Path, config: BaseConfig, network: nn.Module, decay: float) -> tuple[dict[str, Tensor], int]:
    """Read the average with a decay, from its export or else the newest checkpoint; also return its images seen."""
    if decay not in config.ema.decays:
        known = ", ".join(map(str, config.ema.decays))
        raise UserError(f"{folder}: ema: no average has decay {decay}; choose from {known}")
    path, in_checkpoint = export_path(folder, decay), _checkpoint_images(folder, config.trainer.batch_size)
    if (exported_images(folder, decay) or 0) >= in_checkpoint and path.is_file():
        try:
            tensors, metadata = read_tensors(path)
        except UserError as e:
            raise UserError(f"{e} to use the newest checkpoint") from None
        return tensors, _images(path, metadata)
    from diffbench.training.checkpoint import newest, step_of

    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{folder}: no weights yet; train the run first")
    averages, state = _averages(checkpoint)
    average = averages.get(str(decay), [])
    if [tuple(a.shape) for a in average] != [tuple(p.shape) for p in network.parameters()]:
        raise UserError(f"{checkpoint}: its averages do not fit the network in {folder / 'config.yaml'}; remove it")
    return _with_average(network, average, state), step_of(checkpoint) * config.trainer.batch_size


def images_seen(folder: Path, decay: float, batch_size: int) -> int:
    """Return the images seen by the newest weights of a folder, exported or in a checkpoint; 0 without any."""
    return max(exported_images(folder, decay) or 0, _checkpoint_images(folder, batch_size))


def exported_images(folder: Path, decay: float) -> int | None:
    """Return the number of images seen by an exported average; 0 for imported weights, None without an export."""
    path = export_path(folder, decay)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            return _images(path, file.metadata() or {})
    except SafetensorError as e:
        raise UserError(f"{path}: damaged ({e}); remove it to use the newest checkpoint") from None


def _checkpoint_images(folder: Path, batch_size: int) -> int:
    steps = [int(n) for p in folder.glob("checkpoints/step-*.ckpt") if (n := p.stem[5:]).isdecimal()]
    return max(steps, default=0) * batch_size


def _images(path: Path, metadata: Mapping[str, str]) -> int:
    images = metadata.get("images", "0")
    if not images.isdecimal():
        raise UserError(f"{path}: damaged (images={images!r}); remove it to use the newest checkpoint")
    return int(images)


def read_best(folder: Path) -> tuple[dict[str, Tensor], int, float]:
    """Read the averaged weights with the lowest distance in training, their images seen, and their decay."""
    path = folder / "best.safetensors"
    if not path.is_file():
        raise UserError(f"{folder}: snapshot: best.safetensors is missing; train with evaluate.best=fd to keep one")
    best, metadata = read_tensors(path)
    try:
        return best, int(metadata["images"]), float(metadata["decay"])
    except (KeyError, ValueError) as e:
        raise UserError(f"{path}: damaged ({e})") from None


def export(
    folder: Path,
    network: nn.Module,
    decay: float,
    average: Sequence[Tensor],
    images: int,
    facts: Mapping[str, str] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an average as safetensors, with `facts` in its metadata; buffers come from `state`, else the network."""
    metadata = {"images": str(images), "decay": str(decay), **(facts or {})}
    write_tensors(export_path(folder, decay), _with_average(network, average, state), metadata)


def export_from(checkpoint: Path, folder: Path, network: nn.Module, images: int) -> None:
    """Write all averages of a checkpoint as safetensors."""
    averages, state = _averages(checkpoint)
    for decay, average in averages.items():
        export(folder, network, float(decay), average, images, state=state)


def mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describe the first name at which two state dicts differ in shape, and how many do; "" if they agree."""
    here = {name: tuple(value.shape) for name, value in wanted.items()}
    there = {name: tuple(value.shape) for name, value in given.items()}
    wrong = [name for name in sorted(here | there) if here.get(name) != there.get(name)]
    if not wrong:
        return ""
    shapes = f"{there.get(wrong[0], 'absent')} there, {here.get(wrong[0], 'absent')} here"
    return f"{wrong[0]} is {shapes}, {len(wrong)} differ in all"


def _averages(checkpoint: Path) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Read a checkpoint's averages by decay, which have no buffers, and the network's raw state, which has."""
    try:
        state = read_state(checkpoint)
        averages: dict[str, list[Tensor]] = state["callbacks"]["EMA"]["averages"]
        raw = {name.removeprefix("network."): value for name, value in state["state_dict"].items()}
        return {str(decay): list(average) for decay, average in averages.items()}, raw
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{checkpoint}: contains no averages of training; remove it") from None


def _with_average(
    network: nn.Module, average: Sequence[Tensor], state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return an average as a state dict, with buffers from a raw state or else from the network."""
    own = network.state_dict()
    return {name: (state or own).get(name, value) for name, value in own.items()} | by_name(network, average)
