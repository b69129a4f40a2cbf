"""The KL autoencoder of latent diffusion (Rombach et al. 2022): images to a Gaussian over latents, and back.

Its state dict has the same keys as that of diffusers' `AutoencoderKL`, so published weights load unchanged
(`io.py` reads and writes that format). Config keys have the names of diffusers' config too.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

EPS = 1e-6


@dataclass
class KLConfig:
    """Sizes and options, named as in diffusers. The defaults are Stable Diffusion's: 83,653,863 parameters."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Width of each level; the resolution halves between levels, so n levels divide each side by 2^(n-1)."""
    layers_per_block: int = 2
    """Residual blocks per level in the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    """Self-attention over all positions at the coarsest level."""
    use_quant_conv: bool = True
    """A 1x1 convolution on the moments."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution on the latents before the decoder."""
    scaling_factor: float = 0.18215
    """Denoisers see (latent - shift_factor) * scaling_factor, which has unit variance."""
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        counts = {"in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"}
        for name in sorted(counts):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not self.block_out_channels:
            raise ValueError("block_out_channels: must contain the width of at least one level")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: norm_num_groups={self.norm_num_groups} must divide every width, got {width}"
                )
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor: must be positive, got {self.scaling_factor}")

    @property
    def factor(self) -> int:
        """The factor by which the encoder shrinks each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of the latents of (C, H, W) images; raise ValueError if these do not fit."""
        channels, *sides = shape
        if channels != self.in_channels or len(sides) != 2 or any(side % self.factor for side in sides):
            wanted = f"{self.in_channels} channels and sides divisible by {self.factor}"
            raise ValueError(f"this autoencoder takes {wanted}, got {'x'.join(map(str, shape))}")
        return self.latent_channels, sides[0] // self.factor, sides[1] // self.factor


class KLAutoencoder(nn.Module):
    """Encoder and decoder, which work on unscaled latents; see `encode` and `decode`.

    `scaled` converts these to the latents of unit variance that denoisers see; `unscaled` converts back.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config, latent = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as the mean and log-variance of a Gaussian over latents.

        Args:
            x: (B, C, H, W) in [-1, 1], sides divisible by `config.factor`.

        Returns:
            Mean and log-variance, (B, latent_channels, H / factor, W / factor) each; the log-variance is in [-30, 20].

        Raises:
            ValueError: if channels or sides do not fit.
        """
        self.config.latent_shape(tuple(x.shape[1:]))
        moments = self.encoder(x)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Decode unscaled latents (B, latent_channels, h, w) to images (B, C, factor h, factor w), about [-1, 1]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a hash of all weights and their names, but not of scale and shift."""
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()[:16]

    def scaled(self, z: Tensor) -> Tensor:
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscaled(self, z: Tensor) -> Tensor:
        return z / self.config.scaling_factor + self.config.shift_factor

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct images (B, C, H, W) from the mean, or from a sample with `noise`; return also the moments."""
        mean, log_variance = self.encode(x)
        z = mean if noise is None else sample(mean, log_variance, noise)
        return self.decode(z), mean, log_variance


def sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Sample the Gaussian as mean + std * noise, through which gradients flow (Kingma & Welling 2014)."""
    return torch.addcmul(mean, (0.5 * log_variance).exp(), noise)


@torch.no_grad()
def remove_variance_(net: KLAutoencoder) -> None:
    """Fix the log-variance at its minimum, -30, for all images, which gives a plain autoencoder."""
    last = net.encoder.conv_out if net.quant_conv is None else net.quant_conv
    assert last.bias is not None
    last.weight[net.config.latent_channels :] = 0
    last.bias[net.config.latent_channels :] = -30


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) in nats, summed over all dimensions but the batch: (B, ...) to (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class Encoder(nn.Module):
    """Encoder: images (B, C, H, W) to moments (B, 2 latent_channels, H / factor, W / factor), before `quant_conv`."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(before, width, config.layers_per_block, groups, "down" if i < len(widths) - 1 else None)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.mid_block = Middle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Decoder: latents (B, latent_channels, h, w), after `post_quant_conv`, to images (B, C, factor h, factor w)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(before, width, config.layers_per_block + 1, groups, "up" if i < len(widths) - 1 else None)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(silu(self.conv_norm_out(h)))


class Downsample(nn.Module):
    """Downsampling by 2: zero padding on the right and at the bottom, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Upsampling by 2: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks at one resolution, then the step "down" or "up" to the next, if any."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, step: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if step == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if step == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, channels: int, groups: int, attend: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attend else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class ResBlock(nn.Module):
    """GN, SiLU, conv3x3, twice, plus a skip: identity, or a 1x1 convolution if the channels change."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all positions, plus a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = self.to_out[0](scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])
