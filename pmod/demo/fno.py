"""A Fourier neural operator on fields that are spread over a mesh ("data", "space").

The batch is sharded over "data", the rows of each field over "space", any number of
them over any number of ranks. What acts point by point is local; the Fourier transforms
are `pmod.fft`'s, which send the kept modes only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmod


class SpectralConv(nn.Module):
    """A product of a field's lowest Fourier modes with learned matrices.

    It is a convolution as wide as the domain.
    """

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        # complex matrices as pairs of reals, so that all gradients have one dtype and
        # travel in one message
        self.weight = nn.Parameter(
            torch.randn(2 * modes, modes, channels, channels, 2) / channels**1.5
        )

    def forward(self, x: Tensor, height: int) -> Tensor:
        """V -> V. x (batch, channels, rows of this rank, width), `height` the rows of
        all ranks.
        """
        kept, ranks = self.weight.shape[:2], pmod.axis_size("space")
        rows, columns = (pmod.split_sizes(n, ranks) for n in (height, kept[1]))
        weight = self.weight.split(columns, dim=1)[pmod.axis_index("space")]
        # each rank gets whole columns of the spectrum: the product needs no message
        low = pmod.fft.rfft2(x, axis="space", sizes=rows, modes=kept)
        low = torch.einsum("bihw,hwio->bohw", low, torch.view_as_complex(weight))
        return pmod.fft.irfft2(
            low, s=(height, x.shape[-1]), axis="space", sizes=columns, modes=kept
        )


class Pointwise(nn.Conv2d):
    """The same linear map of the channels at every point.

    The field may have no rows, which torch's own convolution refuses.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 1)

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        return (
            torch.einsum("bihw,oi->bohw", input, self.weight[..., 0, 0])
            + self.bias[:, None, None]
        )


class FNO(nn.Module):
    """A map from the medium to the pressure, both scaled to mean 0 and deviation 1."""

    def __init__(self, channels: int, modes: int, layers: int) -> None:
        super().__init__()
        self.lift = Pointwise(3, channels)
        self.spectral = nn.ModuleList(
            SpectralConv(channels, modes) for _ in range(layers)
        )
        self.local = nn.ModuleList(Pointwise(channels, channels) for _ in range(layers))
        self.hidden = Pointwise(channels, 2 * channels)
        self.project = Pointwise(2 * channels, 1)

    def forward(self, a: Tensor, height: int) -> Tensor:
        """V -> V. a (batch, rows of this rank, width) -> the same shape."""
        down, across = (
            torch.linspace(0, 1, n, dtype=a.dtype, device=a.device)
            for n in (height, a.shape[-1])
        )
        down = pmod.shard(down, "space")
        x = self.lift(
            torch.stack([a, down[:, None].expand_as(a), across.expand_as(a)], dim=1)
        )
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x, height) + local(x))
        return self.project(F.gelu(self.hidden(x))).squeeze(1)


def relative_errors(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return |prediction - truth| / |truth| of each sample.

    Both norms are over the rows of all ranks. V -> I along "space".
    """
    squares = (prediction - truth).square().sum((1, 2)), truth.square().sum((1, 2))
    wrong, whole = pmod.psum(squares, "space")
    return (wrong / whole).sqrt()


def loss(model: nn.Module, a: Tensor, y: Tensor, height: int) -> Tensor:
    """Return the mean relative error over the batches of all ranks.

    V -> I: backward() gives each rank the whole gradient.
    """
    held: dict[str, Tensor] = dict(model.named_parameters())
    parameters = pmod.pvary(held, ("data", "space"))
    prediction = torch.func.functional_call(model, parameters, (a, height))
    return pmod.pmean(relative_errors(prediction, y).mean(), "data")
