"""Full disks and damaged files: one line names the file, intact files stay, and the same command resumes."""

import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import cut, flip, full_for
from own_images import Encoder, pixels, png, squares

from diffbench.autoencoders import KLAutoencoder, KLConfig
from diffbench.autoencoders import io as files
from diffbench.core import tensors as sealed
from diffbench.core.errors import UserError
from diffbench.core.files import atomic, write_text
from diffbench.data.latents import encode
from diffbench.data.transforms import BrokenError, decode
from diffbench.evaluation import records
from diffbench.runs import evaluate
from diffbench.runs.lifecycle import load, train
from diffbench.training.checkpoint import newest

DIT = "experiments/digits/dit.yaml"
TINY = [
    "trainer.batch_size=8",
    "trainer.max_images=64",  # 8 steps
    "trainer.log_images=16",
    "trainer.checkpoint_images=32",
    "trainer.validate_images=32",
    "trainer.sample_images=32",
    "evaluate.every_images=32",
    "evaluate.every_count=20",
    "evaluate.count=20",
    "evaluate.best=fd",
    "ema.decays=[0.9]",
    "data.held_out=40",
    "sample.steps='2'",
    "denoiser.hidden_size=16",
    "denoiser.depth=1",
    "denoiser.num_heads=2",
    "tag=run",
]
DAMAGE = pytest.mark.parametrize("damage", [flip, cut])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test may modify."""
    return Path(train(DIT, [*TINY, f"runs_dir={tmp_path_factory.mktemp('whole')}"]).folder)


def same(a: Path, b: Path) -> bool:
    """Return whether two runs ended with the same averages and best weights."""
    for name in ("ema-0.9.safetensors", "best.safetensors"):
        (one, facts), (other, other_facts) = sealed.read(a / name), sealed.read(b / name)
        if facts != other_facts or not all(torch.equal(one[key], other[key]) for key in one | other):
            return False
    return True


@pytest.mark.parametrize(
    ("pattern", "named", "room", "left"),
    [
        (r"step-8\.ckpt\.staged", "checkpoints/step-8.ckpt", r"[\d,]{6,} more bytes", 4),
        (r"step-8\.ckpt\.sha256", "checkpoints/step-8.ckpt.sha256", "78 more bytes", 4),
        (r"metrics\.jsonl", "metrics.jsonl", r"\d+ more bytes", None),
        (r"tfevents", "events.out.tfevents", "more bytes", None),
        (r"images-\d+\.png", "samples/images-000000032.png", r"more than \d+ bytes", None),
        (r"best\.safetensors", "best.safetensors", r"[\d,]+ more bytes", None),
        (r"ema-0\.9\.safetensors", "ema-0.9.safetensors", r"[\d,]+ more bytes", 8),
    ],
)
def test_a_full_disk_in_training(
    pattern: str, named: str, room: str, left: int | None, whole: Path, tmp_path: Path
) -> None:
    folder, argv = tmp_path / "digits" / "dit-run-s0", [*TINY, f"runs_dir={tmp_path}"]
    with full_for(pattern), pytest.raises(UserError) as caught:
        train(DIT, argv)
    line = rf"{re.escape(str(folder / named))}: no room for {room} \(No space left on device\); make room, then .*"
    assert re.fullmatch(line, str(caught.value))
    state = newest(folder / "checkpoints")
    assert state == (folder / "checkpoints" / f"step-{left}.ckpt" if left else None)
    train(DIT, argv)
    assert same(folder, whole)
    assert [p for p in folder.rglob(".*") if p.name != ".lock"] == []


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"chunk-0+\.json", r".*/evaluations/\w+/chunk-0+\.json"),
        (r"manifest\.json", r".*/evaluations/\w+/manifest\.json"),
        (r"nearest\.png", r".*/evaluations/\w+/nearest\.png"),
        (r"results\.jsonl", r".*/results\.jsonl"),
    ],
)
def test_a_full_disk_in_scoring(pattern: str, named: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    with full_for(pattern), pytest.raises(UserError, match=rf"^{named}: no room for .*\d+ (more )?bytes"):
        evaluate.evaluate(load(folder))
    assert records.results(folder) == []
    plain, guided = evaluate.evaluate(load(folder))
    assert records.results(folder) == [plain, guided] and plain["fd/digits-cnn@20"] > 0


def limited(call: Callable[[], Any], size: int) -> str:
    """Return the error message of a call while no file may be larger than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(UserError) as caught:
            call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return str(caught.value)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    message = limited(lambda: encode(squares(100), Encoder(), folder), 2_000)
    assert re.fullmatch(rf"{folder}/\w+\.bin: no room for [\d,]+ more bytes \(File too large\); make room, .*", message)
    encode(squares(100), Encoder(), folder)
    encode(squares(100), Encoder(), tmp_path / "unbroken")
    assert (folder / "mean.bin").read_bytes() == (tmp_path / "unbroken" / "mean.bin").read_bytes()

    path = tmp_path / "state"
    write_text(path, "before")

    def stream() -> None:
        with atomic(path) as file:
            torch.save({"w": torch.zeros(10_000)}, file)

    assert re.match(rf"{path}: no room for more than [\d,]+ bytes \(File too large\)", limited(stream, 20_000))
    assert path.read_text() == "before" and [p.name for p in tmp_path.glob("state*")] == ["state"]


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run where its training command finds it."""
    yield Path(shutil.copytree(whole, tmp_path / "digits" / whole.name))


@DAMAGE
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(
    damage: Callable[[Path], None], copied: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = copied / "checkpoints" / "step-8.ckpt"
    damage(state)
    argv = [*TINY, f"runs_dir={tmp_path}"]
    train(DIT, argv)
    out = capsys.readouterr().out
    assert f"warning: {state} is damaged (its checksum differs): trying the previous one\n" in out
    assert "resuming at 32 images" in out
    assert same(copied, whole)


@DAMAGE
@pytest.mark.parametrize("name", ["ema-0.9.safetensors", "best.safetensors"])
def test_damaged_weights_are_never_used(name: str, damage: Callable[[Path], None], copied: Path) -> None:
    damage(copied / name)
    line = rf"^{re.escape(str(copied / name))}: damaged \(.*\); remove it"
    with pytest.raises(UserError, match=line):
        load(copied) if name.startswith("ema") else load(copied).use_best()


def test_every_damaged_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"w": torch.arange(3.0), "n": torch.tensor(5)}
    sealed.write(path, tensors, {"images": "5"})
    found, facts = sealed.read(path)
    assert facts == {"images": "5"} and all(torch.equal(found[k], tensors[k]) for k in tensors)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            found, facts = sealed.read(path)
        except UserError as e:
            assert str(e).startswith(f"{path}: damaged (")
            continue
        # Only flips in the hash's name and in the header's padding go unnoticed, and they change no value.
        assert facts["images"] == "5" and all(torch.equal(found[k], tensors[k]) for k in tensors)


@DAMAGE
def test_a_damaged_autoencoder_is_never_used(damage: Callable[[Path], None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = KLAutoencoder(KLConfig(1, 1, 2, [8], 1, norm_num_groups=4))
    files.save(net, tmp_path)
    assert files.load(tmp_path).fingerprint == net.fingerprint
    damage(tmp_path / files.WEIGHTS)
    with pytest.raises(ValueError, match=rf"^{tmp_path / files.WEIGHTS}: (damaged|not valid safetensors): "):
        files.load(tmp_path)


def test_every_damaged_byte_of_a_png_is_found() -> None:
    whole = png(pixels(3))
    right = decode(whole, 8, 3)[0]
    found = 0
    for i in range(len(whole)):
        try:
            assert (decode(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :], 8, 3)[0] == right).all()
        except BrokenError:
            found += 1
    assert found > 0.9 * len(whole)
