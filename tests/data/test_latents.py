"""The latent cache: its content, which latents it refuses, how it resumes, and batches drawn from it."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import own_images
import pytest
import torch
from own_images import Encoder, squares
from torch import Tensor

from diffbench.core import rng, store
from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8
from diffbench.data.datamodule import ImageDataModule, LatentDataModule
from diffbench.data.latents import LatentSet, encode


def expected(flip: bool = False) -> tuple[Tensor, Tensor]:
    x = from_uint8(squares().images)
    return Encoder().encode(x.flip(-1) if flip else x)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("float32", torch.float32)])
def test_mean_and_log_variance_are_stored(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    data = encode(squares(), Encoder(), tmp_path / "l", dtype=dtype, batch_size=16)  # type: ignore[arg-type]
    mean, log_variance = expected()
    assert data.mean.shape == (50, 3, 2, 2) and data.mean.dtype == data.log_variance.dtype == kind
    assert torch.equal(data.mean, mean.to(kind)) and torch.equal(data.log_variance, log_variance.to(kind))
    assert torch.equal(data.labels, squares().labels)
    assert (data.num_classes, data.name, len(data), data.flipped_mean) == (5, "squares", 50, None)
    assert data.digest is not None
    assert dataclasses.replace(data, digest=None).fingerprint() == data.fingerprint() == data.digest


def test_mirrored_images_are_encoded_on_request(tmp_path: Path) -> None:
    data = encode(squares(), Encoder(), tmp_path / "l", dtype="float32", flip=True)
    assert data.flipped_mean is not None and data.flipped_log_variance is not None
    assert torch.equal(data.mean, expected()[0])
    assert torch.equal(data.flipped_mean, expected(flip=True)[0])
    assert torch.equal(data.flipped_log_variance, expected(flip=True)[1])
    assert dataclasses.replace(data, digest=None).fingerprint() == data.digest
    assert data.first(7).flipped_mean is not None and len(data.first(7)) == 7
    with pytest.raises(UserError, match=r"contains other latents"):
        encode(squares(), Encoder(), tmp_path / "l", dtype="float32")


def test_nothing_is_encoded_the_second_time(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    encode(squares(), first, tmp_path / "l")
    again = encode(squares(), second, tmp_path / "l", scale=2.0, shift=1.0)
    assert sum(first.batches) == 51  # 50, and one to learn the shape
    assert second.batches == []
    assert (again.scale, again.shift) == (2.0, 1.0)


def test_a_folder_with_other_latents_is_refused(tmp_path: Path) -> None:
    encode(squares(), Encoder(), tmp_path)
    for wanted in ((squares(49), Encoder()), (squares(), Encoder("a" * 64))):
        with pytest.raises(UserError, match=r"contains other latents; choose another folder, or remove it"):
            encode(*wanted, tmp_path)
    with pytest.raises(UserError, match=r"contains other latents"):
        encode(squares(), Encoder(), tmp_path, dtype="float32")


def test_latents_with_a_damaged_manifest_are_encoded_again(tmp_path: Path) -> None:
    encode(squares(), Encoder(), tmp_path)
    whole = content(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    again = Encoder()
    encode(squares(), again, tmp_path)
    assert content(tmp_path) == whole and sum(again.batches) == 51


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Wild(Encoder):
        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_variance = super().encode(x)
            return mean * 1e6 ** (x.mean((1, 2, 3), keepdim=True) >= brightest), log_variance

    means = from_uint8(squares().images).mean((1, 2, 3))
    brightest, bad = means.max() - 1e-6, int(means.argmax())
    with pytest.raises(ValueError, match=rf"^autoencoder: the mean of image {bad} is not finite in float16"):
        encode(squares(), Wild(), tmp_path / "l", batch_size=4)
    encode(squares(), Wild(), tmp_path / "m", batch_size=4, dtype="float32")


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_ranks_encode_disjoint_parts_of_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 300)  # ten chunks
    encode(squares(), Encoder(), tmp_path / "one", batch_size=2)
    encoders = [Encoder(), Encoder(), Encoder()]

    def work(rank: int) -> None:
        encode(squares(), encoders[rank], tmp_path / "three", batch_size=2, rank=rank, world=3, patience=60)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert sorted(sum(e.batches) - 1 for e in encoders) == [15, 15, 20]


def test_a_rank_whose_peers_are_dead_gives_up_and_one_process_finishes_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 300)
    with pytest.raises(UserError, match=r"l: 5 of 10 chunks of other ranks are missing, and none came in 0 s"):
        encode(squares(), Encoder(), tmp_path / "l", rank=1, world=2, patience=0.3)
    rest = Encoder()
    encode(squares(), rest, tmp_path / "l")
    assert sum(rest.batches) == 26
    encode(squares(), Encoder(), tmp_path / "whole")
    assert content(tmp_path / "l") == content(tmp_path / "whole")


@pytest.mark.parametrize("what", ["latents", "images"])
def test_encoding_killed_at_ten_points_resumes_and_ends_with_the_same_bytes(what: str, tmp_path: Path) -> None:
    source = own_images.folder(tmp_path / "pets", {"cat": 9, "dog": 9})
    (source / "cat" / "004.png").write_bytes(b"broken")
    command = [sys.executable, "tests/kill_points.py", what, "10", str(tmp_path / "kept")]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *([str(source)] * (what == "images"))],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 10 and report["calls"] >= 30
    assert report["files"] == {"latents": 4, "images": 6}[what]
    assert report["wrong"] == []
    assert report["two at once"]


@pytest.mark.parametrize("name", ["mean.bin", "log_variance.bin", "labels.bin"])
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_chunk_is_named_and_encoded_again(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 300)
    folder = tmp_path / "l"
    encode(squares(), Encoder(), folder)
    whole = content(folder)
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 16
    (folder / name).write_bytes(data if how == "flip" else data[: len(data) * 3 // 4])
    capsys.readouterr()
    again = Encoder()
    encode(squares(), again, folder)
    assert content(folder) == whole
    assert f"warning: {folder / name}: damaged" in capsys.readouterr().out
    assert sum(again.batches) == 1 + (5 if how == "flip" else 20)  # the damaged chunks


def test_a_large_store_is_only_spot_checked_after_a_full_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 300)
    monkeypatch.setattr(store, "CHECKED_ALWAYS", 1000)
    data = encode(squares(), Encoder(), tmp_path / "l")
    assert (tmp_path / "l" / "checked.json").is_file()
    checked: list[int] = []
    real = store.zlib.crc32
    monkeypatch.setattr(store.zlib, "crc32", lambda data, *before: checked.append(len(data)) or real(data, *before))
    encode(squares(), Encoder(), tmp_path / "l")
    sampled = len(checked)
    (tmp_path / "l" / "mean.bin").write_bytes((tmp_path / "l" / "mean.bin").read_bytes())  # forces a full check
    encode(squares(), Encoder(), tmp_path / "l")
    assert 3 < sampled < 20 < len(checked) - sampled
    assert len(data) == 50


def latents(flip: bool = False) -> LatentSet:
    mean, log_variance = expected()
    return LatentSet(mean, log_variance, squares().labels, 5, 1.7, 0.25, *(expected(flip=True) if flip else ()))


def test_latent_batches_differ_from_image_batches_only_in_x0() -> None:
    pixels = ImageDataModule(squares(), squares(), 8, 3, endless=True)
    ours = LatentDataModule(latents(), latents(), 8, 3, endless=True)
    for a, b in islice(zip(pixels.train_dataloader(), ours.train_dataloader(), strict=False), 15):
        one, two = pixels.on_after_batch_transfer(a, 0), ours.on_after_batch_transfer(b, 0)
        assert one.keys() == two.keys() == {"x0", "label", "position", "first"}
        assert torch.equal(one["label"], two["label"]) and torch.equal(one["position"], two["position"])
        assert two["x0"].shape == (8, 3, 2, 2) and two["x0"].dtype == torch.float32


def drawn(data: LatentSet, seed: int = 3, batches: int = 13, **options: bool) -> dict[str, Tensor]:
    module = LatentDataModule(data, data, 8, seed, endless=True, **options)  # type: ignore[arg-type]
    found = [module.on_after_batch_transfer(b, 0) for b in islice(module.train_dataloader(), batches)]
    return {key: torch.cat([b[key] for b in found]) for key in found[0] if key != "first"}


def test_the_draw_depends_only_on_seed_and_position() -> None:
    data, batch = latents(), drawn(latents())
    index = LatentDataModule(data, data, 8, 3).train_dataloader().dataset.index(0, len(batch["position"]))  # type: ignore[attr-defined]
    noise = rng.normal(rng.key(3, "posterior"), batch["position"], (3, 2, 2))
    z = data.mean[index] + (data.log_variance[index] / 2).exp() * noise
    assert torch.allclose(batch["x0"], (z - 0.25) * 1.7, atol=1e-6)
    assert torch.equal(batch["x0"], drawn(latents())["x0"])
    # Position 0 and the same image an epoch later get different draws.
    later = int((index == index[0]).nonzero()[1])
    assert not torch.allclose(batch["x0"][0], batch["x0"][later])
    assert not torch.equal(batch["x0"], drawn(latents(), seed=4)["x0"])


def test_mirrored_latents_are_those_of_mirrored_images() -> None:
    data = latents(flip=True)
    plain, mixed = drawn(data)["x0"], drawn(data, flip=True)["x0"]
    mean, log_variance = expected(flip=True)
    other = dataclasses.replace(data, mean=mean, log_variance=log_variance)
    flipped = rng.uniform(rng.key(3, "flip"), torch.arange(104)) < 0.5
    assert 30 < int(flipped.sum()) < 74
    assert torch.equal(mixed, torch.where(flipped[:, None, None, None], drawn(other)["x0"], plain))


def test_a_data_set_on_the_device_gives_the_same_batches() -> None:
    for flip in (False, True):
        one = drawn(latents(flip=True), flip=flip)
        two = drawn(latents(flip=True), flip=flip, data_on_device=True)
        assert all(torch.equal(one[key], two[key]) for key in one)
