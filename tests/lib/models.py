"""Models of torch.nn alone, as their authors write them: nothing in them knows of ranks."""

# pyright: standard

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, padding_mode="circular")
        self.norms = nn.ModuleList(nn.GroupNorm(2, outside) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(x)))


class UNet(nn.Module):
    """Two levels, pools that overlap, a transposed convolution, resampling to a skip's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(2, 4), Block(4, 6), Block(6, 8)])
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.join = nn.ModuleList([Block(12, 6), Block(10, 4)])
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.max_pool2d(b, 3, 2, 1))
        y = self.up(c)
        if y.shape != b.shape:
            y = F.interpolate(y, size=b.shape[2:], mode="bilinear", align_corners=False)
        y = self.join[0](torch.cat([y, b], 1))
        y = self.join[1](torch.cat([F.interpolate(y, size=a.shape[2:]), a], dim=1))
        return self.last(y) + x


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _ in range(2))
        self.skip = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        y = self.norms[1](self.second(y))
        y += self.skip(x)
        return F.gelu(y)


class ResNet(nn.Module):
    """A stem of stride 2, batch norms in training, a head over the mean of the field."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.Sequential(Residual(4, 4, 1), Residual(4, 6, 2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))


class ViT(nn.Module):
    """Patches, positions, two kinds of attention, an MLP, and patches put back into a field."""

    def __init__(self, rows: int, columns: int, patch: int = 2, width: int = 8) -> None:
        super().__init__()
        self.k = patch
        self.patch = nn.Conv2d(2, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(1, (rows // patch) * (columns // patch), width) * 0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, 2 * patch * patch)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, rows, columns = x.shape
        t = self.patch(x)
        h, w = t.shape[-2:]
        t = t.flatten(2).transpose(1, 2) + self.positions
        q, k, v = self.qkv(self.norms[0](t)).reshape(batch, h * w, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, h * w, -1)
        t = t + self.out(y)
        t = t + self.mlp(self.norms[1](t))
        t = t + self.attention(t, t, t, need_weights=False)[0]
        t = self.head(t).reshape(batch, h, w, self.k, self.k, 2)
        return torch.einsum("nhwpqc->nchpwq", t).reshape(batch, 2, rows, columns)
