"""Published networks have their published size: parameters exactly, multiply-accumulates to half a percent."""

import pytest
import torch

from diffbench.config.kinds import RunConfig
from diffbench.config.load import load
from diffbench.denoisers import DENOISERS, PRESETS, SegFormer, build
from diffbench.denoisers.flops import Cost, count

# Parameters and GMACs, counted on the official code (saved position tables included), or from the paper if only that
# states them. GMACs are compared to half a percent or to half a unit of the last digit here.
COUNTED = {
    "DiT-S/8": (33_148_160, "0.36"),
    "DiT-S/4": (32_945_024, "1.41"),
    "DiT-S/2": (32_963_360, "6.06"),
    "DiT-B/8": (130_881_536, "1.42"),
    "DiT-B/4": (130_475_648, "5.57"),
    "DiT-B/2": (130_512_416, "23.01"),
    "DiT-L/8": (458_594_816, "5.01"),
    "DiT-L/4": (458_053_760, "19.70"),
    "DiT-L/2": (458_102_816, "80.70"),
    "DiT-XL/8": (675_683_072, "7.39"),
    "DiT-XL/4": (675_074_432, "29.04"),
    "DiT-XL/2": (675_129_632, "118.62"),
    "DiT-XL/2-512": (676_014_368, "524.54"),
    "DiffiT-XL/2": (561_330_144, "118.5"),
    "ADM-64": (295_904_454, "109.7"),
    "ADM-128": (421_529_606, "306.9"),
    "ADM-256": (553_838_086, "1119.8"),
    "ADM-512": (558_997_638, "1982.3"),
    "DDPM++-CIFAR10": (55_733_891, "21.19"),
    "DDPM++-FFHQ64": (61_805_571, "41.87"),
    "U-ViT-S/2": (44_255_328, "12.20"),
    "U-ViT-S/4": (44_292_228, "12.21"),
    "U-ViT-M/4": (130_940_292, "35.24"),
    "U-ViT-L/4": (286_827_652, "76.47"),
    "U-ViT-L/2": (286_763_172, "76.46"),
    "U-ViT-H/2": (500_832_016, "133.20"),
    "U-ViT-L/4-512": (286_861_524, "76.48"),
    "U-ViT-H/4-512": (500_942_656, "133.23"),
}
# Networks with only a parameter count, and networks with only the paper's millions of parameters and Gflops.
PARAMETERS = {"ADM-256-uncond": 552_814_086, "DDPM++-CIFAR10-cond": 55_735_299, "LightningDiT-XL/1": 675_256_736}
ROUNDED = {
    "DiT-XL/2-in-context": (449, "119.37"),
    "DiT-XL/2-cross-attention": (598, "137.62"),
    "DiT-XL/2-adaln": (600, "118.56"),
    "DiffiT-XL/2-depth30": (601, "127.0"),
}
# SegFormer: parameters of the encoder, parameters and GMACs of the whole network with its decoder for 150 classes.
SEGMENTING = {
    "MiT-B0": (3_319_392, 3_752_694, "8.39"),
    "MiT-B1": (13_151_424, 13_715_798, "15.88"),
    "MiT-B2": (24_196_288, 27_461_974, "62.34"),
    "MiT-B3": (44_072_128, 47_337_814, "78.96"),
    "MiT-B4": (60_842_688, 64_108_374, "95.57"),
    "MiT-B5": (81_443_008, 84_708_694, "111.51"),
}
# Networks whose size no source states: our own counts, so that a change is noticed.
OURS = {
    "DiffiT-XL/2-512": 563_562_464,
    "LightningDiT-XL/2": 675_219_856,
    "SegFormer-S": 48_200_972,
    "SegFormer-B": 192_348_300,
    "DiffiT-CIFAR10-H1": 28_747_987,
    "DiffiT-CIFAR10-I1": 15_935_787,
    "DiffiT-FFHQ64-H1": 44_857_587,
    "DiffiT-FFHQ64-I1": 23_854_515,
}


def built(name: str) -> Cost:
    """Count the cost of a preset's network."""
    (entry,) = (entry for entry in DENOISERS.values() if name in entry.presets)
    config, shape = PRESETS[name].config, PRESETS[name].shape
    return count(lambda: entry.build(config, **shape), shape["channels"], shape["image_size"])


def close(gmacs: float, stated: str) -> bool:
    half_unit = 0.5 * 10.0 ** -len(stated.partition(".")[2])
    return abs(gmacs - float(stated)) <= max(0.005 * float(stated), half_unit)


def test_every_preset_is_checked() -> None:
    assert set(PRESETS) == set(COUNTED) | set(PARAMETERS) | set(ROUNDED) | set(OURS) | set(SEGMENTING)
    assert set(PRESETS) == {name for entry in DENOISERS.values() for name in entry.presets}


@pytest.mark.parametrize("name", PRESETS)
def test_the_stated_cost_equals_the_counted_one(name: str) -> None:
    assert built(name) == PRESETS[name].cost


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_and_gmacs_equal_the_official_code(name: str) -> None:
    cost, (parameters, gmacs) = PRESETS[name].cost, COUNTED[name]
    assert cost.parameters == parameters
    assert close(cost.gmacs, gmacs)


@pytest.mark.parametrize("name", SEGMENTING)
def test_segformer_has_its_published_size(name: str) -> None:
    preset, (encoder, whole, gmacs) = PRESETS[name], SEGMENTING[name]
    with torch.device("meta"):
        net = SegFormer(preset.config, **preset.shape)
    assert sum(p.numel() for p in net.stages.parameters()) == encoder
    assert sum(p.numel() for p in net.parameters()) == whole
    assert preset.cost.parameters == whole  # without the running statistics of batch norm
    assert close(preset.cost.gmacs, gmacs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_the_official_code(name: str) -> None:
    assert PRESETS[name].cost.parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_sizes_equal_the_paper(name: str) -> None:
    cost, (millions, gmacs) = PRESETS[name].cost, ROUNDED[name]
    assert int(cost.parameters / 1e6) == millions
    assert close(cost.gmacs, gmacs)


@pytest.mark.parametrize("name", OURS)
def test_sizes_that_no_source_states_do_not_change(name: str) -> None:
    assert PRESETS[name].cost.parameters == OURS[name]


def test_ddpmpp_without_its_augmentation_input_has_its_published_size() -> None:
    assert PRESETS["DDPM++-CIFAR10"].cost.parameters - 9 * 128 == 55_732_739
    assert PRESETS["DDPM++-FFHQ64"].cost.parameters - 9 * 128 == 61_804_419


def test_the_two_readings_of_diffits_image_networks_differ_only_in_blocks() -> None:
    for data in ("CIFAR10", "FFHQ64"):
        first, second = (vars(PRESETS[f"DiffiT-{data}-{reading}"].config) for reading in ("H1", "I1"))
        assert {key for key in first if first[key] != second[key]} == {"blocks"}


@pytest.mark.parametrize(
    ("folder", "channels", "side"), [("digits", 1, 8), ("digits-latent", 1, 4), ("cifar10", 3, 32)]
)
@pytest.mark.parametrize("name", ["uvit", "segformer"])
def test_experiments_of_a_folder_have_similar_costs(folder: str, channels: int, side: int, name: str) -> None:
    def macs(name: str) -> int:
        c = load(f"experiments/{folder}/{name}.yaml")
        assert isinstance(c, RunConfig)
        shape = {"image_size": side, "channels": channels, "num_classes": 10}
        return count(lambda: build(c.denoiser.name, c.denoiser, **shape), channels, side).macs

    assert macs(name) == pytest.approx(macs("dit"), rel=0.1)


def test_every_preset_names_its_source() -> None:
    assert PRESETS["DiT-S/2"].source == "DiT, Table 4: 33M, 6.06"
    assert all(preset.source and "\n" not in preset.source for preset in PRESETS.values())
