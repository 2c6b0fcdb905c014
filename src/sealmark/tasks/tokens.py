"""The handwritten digits as sentences of 32 words, and a small transformer that reads them."""

from __future__ import annotations

from torch import Tensor, nn

from sealmark.core.task import Batch, Recipe, Task
from sealmark.tasks import digits

_LEVELS, _WORDS = 17, 32


class Block(nn.Module):
    """Self-attention and a feed-forward net, each after a normalization and beside a skip."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, words, width) to the same."""
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.o_proj(mixed)
        result: Tensor = x + self.down_proj(nn.functional.gelu(self.up_proj(self.norm2(x))))
        return result


class Reader(nn.Module):
    """A pre-norm transformer of three blocks, width 64: 130,000 parameters.

    Inputs (N, 32) int64, words 0 .. 288; outputs (N, 10) logits.
    """

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(_LEVELS**2, width)
        self.places = nn.Embedding(_WORDS, width)
        self.layers = nn.ModuleList(Block(width, 4, 2 * width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of sentences."""
        x = self.embed_tokens(words) + self.places.weight
        for block in self.layers:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def sentences(images: Tensor) -> Tensor:
    """Pairs of neighboring pixels as words: (N, 1, 8, 8) in [0, 1] to (N, 32) int64."""
    grey = images.flatten(1).mul(_LEVELS - 1).round().long()
    return grey[:, 0::2] * _LEVELS + grey[:, 1::2]


def task() -> Task:
    """The digits task in words; see `sealmark.tasks.digits`.

    Example:
        >>> tokens = task()
        >>> tuple(tokens.owner.inputs.shape), tokens.owner.inputs.dtype
        ((900, 32), torch.int64)
    """
    images = digits.task()
    owner, attacker, test = (
        Batch(sentences(rows.inputs), rows.targets) for rows in (images.owner, images.attacker, images.test)
    )
    return Task(
        name="tokens",
        make=Reader,
        owner=owner,
        attacker=attacker,
        test=test,
        classes=10,
        chance=0.1,
        recipe=Recipe(epochs=15, batch_size=64, rate=0.4, clip=1.0),
    )
