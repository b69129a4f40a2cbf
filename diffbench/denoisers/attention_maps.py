"""Attention maps of any network that uses torch's `scaled_dot_product_attention`.

The networks need no changes: inside a `with` block, every call of that function is intercepted, and the rows of chosen
tokens are recomputed from the same queries, keys and bias.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class AttentionMap:
    """The attention of chosen tokens in one layer during one forward pass."""

    layer: str
    """Name of the attending module, as in `named_modules`."""
    weights: Tensor
    """(B, heads, tokens, h, w) float32, attention to each cell of the layer's grid; NaN outside a token's window."""
    elsewhere: Tensor
    """(B, heads, tokens, E) float32, attention to tokens that are not part of the image, such as time and class."""
    places: tuple[tuple[int, int], ...]
    """Row and column of each chosen token in the layer's grid."""


@contextmanager
def record_attention(net: nn.Module, tokens: Sequence[tuple[int, int]]) -> Iterator[list[AttentionMap]]:
    """Record the attention of every layer: one map per layer for each forward pass inside the `with` block.

    `with record_attention(net, [(4, 4)]) as maps: net(x, t, y)` appends one map per layer to `maps`, in the order in
    which the layers run. Attention that is not from image to image (DiT's cross-attention to time and class) is not
    recorded. A sample's windows are assumed to be adjacent and row-major, and so are the tokens of a window.

    Args:
        net: a network (x, t, ...) -> output, not compiled.
        tokens: pixels (row, column) of the input; each selects the token that covers it.

    Raises:
        ValueError: during the forward pass, if a pixel is outside the image.
    """
    recorder = _Recorder(tokens)
    with ExitStack() as stack:
        for name, module in net.named_modules():
            stack.enter_context(module.register_forward_pre_hook(partial(recorder.enter, name)))
            stack.enter_context(module.register_forward_hook(recorder.leave, always_call=True))
        stack.enter_context(net.register_forward_pre_hook(recorder.start))
        stack.enter_context(recorder)
        yield recorder.maps


class _Recorder(TorchFunctionMode):
    """Mode that intercepts every call of a torch function; forward hooks tell it which module is calling."""

    def __init__(self, tokens: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.tokens = tokens
        self.maps: list[AttentionMap] = []
        self.inside: list[str] = []
        self.shape: Sequence[int] = ()

    def start(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.shape = arguments[0].shape
        for row, column in self.tokens:
            if not (0 <= row < self.shape[2] and 0 <= column < self.shape[3]):
                size = f"{self.shape[2]}x{self.shape[3]}"
                raise ValueError(f"tokens: the pixel {row},{column} is outside the {size} image")

    def enter(self, name: str, _module: nn.Module, _arguments: Any) -> None:
        self.inside.append(name)

    def leave(self, _module: nn.Module, _arguments: Any, _out: Any) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and self.inside:
            recorded = attention_map(self.inside[-1], self.shape, self.tokens, *args, **kwargs)
            self.maps.extend([] if recorded is None else [recorded])
        return func(*args, **kwargs)


@torch.no_grad()
def attention_map(
    layer: str,
    shape: Sequence[int],
    tokens: Sequence[tuple[int, int]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionMap | None:
    """Compute the map of one call of `scaled_dot_product_attention` from the call's arguments, without dropout.

    Args:
        shape: (B, C, H, W) of the network's input.
        tokens: pixels (row, column) of that input.
        query: (B * windows, heads, N, d).
        key: (B * windows, heads, M, d); any tokens beyond those of the window come first.
        attn_mask: bias, or a mask that is true where a query may attend, broadcast to (B * windows, heads, N, M).
        scale: factor of the dot products, by default 1 / sqrt(d).

    Returns:
        The map, or None if the queries or keys are not tokens of the image.
    """
    batch, (height, width) = shape[0], shape[2:]
    if query.ndim != 4 or len(query) % batch:
        return None
    windows, n = len(query) // batch, query.shape[2]
    grid = _grid(height, width, windows * n)
    image = math.prod(grid) // windows
    if key.shape[2] < image or (windows > 1 and math.isqrt(image) ** 2 * windows != math.prod(grid)):
        return None
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if is_causal:
        attn_mask = query.new_ones(n, key.shape[2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -math.inf)
    side = (math.isqrt(image), math.isqrt(image)) if windows > 1 else grid
    across = grid[1] // side[1]
    places = tuple((row * grid[0] // height, column * grid[1] // width) for row, column in tokens)
    weights = query.new_full((batch, query.shape[1], len(tokens), *grid), math.nan, dtype=torch.float32)
    extra = query.new_empty(batch, query.shape[1], len(tokens), key.shape[2] - image, dtype=torch.float32)
    bias = None if attn_mask is None else attn_mask.expand(len(query), query.shape[1], n, key.shape[2])
    for i, (row, column) in enumerate(places):
        top, left = row // side[0], column // side[1]
        window = torch.arange(batch, device=query.device) * windows + top * across + left
        token = n - image + row % side[0] * side[1] + column % side[1]
        logits = query[window, :, token, None].float() @ key[window].float().mT
        logits = logits[:, :, 0] * (query.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            logits = logits + bias[window, :, token].float()
        probabilities = logits.softmax(-1)
        extra[:, :, i] = probabilities[..., : key.shape[2] - image]
        rows, columns = slice(top * side[0], (top + 1) * side[0]), slice(left * side[1], (left + 1) * side[1])
        weights[:, :, i, rows, columns] = probabilities[..., key.shape[2] - image :].unflatten(-1, side)
    return AttentionMap(layer, weights.cpu(), extra.cpu(), places)


def _grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Return the finest grid with the image's aspect ratio that has at most `tokens` cells."""
    common = math.gcd(height, width)
    for factor in (f for f in range(1, common + 1) if common % f == 0):
        if height // factor * (width // factor) <= tokens:
            return height // factor, width // factor
    return 1, 1
