"""`diffbench reference build | inspect | verify`: statistics of real images made, read and checked by hand."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError
from diffbench.core.files import write_bytes
from diffbench.evaluation import reference as references
from diffbench.evaluation.images import open_pictures, refuse_to_overwrite
from diffbench.metrics import Extractor
from diffbench.metrics.suite import Reference
from diffbench.runs import adm
from diffbench.runs.foreign import extractor_for, is_run, of_pictures, run_images, settings_of


def run(arguments: argparse.Namespace) -> int:
    """Builds, inspects or verifies statistics of `arguments.paths`."""
    text, right = act(arguments.action, arguments.paths)
    print(text)
    return 0 if right else 2


def act(action: str, arguments: Sequence[str]) -> tuple[str, bool]:
    """One of the verb's actions on paths and key=value arguments: lines to print, and whether all is right.

    Raises:
        UserError: one line that says what does not fit.
    """
    overrides, paths = [a for a in arguments if "=" in a], [Path(a) for a in arguments if "=" not in a]
    if action == "verify":
        return verify(paths, overrides)
    if action == "inspect":
        return inspect(paths), True
    if len(paths) != 1:
        raise UserError(f"{COMMAND_LINE}: build takes one run, folder or npz, got {len(paths)}")
    return build(paths[0], overrides), True


def build(what: Path, overrides: Sequence[str]) -> str:
    """Makes and caches the statistics of pictures; `out=FILE` also writes them to a file.

    Args:
        what: a run folder (its training images: evaluate.count of them, or evaluate.reference=all), a folder of
            pictures, or an npz with arr_0.
        overrides: keys of the section `evaluate`, and `out`: a .safetensors file for `evaluate --against`, or an .npz
            for the ADM evaluator.

    Returns:
        What was made, in words.
    """
    named = [o.partition("=")[2] for o in overrides if o.startswith("out=")]
    out = Path(named[-1]) if named else None
    if out is not None:
        if out.suffix not in (".safetensors", ".npz"):
            raise UserError(
                f"{COMMAND_LINE}: out: must end in .safetensors, or in .npz for the ADM evaluator, got {out}"
            )
        refuse_to_overwrite(out)
    settings = settings_of([o for o in overrides if not o.startswith("out=")], what)
    if is_run(what):
        train = run_images(what)
        shape = tuple(train.images.shape[1:])
        extractor = extractor_for(settings, (shape[0], shape[1], shape[2]), what)
        whole = settings.reference == "all"
        part = references.everything(train, "train") if whole else references.first(train, "train", settings.count)
        reference, key = references.of_part(extractor, part)
        images = [train.images[i] for i in part.index[adm.pictures_for(len(part))].tolist()]
    else:
        pictures = open_pictures(what)
        extractor = extractor_for(settings, pictures.shape)
        reference, told = of_pictures(extractor, what)
        key, chosen = told["key"], set(adm.pictures_for(len(pictures)).tolist())
        numbered = enumerate(p for batch in pictures.batches(references.BATCH) for p in batch)
        images = [picture for i, picture in numbered if i in chosen] if out is not None and out.suffix == ".npz" else []
    (path,) = references.reference_folder().glob(f"*-{key}.safetensors")
    if out is not None:
        _write(out, path, extractor, reference, images)
    return f"{described(path)}\nfile: {out or path}"


def _write(out: Path, cached: Path, extractor: Extractor, reference: Reference, images: list[Tensor]) -> None:
    if out.suffix == ".npz":
        adm.write_reference(out, extractor, reference, images)
    else:
        write_bytes(out, cached.read_bytes())


def described(path: Path) -> str:
    """What a file of statistics holds, as lines; its hashes are checked on the way."""
    key, reference = references.read(path)
    eigenvalues = torch.linalg.eigvalsh(reference.fit.cov)
    rank = int((eigenvalues > 1e-10 * eigenvalues.max()).sum())
    lines = [f"{name}: {value}" for name, value in key.items()]
    lines += [f"key: {references.digest(key)}", f"features: {len(reference.fit.mean)}, covariance of rank {rank}"]
    lines += [f"trace of the covariance: {float(reference.fit.cov.trace()):.6g}"]
    lines += [f"feature vectors kept: {len(reference.rows)}", f"spatial layer: {'yes' if reference.spatial else 'no'}"]
    return "\n".join(lines)


def inspect(paths: Sequence[Path]) -> str:
    """What files of statistics hold; without files, a list of those in the cache."""
    if paths:
        return "\n\n".join(f"{path}\n{described(path)}" for path in paths)
    found = sorted(references.reference_folder().glob("*.safetensors"))
    if not found:
        return f"{references.reference_folder()}: none yet"
    return "\n".join(f"{path}  {references.read(path)[0]['count']:,} images" for path in found)


def verify(paths: Sequence[Path], overrides: Sequence[str]) -> tuple[str, bool]:
    """Whether files of statistics (by default all in the cache) are whole; or, for two npz files, the ADM evaluator's
    published self-check.

    Returns:
        Lines to print, and whether all is right.
    """
    if len(paths) == 2 and all(path.suffix == ".npz" for path in paths):
        settings = settings_of(overrides or ["evaluate.extractor=inception"], None)
        pictures = open_pictures(paths[0])
        return adm.self_check(paths[0], paths[1], extractor_for(settings, pictures.shape))
    if any(path.suffix == ".npz" for path in paths):
        raise UserError(
            f"{COMMAND_LINE}: the ADM evaluator's self-check takes two npz files, {adm.SAMPLES} and {adm.REFERENCE}"
        )
    lines, right = [], True
    for path in paths or sorted(references.reference_folder().glob("*.safetensors")):
        try:
            key, _ = references.read(path)
            lines.append(f"{path}: whole, {key['count']:,} images")
        except UserError as e:
            right = False
            lines.append(str(e))
    return "\n".join(lines) or f"{references.reference_folder()}: none yet", right
