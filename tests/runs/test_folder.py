"""Run folders: names, refusals, the lock, and files that are never half written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from diffbench.config.kinds import RunConfig
from diffbench.config.load import load
from diffbench.core.errors import UserError
from diffbench.core.files import atomic, locked, write_text
from diffbench.runs.folder import check_place, claim_folder, folder_for, is_free, read_config, update_config

DIT = Path("experiments/digits/dit.yaml")


def folder(*overrides: str, path: Path = DIT) -> str:
    return str(folder_for(path, overrides, load(path, overrides)))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "runs/digits/dit-s0"),
        (["seed=3"], "runs/digits/dit-s3"),
        (["runs_dir=/else/where"], "/else/where/digits/dit-s0"),
        (["trainer.max_images=5"], "runs/digits/dit-s0"),
        (["data.num_workers=2"], "runs/digits/dit-s0"),
        (["tag=mine", "denoiser.depth=1"], "runs/digits/dit-mine-s0"),
        (["denoiser.depth=1"], "runs/digits/dit-depth_1-s0"),
        (["denoiser.depth=1", "optimizer.lr=0.5"], "runs/digits/dit-depth_1-lr_0.5-s0"),
        (["optimizer.lr=0.5", "denoiser.depth=1"], "runs/digits/dit-depth_1-lr_0.5-s0"),
        (["optimizer.lr=5e-1"], "runs/digits/dit-lr_0.5-s0"),
        (["ema.decays=[0.5,0.7]"], "runs/digits/dit-decays_0.5,0.7-s0"),
        (["process.steps=900"], "runs/digits/dit-process.steps_900-s0"),
        (["sample.steps=90"], "runs/digits/dit-s0"),
        (["evaluate.count=90", "trainer.log_images=640", "trainer.accelerator=cpu"], "runs/digits/dit-s0"),
        (["evaluate.every_images=640", "evaluate.best=fd"], "runs/digits/dit-s0"),
        (["denoiser.name=unet"], "runs/digits/dit-denoiser.name_unet-s0"),
        (["denoiser.name=unet", "denoiser.norm_groups=8"], "runs/digits/dit-denoiser.name_unet-norm_groups_8-s0"),
        (["denoiser.preset=DiT-S/2"], "runs/digits/dit-preset_DiT-S_2-s0"),
        (["init_from=runs/digits/dit-s1"], "runs/digits/dit-init_from_runs_digits_dit-s1-s0"),
        (["data.planted={0/1: [0, 1]}"], "runs/digits/dit-0_1_0,1-s0"),
        (["data.planted={v1.5: [0], both: [1]}"], "runs/digits/dit-v1.5_0-both_1-s0"),
        (["debug=smoke"], "runs/digits/dit-smoke-s0"),
        (["debug=smoke", "trainer.max_images=24"], "runs/digits/dit-smoke-s0"),
        (["debug=overfit", "tag=x"], "runs/digits/dit-overfit-x-s0"),
        (["debug=smoke", "denoiser.depth=1", "seed=2"], "runs/digits/dit-smoke-depth_1-s2"),
    ],
)
def test_the_folder_name_follows_from_the_overrides(overrides: list[str], name: str) -> None:
    assert folder(*overrides) == name


def test_an_override_that_changes_nothing_is_not_in_the_name() -> None:
    assert folder("denoiser.patch_size=2", "process.steps=1000") == "runs/digits/dit-s0"


def test_values_that_follow_from_the_images_are_not_in_the_name(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (40, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    path, data = Path("experiments/own/dit.yaml"), f"data.path={tmp_path}"
    plain = folder(data, path=path)
    assert plain == f"runs/own/dit-{tmp_path.name}-s0"
    assert folder(data, "data.channels=3", "data.image_size=32", "denoiser.preset=laptop", path=path) == plain
    assert folder(data, "data.channels=1", path=path) == f"runs/own/dit-{tmp_path.name}-channels_1-s0"


def test_long_tags_are_cut_and_stay_distinct() -> None:
    long = [f"init_from={'x' * 300}{end}" for end in "ab"]
    names = {Path(folder(argument)).name for argument in long}
    assert len(names) == 2
    assert all(len(name) < 120 for name in names)


def test_overrides_may_complete_a_file(tmp_path: Path) -> None:
    path = tmp_path / "raw.yaml"
    path.write_text("data: {name: digits}\n")
    assert folder("denoiser.name=dit", path=path) == f"runs/{tmp_path.name}/raw-denoiser.name_dit-s0"


def test_a_new_folder_gets_its_config_and_accepts_it_again(tmp_path: Path) -> None:
    config = load(DIT)
    assert not claim_folder(tmp_path, config)
    assert claim_folder(tmp_path, config)
    assert read_config(tmp_path) == config


def test_another_config_is_refused_and_the_keys_are_named(tmp_path: Path) -> None:
    claim_folder(tmp_path, load(DIT, ["denoiser.depth=2"]))
    saved = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        claim_folder(tmp_path, load(DIT, ["denoiser.depth=3", "optimizer.lr=0.5", "trainer.max_images=7"]))
    lr = load(DIT).optimizer.lr
    assert str(caught.value) == (
        f"{tmp_path}/config.yaml: this run was made with denoiser.depth=2 (now 3), optimizer.lr={lr} (now 0.5);"
        " choose another tag=NAME, or move the folder away"
    )
    assert (tmp_path / "config.yaml").read_bytes() == saved


def test_many_differences_are_counted(tmp_path: Path) -> None:
    claim_folder(tmp_path, load(DIT))
    with pytest.raises(UserError, match=r" and \d+ more; choose another tag"):
        claim_folder(tmp_path, load(DIT, ["denoiser.name=unet"]))


def test_a_changed_length_is_accepted_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_free("trainer.max_images")
    claim_folder(tmp_path, load(DIT, ["trainer.max_images=1000"]))
    longer = load(DIT, ["trainer.max_images=2000"])
    assert claim_folder(tmp_path, longer)
    assert read_config(tmp_path).trainer.max_images == 1000  # written only when the run continues
    update_config(tmp_path, longer)
    update_config(tmp_path, longer)
    assert capsys.readouterr().out == "trainer.max_images: 1,000 before, 2,000 now\n"
    assert read_config(tmp_path) == longer


def test_settings_that_do_not_affect_training_are_updated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim_folder(tmp_path, load(DIT, ["trainer.max_images=2000"]))
    now = load(DIT, ["trainer.max_images=1000", "sample.steps=90", "evaluate.count=40", "trainer.log_images=640"])
    assert claim_folder(tmp_path, now)
    update_config(tmp_path, now, complete=True)
    saved = read_config(tmp_path)
    assert (saved.sample.steps, saved.evaluate.count, saved.trainer.log_images) == ("90", 40, 640)  # type: ignore[attr-defined]
    assert saved.trainer.max_images == 2000  # the run already has this length
    assert capsys.readouterr().out == ""


def test_a_complete_run_keeps_its_in_training_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim_folder(tmp_path, load(DIT))
    now = load(DIT, ["evaluate.every_images=640", "evaluate.best=fd", "evaluate.count=40"])
    assert claim_folder(tmp_path, now)
    update_config(tmp_path, now, complete=True)
    assert capsys.readouterr().out == (
        "note: evaluate.every_images, evaluate.best: no effect, since training is complete; use diffbench evaluate\n"
    )
    saved = read_config(tmp_path)
    assert isinstance(saved, RunConfig)
    assert (saved.evaluate.every_images, saved.evaluate.best, saved.evaluate.count) == (None, None, 40)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError, match=r"contains metrics\.jsonl but no config\.yaml; move the folder away"):
        claim_folder(tmp_path, load(DIT))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl"]


def test_a_missing_run_is_reported_with_the_runs_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    claim_folder(tmp_path / "a", load(DIT))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path / "b")
    expected = f"{tmp_path}/b: no run here (config.yaml is missing); choose from {tmp_path}/a"
    assert str(caught.value) == expected
    for name in ("dit-s0", "unet-s0"):
        (tmp_path / "runs" / "digits" / name).mkdir(parents=True)
        claim_folder(tmp_path / "runs" / "digits" / name, load(DIT))
    with pytest.raises(UserError, match=r"; did you mean '.*/runs/digits/dit-s0'\?$"):
        read_config(tmp_path / "runs" / "digits" / "dti-s0")
    for wrong, line in (
        (tmp_path / "runs", f"no run here (config.yaml is missing); choose from {tmp_path}/a, {tmp_path}/runs/digits/"),
        (tmp_path / "a" / "config.yaml", "is a file, not a run folder"),
    ):
        with pytest.raises(UserError) as caught:
            read_config(wrong)
        assert str(caught.value).startswith(f"{wrong}: {line}")


def test_a_file_in_the_place_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_place(tmp_path / "new" / "run")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"^runs_dir: .*/file is a file, not a folder; choose another runs_dir"):
            check_place(place)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys; from pathlib import Path; from diffbench.core.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_locked_folder_is_refused_with_the_pid_and_free_after_a_kill(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError) as caught, locked(tmp_path):
        pass
    assert str(caught.value) == f"{tmp_path}: another command (pid {holder.pid}) is working on this run"
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    write_text(path, "old")

    def fail() -> None:
        with atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]
