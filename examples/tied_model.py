"""Your own module: an embedding, a LayerNorm and a tied weight. Its kernel equals plain autograd, weight by weight.

Run it: ``python examples/tied_model.py``. Or analyze it from the command line on your own tokens (an .npz with integer
``x`` [n, length] and labels ``y``): ``ntkit analyze --data tokens.npz --model examples/tied_model.py:make``.
"""

import torch
from torch import nn

import ntkit
from ntkit.jacobian.oracle import tangent_kernel


class TiedModel(nn.Module):
    """Tokens in, one logit per class out; the mixing layer is used twice, once transposed."""

    def __init__(self, outputs: int = 2, vocabulary: int = 20, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, vocabulary, bias=False)
        self.mix.weight = self.embed.weight  # tied
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [n, length] to logits [n, outputs]."""
        h = self.norm(self.embed(tokens).mean(1))
        votes = torch.softmax(self.mix(h), -1)  # over the vocabulary, through the embedding's own weight
        return self.head(h + votes @ self.embed.weight)


def make(outputs: int) -> nn.Module:
    """Build the network, as ``ntkit analyze --model file.py:make`` calls it."""
    return TiedModel(outputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x1, x2 = TiedModel(3).double(), torch.randint(0, 20, (8, 6)), torch.randint(0, 20, (5, 6))
    for outputs in ("full", "diagonal", "trace", "sum", lambda y: y.logsumexp(1)):
        K, exact = ntkit.TangentKernel(model, outputs=outputs)(x1, x2), tangent_kernel(model, x1, x2, outputs)
        error = float((K - exact).abs().max() / exact.abs().max())
        print(
            f"{outputs if isinstance(outputs, str) else 'callable':9s} {list(K.shape)!s:14s} relative error {error:.1e}"
        )
        assert error < 1e-10
    for name, share in ntkit.TangentKernel(model, outputs="trace").layers(x1).items():
        print(f"{name:13s} {float(share.diagonal().sum()):8.1f} of the trace")
