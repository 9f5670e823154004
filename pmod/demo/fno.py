"""A Fourier neural operator whose fields are spread over a mesh ("data", "space"): the parallel part of the demo.

The batch is sharded over "data", the rows of each field over "space". What acts point by point is local; the Fourier
transform needs whole columns, which `pmod.all_to_all` brings together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmod


def even_sizes(n: int, axis: str = "space") -> list[int]:
    """n things shared out along an axis, the shares as equal as can be: no rank has none, as FFTs want it."""
    ranks = pmod.axis_size(axis)
    return [(n + rank) // ranks for rank in reversed(range(ranks))]


class SpectralConv(nn.Module):
    """Multiply the lowest Fourier modes of a field by learned matrices: a convolution as wide as the domain."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        # complex matrices as pairs of reals, so that all gradients have one dtype and travel in one message
        self.weight = nn.Parameter(torch.randn(2 * modes, modes, channels, channels, 2) / channels**1.5)

    def forward(self, x: Tensor, height: int) -> Tensor:
        """V -> V. x (batch, channels, rows of this rank, width), `height` the rows of all ranks."""
        modes, width = self.weight.shape[1], x.shape[-1]
        rows, columns = even_sizes(height), even_sizes(modes)
        kept = torch.arange(-modes, modes, device=x.device) % height
        weight = self.weight.split(columns, dim=1)[pmod.axis_index("space")]

        x = torch.fft.rfft(x, dim=-1)[..., :modes]
        x = pmod.all_to_all(x, "space", split_dim=-1, concat_dim=-2, split_sizes=columns, concat_sizes=rows)
        low = torch.fft.fft(x, dim=-2).index_select(-2, kept)
        low = torch.einsum("bihw,hwio->bohw", low, torch.view_as_complex(weight))
        x = torch.fft.ifft(torch.zeros_like(x).index_copy(-2, kept, low), dim=-2)
        x = pmod.all_to_all(x, "space", split_dim=-2, concat_dim=-1, split_sizes=rows, concat_sizes=columns)
        return torch.fft.irfft(x, n=width, dim=-1)


class FNO(nn.Module):
    """Map the medium to the pressure, both scaled to mean 0 and deviation 1."""

    def __init__(self, channels: int, modes: int, layers: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, channels, 1)
        self.spectral = nn.ModuleList(SpectralConv(channels, modes) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(layers))
        self.hidden = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, 1, 1)

    def forward(self, a: Tensor, height: int) -> Tensor:
        """V -> V. a (batch, rows of this rank, width) -> the same shape."""
        down, across = (torch.linspace(0, 1, n, dtype=a.dtype, device=a.device) for n in (height, a.shape[-1]))
        down = pmod.shard(down, "space", sizes=even_sizes(height))
        x = self.lift(torch.stack([a, down[:, None].expand_as(a), across.expand_as(a)], dim=1))
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x, height) + local(x))
        return self.project(F.gelu(self.hidden(x))).squeeze(1)


def relative_errors(prediction: Tensor, truth: Tensor) -> Tensor:
    """|prediction - truth| / |truth| of each sample, both norms over the rows of all ranks. V -> I along "space"."""
    squares = (prediction - truth).square().sum((1, 2)), truth.square().sum((1, 2))
    wrong, whole = pmod.psum(squares, "space")
    return (wrong / whole).sqrt()


def loss(model: FNO, a: Tensor, y: Tensor, height: int) -> Tensor:
    """The mean relative error over the batches of all ranks. V -> I: backward() gives each rank the whole gradient."""
    held: dict[str, Tensor] = dict(model.named_parameters())
    parameters = pmod.pvary(held, ("data", "space"))
    prediction = torch.func.functional_call(model, parameters, (a, height))
    return pmod.pmean(relative_errors(prediction, y).mean(), "data")
