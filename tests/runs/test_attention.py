"""The figure of attention over time: what is noised, which layers and times are shown, and where it is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diffbench
from diffbench.autoencoders import KLAutoencoder, KLConfig
from diffbench.autoencoders import io as files
from diffbench.cli import main
from diffbench.reports.attention import AttentionConfig, attention, attention_figure, noise_levels
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(finished: Path) -> DenoiserRun:
    return diffbench.load(finished)


def test_levels_go_from_noise_to_image_within_the_range_of_all_runs(run: DenoiserRun) -> None:
    assert noise_levels([run], 5) == [-10, -5, 0, 5, 10]  # the limits; the schedule reaches further
    assert noise_levels([run], [4.0, -4.0]) == [-4.0, 4.0]


def test_maps_are_those_of_the_noised_held_out_image(run: DenoiserRun) -> None:
    levels, (found,) = attention([run], AttentionConfig(times=[-4.0, 0.0, 4.0], tokens=[[0, 0], [3, 6]], image=7))
    assert levels == [-4.0, 0.0, 4.0]
    assert torch.allclose(run.process.log_snr(found.times), torch.tensor(levels, dtype=torch.float64))
    assert [m.layer for m in found.maps] == ["blocks.0", "blocks.2", "blocks.4"]
    assert all(m.weights.shape == (3, 4, 2, 4, 4) for m in found.maps)
    # All levels share one noise, so two of them determine the third.
    alpha, sigma = run.process.alpha_sigma(found.times, found.noisy.double())
    system = torch.cat([alpha[:2].flatten()[:, None], sigma[:2].flatten()[:, None]], dim=1)
    image, noise = torch.linalg.solve(system, found.noisy[:2].double().flatten(1))
    assert torch.allclose(
        alpha[2].item() * image + sigma[2].item() * noise, found.noisy[2].double().flatten(), atol=1e-5
    )
    assert torch.allclose(image, (run.held_out.images[7].double() / 127.5 - 1).flatten(), atol=1e-5)
    again = attention([run], AttentionConfig(times=[4.0], tokens=[[3, 6]], image=7))[1][0]
    assert torch.allclose(again.maps[1].weights[0, :, 0], found.maps[1].weights[2, :, 1], atol=1e-6)


def test_chosen_layers_are_shown_in_network_order(run: DenoiserRun) -> None:
    found = attention([run, run], AttentionConfig(layers=["blocks.3", "blocks.1"], times=2))[1]
    assert [[m.layer for m in a.maps] for a in found] == 2 * [["blocks.1", "blocks.3"]]


def test_the_figure_has_a_panel_per_run_a_row_per_token_and_a_column_per_time(run: DenoiserRun) -> None:
    config = AttentionConfig(layers=["blocks.0", "blocks.4"], times=3, tokens=[[0, 0], [7, 7]])
    levels, found = attention([run, run, run], config)
    figure = attention_figure(levels, found)
    panels = [panel for half in figure.subfigs[:1] for panel in half.subfigs]
    assert [len(panel.axes) for panel in panels] == [(1 + 2 * 2) * 3] * 3 + [0]
    assert [axis.get_ylabel() for axis in panels[0].axes[::3]] == [
        "input",
        "blocks.0\npixel 0,0",
        "blocks.0\npixel 7,7",
        "blocks.4\npixel 0,0",
        "blocks.4\npixel 7,7",
    ]
    assert [axis.get_xlabel() for axis in panels[0].axes[-3:]] == [f"{level:.1f}" for level in levels]
    assert panels[0].get_suptitle() == "dit-smoke-s0 (dit)"


def test_the_command_writes_a_png_and_tensorboard(smoke_run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["attention", str(smoke_run), str(smoke_run), "times=2", "layers=[blocks.0]"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == smoke_run / "samples" / "attention-000000016.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert pixels.std() > 10
    events = EventAccumulator(str(smoke_run / "attention"))
    events.Reload()
    assert events.Tags()["images"] == ["attention/attention-000000016"]
    assert {event.step for event in events.Images("attention/attention-000000016")} == {16}
    before = path.read_bytes()
    mine = tmp_path / "mine.jpg"
    assert main(["attention", str(smoke_run), "times=1", f"out={mine}"]) == 0
    with Image.open(mine) as image:
        assert image.format == "JPEG"
    capsys.readouterr()
    assert main(["attention", str(smoke_run), "times=1"]) == 0
    assert Path(capsys.readouterr().out.strip()) == path.with_stem(f"{path.stem}-2")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("layers=[blocks.9]", "layers: no run has an attention layer blocks.9; choose from blocks.0, blocks.1, blocks.2, blocks.3, blocks.4; did you mean "),  # noqa: E501
        ("layers=[]", "layers: must list at least one, or be null, got []"),
        ("tokens=[[8,1]]", "tokens: the pixel 8,1 is outside the 8x8 image"),
        ("tokens=[[1]]", "tokens: must be a list of pixels such as [[4, 4], [0, 7]], got [[1]]"),
        ("times=0", "times: must be at least 1, or a list of log-SNRs, got 0"),
        ("times=[60]", "times: log-SNR must lie in -19.84 to 10.09 for this process, got [60.0]"),
        ("image=360", "image: 360 is not one of the 360 held-out images of "),
        ("picture=3", "picture: unknown key; allowed: layers, tokens, times, image, out"),
    ],
)  # fmt: skip
def test_unknown_layers_pixels_and_keys_are_refused(finished: Path, argument: str, line: str, capsys: Capture) -> None:
    assert main(["attention", str(finished), argument]) == 2
    assert capsys.readouterr().err.startswith(f"error: command line: {line}")


def test_a_missing_run_or_an_existing_output_file_is_refused(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["attention", "times=3"]) == 2
    assert capsys.readouterr().err.startswith("error: command line: name run folders, e.g. runs/digits/dit-s0")
    existing = tmp_path / "there.png"
    existing.write_bytes(b"mine")
    assert main(["attention", str(finished), f"out={existing}"]) == 2
    assert capsys.readouterr().err == f"error: command line: out: {existing} already exists; choose another name\n"
    assert existing.read_bytes() == b"mine"


def test_attention_works_in_latent_space_too(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        files.save(KLAutoencoder(KLConfig(1, 1, 4, [4, 4], 1, 2)), tmp_path / "autoencoder")
    overrides = ["debug=smoke", f"autoencoder={tmp_path / 'autoencoder'}", f"runs_dir={tmp_path}"]
    latent = train("experiments/digits/dit.yaml", overrides)
    levels, (found,) = attention([latent], AttentionConfig(times=[-2.0, 9.0], image=3, tokens=[[2, 0]]))
    assert found.noisy.shape == (2, 4, 4, 4)
    assert found.maps[0].weights.shape == (2, 4, 1, 2, 2)
    mean, _ = latent.autoencoder.encode(latent.held_out.images[3:4].float() / 127.5 - 1)
    clean = latent.autoencoder.scaled(mean)[0]
    assert (found.noisy[1] - clean).abs().max() < 0.1 < (found.noisy[0] - clean).abs().max()
    attention_figure(levels, [found])
