"""A classifier of noisy images, for classifier guidance: the encoder half of the U-Net (Dhariwal & Nichol 2021, §4)."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from diffbench.denoisers.base import check_divides, check_sides, check_sizes, unet_levels
from diffbench.denoisers.layers import ConditionEmbedding, GroupNorm, TimeFeatures
from diffbench.denoisers.unet import ResBlock, Stage, UNetConfig


@dataclass
class ClassifierConfig:
    """Sizes of the classifier, named as in `UNetConfig`."""

    model_channels: int = 32
    """Base width, multiplied by `channel_mult` at each level."""
    channel_mult: list[float] = field(default_factory=lambda: [1, 2])
    """One factor per level; the resolution halves between levels."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    attention_resolutions: list[int] = field(default_factory=list)
    """Resolutions (pixels of the longer side) at which attention follows each residual block."""
    num_heads: int = 4
    dropout: float = 0.0
    norm_groups: int = 8
    """Groups of the group normalisation; must divide every level's width."""
    time_features: TimeFeatures = "sinusoidal"

    def __post_init__(self) -> None:
        numbers = ("model_channels", "channel_mult", "num_res_blocks", "num_heads", "norm_groups")
        check_sizes(self, *numbers, section="classifier")


class NoisyClassifier(nn.Module):
    """A classifier of noisy images (B, C, H, W).

    Args:
        config: sizes.
        image_size: side of a square input, or height and width.
        channels: input channels C.
        num_classes: number of classes, labelled 0..num_classes-1.

    Raises:
        ValueError: if the levels do not divide the image, or heads or norm groups do not divide a level's width.
    """

    def __init__(
        self, config: ClassifierConfig, image_size: int | tuple[int, int], channels: int, num_classes: int
    ) -> None:
        super().__init__()
        widths, attended, longer = unet_levels(config, image_size, "classifier")
        self.channels, self.divisor = channels, 2 ** (len(widths) - 1)
        emb = 4 * config.model_channels
        self.condition = ConditionEmbedding(emb, config.model_channels, 0, False, config.time_features)
        unet = UNetConfig(dropout=config.dropout, norm_groups=config.norm_groups)
        width = widths[0]
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList()
        for level, c in enumerate(widths):
            size = longer >> level
            heads = config.num_heads if size in attended else None
            check_divides("norm_groups", config.norm_groups, c, "a level's width", "classifier")
            if heads is not None:
                check_divides("num_heads", heads, c, "a width with attention", "classifier")
            if level:
                self.encoder.append(ResBlock(unet, width, width, emb, direction="down"))
            for _ in range(config.num_res_blocks):
                self.encoder.append(Stage(unet, width, c, emb, heads, size))
                width = c
        self.norm = GroupNorm(config.norm_groups, width, eps=1e-5)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return logits (B, num_classes) for noisy images x (B, C, H, W), scaled as for a denoiser, at times t (B,).

        Labels y are ignored; the parameter allows it to be called like a denoiser.
        """
        check_sides(x, self.channels, self.divisor)
        c = nn.functional.silu(self.condition(t, None))
        h = self.stem(x)
        for layer in self.encoder:
            h = layer(h, c)
        pooled = nn.functional.silu(self.norm(h)).mean(dim=(2, 3))
        return self.head(pooled)
