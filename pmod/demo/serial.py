"""The same model in one process, in plain torch, which the parallel one must match."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pmod.demo import ranks
from pmod.demo.darcy import Fields
from pmod.demo.options import Options
from pmod.demo.training import Run, Scale, fit


class Spectral(nn.Module):
    """A Fourier layer on whole fields."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * modes, modes, channels, channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> the same shape."""
        weight = torch.complex(self.weight[..., 0], self.weight[..., 1])
        m = weight.shape[1]
        spectrum = torch.fft.rfft2(x)
        low, high = spectrum[:, :, :m, :m], spectrum[:, :, -m:, :m]
        out = torch.zeros_like(spectrum)
        # down the rows the frequencies 0 ... m-1 come first, and -m ... -1 last
        out[:, :, :m, :m] = torch.einsum("bixy,xyio->boxy", low, weight[:m])
        out[:, :, -m:, :m] = torch.einsum("bixy,xyio->boxy", high, weight[m:])
        return torch.fft.irfft2(out, s=x.shape[-2:])


class SerialFNO(nn.Module):
    """The operator on whole fields, with the parameters of `fno.FNO`."""

    def __init__(self, channels: int, modes: int, layers: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, channels, 1)
        self.spectral = nn.ModuleList(
            [Spectral(channels, modes) for _ in range(layers)]
        )
        self.local = nn.ModuleList(
            [nn.Conv2d(channels, channels, 1) for _ in range(layers)]
        )
        self.hidden = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, 1, 1)

    def forward(self, a: Tensor) -> Tensor:
        """a (batch, height, width) -> the same shape."""
        batch, height, width = a.shape
        sides = [
            torch.linspace(0, 1, n, dtype=a.dtype, device=a.device)
            for n in (height, width)
        ]
        down, across = torch.meshgrid(*sides, indexing="ij")
        x = self.lift(
            torch.stack(
                [a, down.repeat(batch, 1, 1), across.repeat(batch, 1, 1)], dim=1
            )
        )
        for i in range(len(self.spectral)):
            x = gelu(self.spectral[i](x) + self.local[i](x))
        return self.project(gelu(self.hidden(x)))[:, 0]


def relative_errors(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return |prediction - truth| / |truth| of each sample."""
    difference = torch.linalg.vector_norm(prediction - truth, dim=(1, 2))
    return difference / torch.linalg.vector_norm(truth, dim=(1, 2))


def train(
    options: Options, train: Fields, test: Fields, weights: dict[str, Tensor]
) -> Run:
    """Train in this process, from the given weights."""
    device = ranks.device_of_one()
    model = SerialFNO(options.channels, options.modes, options.layers).to(
        device, options.dtype
    )
    model.load_state_dict(weights)
    train, test = train.to(device), test.to(device)
    scale = Scale.of(train)
    a, y = scale.apply(train, options.dtype)
    b, truth = scale.apply(test, options.dtype)[0], test.y.to(options.dtype)

    def batch_loss(batch: Tensor) -> Tensor:
        batch = batch.to(device)
        return relative_errors(model(a[batch]), y[batch]).mean()

    @torch.no_grad()
    def predict() -> Tensor:
        return scale.undo(torch.cat([model(part) for part in b.split(options.batch)]))

    def test_error() -> float:
        return relative_errors(predict(), truth).mean().item()

    losses, errors, seconds = fit(model, batch_loss, test_error, len(train), options)
    return Run(losses, errors, predict().cpu(), seconds)
