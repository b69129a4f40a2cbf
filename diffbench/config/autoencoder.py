"""The sections of an autoencoder's config: its network and its loss."""

from dataclasses import dataclass, field
from typing import Literal

from diffbench.autoencoders import KLConfig
from diffbench.core.errors import check_least


@dataclass
class NetworkConfig:
    """Sizes of an autoencoder that is trained here; its channels are the data's, its scale is found by training."""

    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Width of each level; n levels shrink a side 2^(n-1) times."""
    layers_per_block: int = 2
    norm_num_groups: int = 32
    """Groups of the group normalisation; must divide every width."""
    mid_block_add_attention: bool = True
    """Self-attention over all positions at the coarsest level."""

    def __post_init__(self) -> None:
        self.for_channels(1)

    def for_channels(self, channels: int) -> KLConfig:
        """The network for images of this many channels."""
        try:
            return KLConfig(channels, channels, scaling_factor=1.0, **vars(self))
        except ValueError as e:
            raise ValueError(f"network.{e}") from None


@dataclass
class LossConfig:
    """Sums over an image, as in latent diffusion: reconstruction + kl_weight * KL + perceptual_weight * perceptual."""

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6
    """0 makes a plain autoencoder, whose latents have no spread."""
    perceptual: str | None = None
    """An extractor whose features are compared too (their mean squared difference, times the pixels); null for none."""
    perceptual_weight: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, "loss", kl_weight=0, perceptual_weight=0)
