"""Small built-in networks, and the user's own by name: ``package.module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ntkit.base.checks import refusal
from ntkit.base.factory import check_call, find
from ntkit.data.text_reader import TEXT_SETS
from ntkit.jacobian.model_calls import check_module
from ntkit.networks.text_network import TextNetwork

Shape = tuple[int, ...]


def linear(shape: Shape, outputs: int) -> nn.Module:
    """One dense layer: its kernel never changes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))


def mlp(shape: Shape, outputs: int) -> nn.Module:
    """Four hidden ReLU layers of one width, the smallest with at least 100,000 parameters (Long 2021)."""
    inputs = math.prod(shape)

    def make(width: int) -> nn.Module:
        sizes = [inputs, width, width, width, width]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, outputs))

    return glorot(_smallest(make, 100_000))


def cnn(shape: Shape, outputs: int) -> nn.Module:
    """Two 3x3 convolutions (16, 32 channels), a 2x2 max-pool, a hidden dense layer of 64."""
    channels, height, width = _image(shape, "cnn")
    features = 32 * math.ceil(height / 2) * math.ceil(width / 2)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(features, 64),
        nn.ReLU(),
        nn.Linear(64, outputs),
    )


def vgg(shape: Shape, outputs: int) -> nn.Module:
    """Two blocks of two 3x3 convolutions with max-pools, channels doubling, one dense layer (Long 2021).

    The width is the smallest with at least 92,000 parameters, which gives the paper's 38 on MNIST and 37 on CIFAR-10.
    """
    channels, height, width = _image(shape, "vgg")
    positions = math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(width / 2) / 2)

    def make(w: int) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in ((channels, w), (w, 2 * w)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * w * positions, outputs))

    return glorot(_smallest(make, 92_000))


def textcnn(shape: Shape, outputs: int, vocabulary: int | None = None) -> nn.Module:
    """Embeddings of 160 numbers, three convolutions of 128 channels, a maximum over positions, one dense layer."""
    if vocabulary is None or len(shape) != 1:
        what = f"inputs of shape {tuple(shape)}{'' if vocabulary else ' without a vocabulary'}"
        expected = "sentences [length] with a vocabulary"
        fix = f"Use a text data set ({', '.join(TEXT_SETS)}), or a table of one column of sentences and a target."
        raise refusal("--model textcnn", got=what, expected=expected, fix=fix)
    return TextNetwork(vocabulary, outputs)


BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "cnn": cnn,
    "vgg": vgg,
    "textcnn": textcnn,
}


def build(name: str, shape: Shape, outputs: int, seed: int, vocabulary: int | None = None) -> nn.Module:
    """Build a network by name; its weights depend on `seed` only (the global random state does not change).

    Parameters
    ----------
    name : a built-in name, ``package.module:factory`` or ``file.py:factory``. A factory gets ``shape``, ``outputs`` and
        ``vocabulary`` if they are among its parameters.
    shape, outputs : shape of one input, number of outputs.
    seed : of the initial weights.
    vocabulary : number of tokens, where the inputs are token numbers of a text data set.

    Returns
    -------
    torch.nn.Module
        In eval mode.

    Raises
    ------
    Refused
        For an unknown name (with the nearest one), a missing file or factory, or a factory that cannot be called.

    Examples
    --------
    >>> sum(p.numel() for p in build("vgg", (1, 28, 28), 1, seed=0).parameters())
    95267
    """
    factory: Callable[..., nn.Module] = BUILT_IN.get(name) or find("--model", name, BUILT_IN)
    if isinstance(factory, nn.Module):  # it can be called, too: on samples
        fix = "Write def make(outputs): return ..., and name make."
        expected = "a function that makes the network, with initial weights by the seed"
        raise refusal(f"--model {name}", got=f"a network ({type(factory).__name__})", expected=expected, fix=fix)
    parameters = inspect.signature(factory).parameters
    values: dict[str, Any] = {"shape": tuple(shape), "outputs": outputs}
    values |= {} if vocabulary is None else {"vocabulary": vocabulary}
    arguments = {key: value for key, value in values.items() if key in parameters}
    more = ", and vocabulary" if vocabulary is not None else ""
    expected = f"a callable without required arguments other than shape and outputs{more}"
    check_call(factory, f"--model {name}", arguments, expected)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = factory(**arguments)
    check_module(model, f"--model {name}", "Return the module from the factory.")
    return model.eval()


def _image(shape: Shape, name: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        expected = "images (channels, height, width)"
        fix = "Use --model mlp, textcnn for sentences, or your own module."
        raise refusal(f"--model {name}", got=f"inputs of shape {tuple(shape)}", expected=expected, fix=fix)
    return shape[0], shape[1], shape[2]


def _smallest(make: Callable[[int], nn.Module], parameters: int) -> nn.Module:
    """Network of the smallest width >= 4 with at least this number of parameters (counted on the meta device)."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make(width).parameters())

    return make(4 + bisect_left(range(4, parameters), parameters, key=count))


def glorot(model: nn.Module) -> nn.Module:
    """Glorot-uniform weights and zero biases, as in the paper's code (Keras defaults)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
