"""FLOP, and the least time, of a text model's step and of what is done once a call."""

from __future__ import annotations

from typing import NamedTuple

from fastdit.flops import Product
from fastdit.text.layers import T_EMBED_WIDTH
from fastdit.text_config import MMDiTConfig, PixArtConfig, TextConfig


class Attention(NamedTuple):
    """QK^T and PV of `rows` sequences, which a forward computes `times` times."""

    rows: int
    queries: int
    keys: int
    width: int  # of all heads together
    times: int

    @property
    def flop(self) -> int:
        """FLOP of one such attention."""
        return 4 * self.rows * self.queries * self.keys * self.width

    @property
    def moved(self) -> int:
        """Elements of one: queries, keys and values read, the output written."""
        return 2 * self.rows * (self.queries + self.keys) * self.width


class Work(NamedTuple):
    """What a part of a model computes and moves."""

    products: list[Product]
    attention: list[Attention]
    passed: int  # elements that norms and gated residuals read and write

    @property
    def flop(self) -> int:
        """FLOP of the products and of attention."""
        of_products = sum(p.times * p.flop for p in self.products)
        return of_products + sum(a.times * a.flop for a in self.attention)

    def floor_seconds(self, itemsize: int, flop_rate: float, byte_rate: float) -> float:
        """Return the least time in seconds, on a device of known rates.

        It is the sum over the products, attention and the passes of the norms. A product takes the
        time to compute it or to read its weights once, whichever is longer, and attention likewise.

        Args:
            itemsize: bytes per element.
            flop_rate: FLOP per second of matrix products.
            byte_rate: bytes per second that a copy reads and writes together.
        """
        elements_a_second = byte_rate / itemsize
        least = self.passed / elements_a_second
        for p in self.products:
            least += p.times * max(p.flop / flop_rate, p.inner * p.columns / elements_a_second)
        for a in self.attention:
            least += a.times * max(a.flop / flop_rate, a.moved / elements_a_second)
        return least


class Costs(NamedTuple):
    """The parts of sampling; `step` is done in every step, and the others ahead of the steps."""

    step: Work
    conditioning: Work  # of one step's timestep: embeddings and all modulation
    text: Work  # of the prompts, once a call


def costs(
    cfg: TextConfig,
    rows: int = 1,
    text_tokens: int | None = None,
    size: tuple[int, int] | None = None,
) -> Costs:
    """Return what sampling costs.

    Args:
        cfg: the config of a PixArt or an MMDiT.
        rows: number of images, counted twice under guidance.
        text_tokens: tokens of a prompt; None for the most that the model takes.
        size: height and width of the latents; None for those that the model was trained at.

    Raises:
        ValueError: text_tokens is out of range, or the model does not take the size.
    """
    M = cfg.text_tokens if text_tokens is None else text_tokens
    if not 1 <= M <= cfg.text_tokens:
        expected = f"1 to {cfg.text_tokens}, the most that the model takes"
        raise ValueError(f"text_tokens: expected {expected}, got {M}")
    grid_rows, columns = cfg.grid_of(*(cfg.sample_shape[1:] if size is None else size))
    N = grid_rows * columns
    if isinstance(cfg, PixArtConfig):
        step = _pixart_step(cfg, rows, N, M)
        return Costs(step, _pixart_conditioning(cfg, rows), _pixart_text(cfg, rows * M))
    text = Work([Product("text", rows * M, cfg.text_width, cfg.hidden, 1)], [], 0)
    return Costs(_mmdit_step(cfg, rows, N, M), _mmdit_conditioning(cfg, rows), text)


def _ends(cfg: TextConfig, tokens: int) -> list[Product]:
    area, D = cfg.patch_size**2, cfg.hidden
    return [
        Product("patch", tokens, area * cfg.in_channels, D, 1),
        Product("final", tokens, D, area * cfg.out_channels, 1),
    ]


def _embedder(name: str, rows: int, width: int, out: int) -> list[Product]:
    return [Product(name, rows, width, out, 1), Product(name, rows, out, out, 1)]


def _stream(cfg: TextConfig, tokens: int, blocks: int) -> list[Product]:
    """Return the products of blocks that have self-attention and an MLP."""
    D, width = cfg.hidden, cfg.mlp_hidden
    return [
        Product("qkv", tokens, D, 3 * D, blocks),
        Product("proj", tokens, D, D, blocks),
        Product("fc1", tokens, D, width, blocks),
        Product("fc2", tokens, width, D, blocks),
    ]


# A norm fused with the residual before it moves four tensors, a gated residual alone three, and a
# norm alone two. The last norm of a stream need not write its residual.


def _pixart_step(cfg: PixArtConfig, rows: int, N: int, M: int) -> Work:
    D, L, tokens = cfg.hidden, cfg.n_layers, rows * N
    cross = [Product("cross q", tokens, D, D, L), Product("cross proj", tokens, D, D, L)]
    attention = [Attention(rows, N, N, D, L), Attention(rows, N, M, D, L)]
    passed = tokens * D * (2 + (3 + 4 + 4) * L - 1)
    return Work([*_ends(cfg, tokens), *_stream(cfg, tokens, L), *cross], attention, passed)


def _pixart_conditioning(cfg: PixArtConfig, rows: int) -> Work:
    """Return that of `rows` images; without conditions on their sizes all share one timestep."""
    D, third = cfg.hidden, cfg.hidden // 3
    found = _embedder("timestep", 1, T_EMBED_WIDTH, D)
    if cfg.size_conditions:
        found += _embedder("resolution", 2 * rows, T_EMBED_WIDTH, third)
        found += _embedder("aspect ratio", rows, T_EMBED_WIDTH, third)
    found.append(Product("modulation", rows if cfg.size_conditions else 1, D, 6 * D, 1))
    return Work(found, [], 0)


def _pixart_text(cfg: PixArtConfig, tokens: int) -> Work:
    D, width = cfg.hidden, cfg.text_width
    found = _embedder("text", tokens, width, D) if cfg.text_projection else []
    inner = D if cfg.text_projection else width
    return Work([*found, Product("cross kv", tokens, inner, 2 * D, cfg.n_layers)], [], 0)


def _mmdit_step(cfg: MMDiTConfig, rows: int, N: int, M: int) -> Work:
    D, L, dual = cfg.hidden, cfg.n_layers, len(cfg.dual_blocks)
    tokens, of_text = rows * N, rows * M
    found = _ends(cfg, tokens) + _stream(cfg, tokens, L) + _stream(cfg, of_text, L - 1)
    found.append(Product("last text qkv", of_text, D, 3 * D, 1))
    if dual:
        found.append(Product("dual qkv", tokens, D, 3 * D, dual))
        found.append(Product("dual proj", tokens, D, D, dual))
    attention = [Attention(rows, N + M, N + M, D, L), Attention(rows, N, N, D, dual)]
    image = 2 + (4 + 4) * L - 1 + (2 + 3) * dual
    # The last block reads no residual of the text, whose stream ends there.
    text = 2 + (4 + 4) * (L - 1) - (L > 1)
    return Work(found, attention, D * (tokens * image + of_text * text))


def _mmdit_conditioning(cfg: MMDiTConfig, rows: int) -> Work:
    """Return that of `rows` images, whose prompts' pooled embeddings are part of it."""
    D = cfg.hidden
    found = _embedder("timestep", 1, T_EMBED_WIDTH, D)
    found += _embedder("pooled text", rows, cfg.pooled_width, D)
    return Work([*found, Product("modulation", rows, D, cfg.modulation_width, 1)], [], 0)
