"""What torch computes for the vision models, stored for `tests/models/test_images.py`: run by hand.

    make peers                                             # .peers/: torch
    # writes images.npz beside this file, in some seconds
    .peers/bin/python tests/models/goldens/make_images.py

The networks are written here by hand, with `torch.nn` alone, from their papers; a file for each
would repeat the weights. Weights are random everywhere, norms and statistics too, and are stored
under the paths of our trees. For each name of a network:

    NAME/pixels           [B, Y, X, C]
    NAME/params/PATH      kernels as [O, I * ky * kx], one leaf for each layer
    NAME/logits           in inference
    NAME/train            in training: by the moments of the batch
    NAME/moments/PATH     the mean and variance (not corrected) of each batch norm's input in
                          training
    NAME/grad/PATH        of the mean cross entropy of classes 0, 1, 2, ..., in training
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

CLASSES = 3


class Block(nn.Module):
    """A residual block; `bottleneck` with the stride at its 3 x 3 convolution."""

    def __init__(self, inner: int, width: int, stride: int, bottleneck: bool, norm) -> None:
        super().__init__()
        if bottleneck:
            shapes = [(inner, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        else:
            shapes = [(inner, width, 3, stride), (width, width, 3, 1)]
        self.count = len(shapes)
        for i, (a, b, side, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, side, step, side // 2, bias=False))
            self.add_module(f"conv{i}_norm", norm(b))
        self.outer = shapes[-1][1]
        self.short = None
        if stride == 2 or inner != self.outer:
            self.short = "halve" if stride == 2 else "widen"
            self.add_module(self.short, nn.Conv2d(inner, self.outer, 1, stride, bias=False))
            self.add_module(f"{self.short}_norm", norm(self.outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"conv{i}_norm")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.count else y
        short = (
            x
            if self.short is None
            else getattr(self, f"{self.short}_norm")(getattr(self, self.short)(x))
        )
        return torch.relu(y + short)


class ResNet(nn.Module):
    """Stem, blocks, mean, classes."""

    def __init__(
        self, stages: tuple[int, ...], width: int, bottleneck: bool, small: bool, norm
    ) -> None:
        super().__init__()
        self.stem = (
            nn.Conv2d(3, width, 3, 1, 1, bias=False)
            if small
            else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        )
        self.stem_norm = norm(width)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.ModuleList()
        inner = width
        for stage, n in enumerate(stages):
            for i in range(n):
                stride = 2 if stage and not i else 1
                self.blocks.append(Block(inner, width * 2**stage, stride, bottleneck, norm))
                inner = self.blocks[-1].outer
        self.head = nn.Linear(inner, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions with pooling, dense layers, classes; features flattened with the channels last,
    as ours are.
    """

    def __init__(
        self,
        side: int,
        channels: tuple[int, ...],
        kernel: int,
        pad: int,
        pool,
        act,
        widths: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.convs = len(channels)
        self.denses = len(widths)
        self.pool = pool
        self.act = act
        inner = 1
        for i, width in enumerate(channels, 1):
            self.add_module(
                f"conv{i}", nn.Conv2d(inner, width, kernel, padding=pad if i == 1 else 0)
            )
            side = (side - kernel + 1 + (2 * pad if i == 1 else 0)) // 2
            inner = width
        inner *= side * side
        for i, width in enumerate(widths, 1):
            self.add_module(f"dense{i}", nn.Linear(inner, width))
            inner = width
        self.head = nn.Linear(inner, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(1, self.convs + 1):
            x = self.pool(self.act(getattr(self, f"conv{i}")(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)
        for i in range(1, self.denses + 1):
            x = self.act(getattr(self, f"dense{i}")(x))
        return self.head(x)


NETS = {
    "basic": (
        ResNet((2, 1), 4, False, False, nn.BatchNorm2d),
        (4, 3, 21, 21),
    ),  # an odd side: padding is not even
    "bottleneck": (ResNet((1, 2), 4, True, True, nn.BatchNorm2d), (3, 3, 8, 8)),
    "group": (ResNet((1, 1), 4, False, True, lambda d: nn.GroupNorm(2, d)), (2, 3, 7, 7)),
    "lenet": (
        Plain(16, (3, 4), 5, 2, nn.functional.avg_pool2d, torch.tanh, (10, 8)),
        (3, 1, 16, 16),
    ),
    "cnn": (Plain(13, (3, 4), 3, 0, nn.functional.max_pool2d, torch.relu, ()), (3, 1, 13, 13)),
}
OURS = {"running_mean": "mean", "running_var": "variance"}


def leaves(net: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(our path, module, name of its tensor)."""
    for path, module in net.named_modules():
        norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
        for name in ("weight", "bias", *OURS):
            if getattr(module, name, None) is None:
                continue
            where = path.replace(".", "/")
            if norm:
                yield f"{where}/{OURS.get(name, name)}", module, name
            else:
                yield where + ("_bias" if name == "bias" else ""), module, name


def ours(a: torch.Tensor) -> np.ndarray:
    """Kernels with two axes."""
    a = a.detach().numpy().copy()  # torch goes on writing into its statistics
    return a.reshape(a.shape[0], -1) if a.ndim > 2 else a


def main() -> None:
    """Write images.npz."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda shape: torch.randn(shape, generator=generator)
    found = {}
    for name, (net, shape) in NETS.items():
        for path, module, tensor in leaves(net):
            a = getattr(module, tensor)
            value = (
                normal(a.shape) * (2 / max(a[0].numel(), 2)) ** 0.5
                if a.ndim > 1
                else 0.3 * normal(a.shape)
            )
            value = (
                value.abs() + 0.5
                if path.endswith("variance")
                else value + 1
                if path.endswith("norm/weight")
                else value
            )
            a.data.copy_(value)
            found[f"{name}/params/{path}"] = ours(a)
        pixels = normal(shape)
        found[f"{name}/pixels"] = pixels.permute(0, 2, 3, 1).numpy()
        found[f"{name}/logits"] = net.eval()(pixels).detach().numpy()
        inputs: dict[str, torch.Tensor] = {}
        for path, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(
                    lambda _, args, path=path, to=inputs: to.update({path: args[0].detach()})
                )
        logits = net.train()(pixels)
        found[f"{name}/train"] = logits.detach().numpy()
        for path, x in inputs.items():
            where = f"{name}/moments/{path.replace('.', '/')}"
            found[f"{where}/mean"] = x.mean((0, 2, 3)).numpy()
            found[f"{where}/variance"] = x.var((0, 2, 3), correction=0).numpy()
        nn.functional.cross_entropy(logits, torch.arange(len(pixels)) % logits.shape[1]).backward()
        for path, module, tensor in leaves(net):
            if tensor not in OURS:
                found[f"{name}/grad/{path}"] = ours(getattr(module, tensor).grad)
    np.savez_compressed(Path(__file__).with_name("images.npz"), **found)


if __name__ == "__main__":
    main()
