"""How a model knows the order of its tokens: learned, sinusoidal, rotary, linear or learned biases, or not at all.

A scheme acts at one of four places, and leaves the others alone:

    embed    something is added to the embeddings            learned, sinusoidal
    rotate   queries and keys are turned by their position   rope
    slopes   scores fall with the distance                   alibi
    relative a learned score is added for each distance      t5

A new scheme is one registered class here.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isoform.errors import ConfigError
from isoform.layers import fused
from isoform.layers.init import embedding
from isoform.layers.rope_scaling import Scaling
from isoform.registry import Options, register


@register("position", "none")
class Position(nn.Module):
    """No position at all; the base of every scheme. A causal model still learns order from what it may not see.

    Source: Haviv et al. 2022. `limit`: the most positions that the scheme can tell apart, None where any will do.
    """

    class Config(Options):
        pass

    limit: int | None = None

    def __init__(
        self, config: Options, *, width: int, num_heads: int, head_width: int, max_positions: int | None
    ) -> None:
        super().__init__()

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads: hidden `(n, d)`, positions `(n,)` -> `(n, d)`."""
        return hidden

    def rotate(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What attention compares: query `(n, h, k)`, key `(m, g, k)`, positions `(n,)` and `(m,)` -> both again."""
        return query, key

    def slopes(self) -> tuple[float, ...] | None:
        """`(h,)` by how much each head's scores fall per token of distance."""
        return None

    def relative(self, *, causal: bool) -> Tensor | None:
        """`(h, 2 r + 1)` what each head adds to a score; column r + d: the key stands d tokens before the query."""
        return None


@register("position", "learned")
class Learned(Position):
    """A learned vector for each position, added to the embedding.

    Shapes: table `(max_positions, d)`.
    Source: Radford et al. 2019, HF `GPT2Model.wpe`. Differs: nothing.
    """

    def __init__(
        self, config: Options, *, width: int, num_heads: int, head_width: int, max_positions: int | None
    ) -> None:
        super().__init__(config, width=width, num_heads=num_heads, head_width=head_width, max_positions=max_positions)
        if max_positions is None:
            raise ConfigError("model.max_positions: missing; learned positions need the number of positions")
        self.limit = max_positions
        self.embedding = embedding(max_positions, width)

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        added: Tensor = hidden + self.embedding(positions)
        return added


@register("position", "sinusoidal")
class Sinusoidal(Position):
    """Fixed waves of falling frequency, added to the embedding.

    table[p, 2i] = amplitude sin(p base^(-2i/d)), table[p, 2i+1] = amplitude cos(p base^(-2i/d))

    Shapes: table `(positions, d)`, p a position, i a pair of channels.
    Source: Vaswani et al. 2017, section 3.5. Differs: there embeddings are multiplied by sqrt(d) and the amplitude is
    1; here embeddings start at 0.02, so the default amplitude gives the waves that root mean square.
    """

    class Config(Options):
        base: float = Field(10_000.0, gt=1)
        amplitude: float = Field(0.02 * math.sqrt(2), gt=0)

    def __init__(
        self, config: Config, *, width: int, num_heads: int, head_width: int, max_positions: int | None
    ) -> None:
        super().__init__(config, width=width, num_heads=num_heads, head_width=head_width, max_positions=max_positions)
        if width % 2:
            raise ConfigError(f"model.width: {width} given, sinusoidal positions need an even width")
        self.width, self.base, self.amplitude = width, config.base, config.amplitude

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden + sinusoids(positions, self.width, self.base, self.amplitude).to(hidden.dtype)


@register("position", "rope")
class Rope(Position):
    """Each pair of channels of queries and keys is turned by an angle that grows with the position.

    angle(p, i) = p / scale * base^(-2i/r);  (x_i, x_{i+r/2}) -> (x_i cos - x_{i+r/2} sin, x_{i+r/2} cos + x_i sin)

    so that query . key depends on the distance alone. r = fraction * k rotated channels, the rest stay as they are.
    Shapes: query `(n, h, k)`, key `(m, g, k)`.
    Source: Su et al. 2021; half-split layout as in HF `apply_rotary_pos_emb`; `scale` is the linear position
    interpolation of Chen et al. 2023; others in `rope_scaling`. Differs: nothing.
    """

    class Config(Options):
        base: float = Field(10_000.0, gt=1)
        fraction: float = Field(1.0, gt=0, le=1)
        # share of each head's channels that is rotated
        scale: float = Field(1.0, gt=0)
        # positions are divided by it
        scaling: Scaling | None = None
        # {kind: llama3} or {kind: yarn} with its options, in place of `scale`

        @model_validator(mode="after")
        def _one_way(self) -> Rope.Config:
            if self.scaling is not None and self.scale != 1:
                raise ValueError("`scale` and `scaling` are both given; keep one")
            return self

    def __init__(
        self, config: Config, *, width: int, num_heads: int, head_width: int, max_positions: int | None
    ) -> None:
        super().__init__(config, width=width, num_heads=num_heads, head_width=head_width, max_positions=max_positions)
        self.rotated = int(head_width * config.fraction)
        if self.rotated < 2 or self.rotated % 2:
            raise ConfigError(
                f"model.position.fraction: {config.fraction} of the head width {head_width} is {self.rotated} "
                "channels, an even number from 2 on is expected"
            )
        self.base, self.scale, self.scaling = config.base, config.scale, config.scaling

    def rotate(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        query_wave = self.waves(query_positions, query.dtype)
        key_wave = query_wave if key_positions is query_positions else self.waves(key_positions, key.dtype)
        return rotate_half_split(query, *query_wave), rotate_half_split(key, *key_wave)

    def waves(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(n, 1, r/2)` of the angles, made in float32 as HF makes them."""
        angle = (positions / self.scale).float()[:, None] * self.inverse_frequencies(positions.device)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.scaling is not None and self.scaling.amplitude != 1:
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude
        return cos.to(dtype), sin.to(dtype)

    def inverse_frequencies(self, device: torch.device) -> Tensor:
        """`(r/2,)` radians per position of each pair of channels."""
        theta = inverse_frequencies(self.rotated, self.base, device)
        return theta if self.scaling is None else self.scaling.angles(theta, self.base)


@register("position", "alibi")
class Alibi(Position):
    """Scores fall linearly with the distance, at another slope in each head.

    score(i, j) = q_i . k_j / sqrt(k) - slope_h |i - j|, slopes a geometric sequence from 2^(-8/h) for h a power of 2

    Source: Press, Smith & Lewis 2022 and their code for other numbers of heads. Differs: nothing.
    """

    def __init__(
        self, config: Options, *, width: int, num_heads: int, head_width: int, max_positions: int | None
    ) -> None:
        super().__init__(config, width=width, num_heads=num_heads, head_width=head_width, max_positions=max_positions)
        self.slope = tuple(alibi_slopes(num_heads))

    def slopes(self) -> tuple[float, ...] | None:
        return self.slope


@register("position", "t5")
class RelativeBias(Position):
    """A learned score for each head and bucket of distances, the same in every layer.

    score(i, j) = q_i . k_j / sqrt(k) + table[bucket(i - j), head]

    Near distances have a bucket each, farther ones share buckets that widen with the logarithm, and from
    `max_distance` on all share one. A causal layer uses every bucket for what lies before; any other uses half of them
    for each side.
    Shapes: table `(num_buckets, h)`.
    Source: Raffel et al. 2020, section 2.1; HF `T5Attention._relative_position_bucket`. Differs: nothing; T5 itself
    leaves out 1 / sqrt(k).
    """

    class Config(Options):
        num_buckets: int = Field(32, ge=4, multiple_of=2)
        max_distance: int = Field(128, gt=1)
        # tokens from which on all distances are alike

    def __init__(
        self, config: Config, *, width: int, num_heads: int, head_width: int, max_positions: int | None
    ) -> None:
        super().__init__(config, width=width, num_heads=num_heads, head_width=head_width, max_positions=max_positions)
        if config.max_distance <= config.num_buckets // 2:
            raise ConfigError(
                f"model.position.max_distance: {config.max_distance} given, more than half of num_buckets "
                f"{config.num_buckets} is expected"
            )
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.embedding = embedding(config.num_buckets, num_heads)

    def relative(self, *, causal: bool) -> Tensor | None:
        reach = self.max_distance
        distance = torch.arange(-reach, reach + 1, device=self.embedding.weight.device)
        scores: Tensor = self.embedding(distance_buckets(distance, self.num_buckets, reach, causal=causal))
        return scores.t()  # (2 r + 1, h) -> (h, 2 r + 1)


def sinusoids(positions: Tensor, width: int, base: float, amplitude: float) -> Tensor:
    """The waves of `Sinusoidal` at positions `(n,)`: float32 `(n, d)`."""
    angle = positions[:, None].float() * inverse_frequencies(width, base, positions.device)
    return amplitude * torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def inverse_frequencies(channels: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i/channels) for i = 0 .. channels/2 - 1, float32 `(channels / 2,)`."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    return 1.0 / base**exponent


def rotate_half_split(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first 2 r/2 channels of `states (n, h, k)` turned; cos and sin `(n, 1, r/2)`."""
    fast = fused.rotate(states, cos, sin)
    if fast is not None:
        return fast
    half = cos.shape[-1]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes of the nearest power of 2, then every second one of the next power for the heads that are left."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    more = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + more[: num_heads - power]


def distance_buckets(distance: Tensor, num_buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """The bucket of each distance, int64 of the same shape; positive: the key stands before the query.

    Of m buckets a side the first m/2 hold one distance each; d > m/2 is in m/2 + floor(m/2 log(2 d/m) /
    log(2 max_distance/m)), at most m - 1. The logarithm is taken in float32, as HF takes it.
    """
    side = num_buckets if causal else num_buckets // 2
    offset = torch.zeros_like(distance) if causal else (distance < 0).long() * side
    far = distance.clamp(min=0) if causal else distance.abs()
    exact = side // 2
    # Below `exact` the logarithm is not used; the clamp keeps it finite.
    share = torch.log(far.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    wide = exact + (share * (side - exact)).long()
    return offset + torch.where(far < exact, far, wide.clamp(max=side - 1))
