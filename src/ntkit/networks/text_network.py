"""A convolutional network for sentences given as token numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextNetwork(nn.Module):
    """Embeddings learned from scratch, three convolutions over positions, the largest value of each channel, one layer.

    With mask m_t = 1 where x_t > 0 and else 0, h_0 = m E[x] and h_k = m relu(W_k * h_{k-1} + b_k), the outputs are
    A max_t h_3(t) + b. Positions of padding are 0 after every layer, so the outputs of a sentence do not depend on how
    far it is padded. As in the text networks of Tsai et al. (2023), there are three layers and most parameters are in
    the embeddings: with the vocabulary of TREC (9,450) and the sizes below, 1,512,000 of 1,672,902.

    Parameters
    ----------
    vocabulary : number of tokens; 0 is padding.
    outputs : number of outputs.
    features : numbers per token.
    channels : of each convolution.
    kernel : positions of each convolution, odd.

    Examples
    --------
    >>> network = TextNetwork(vocabulary=50, outputs=2, features=4, channels=3)
    >>> short, long = torch.tensor([[5, 7, 0]]), torch.tensor([[5, 7, 0, 0, 0]])
    >>> network(short).shape, torch.equal(network(short), network(long))
    (torch.Size([1, 2]), True)
    """

    def __init__(
        self, vocabulary: int, outputs: int, features: int = 160, channels: int = 128, kernel: int = 3
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features, padding_idx=0)
        sizes = [features, channels, channels, channels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, kernel, padding=kernel // 2) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.dense = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, outputs] of token numbers [n, length]."""
        hidden = self.embedding(x).transpose(1, 2)
        mask = (x > 0).to(hidden.dtype).unsqueeze(1)
        hidden = hidden * mask
        for convolution in self.convolutions:
            hidden = torch.relu(convolution(hidden)) * mask
        return self.dense(hidden.amax(2))  # after ReLU the zeros of padding change no maximum
