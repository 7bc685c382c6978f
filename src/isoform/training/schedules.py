"""Learning-rate schedules as pure functions of the step: resumable, plottable, the same on any number of ranks.

    rate(step) = peak x factor(step, num_steps),   0 <= step < num_steps, counted in optimiser updates

Warm-up rises linearly and its first step is already above zero: factor = (step + 1) / warmup for step < warmup.
Differs: `transformers` gives the first update a rate of zero, which wastes it; from there on the forms are the same.
"""

from __future__ import annotations

import math
from typing import Protocol

from pydantic import Field, model_validator

from isoform.errors import ConfigError
from isoform.registry import Options, register


class Warmup(Options):
    """Warm-up in steps or as a fraction of the run, and the floor that decay ends at."""

    warmup_steps: int | None = Field(None, ge=0)
    warmup_fraction: float | None = Field(None, ge=0, le=1)
    final_fraction: float = Field(0.0, ge=0, le=1)
    # rate at the last step as a fraction of the peak

    @model_validator(mode="after")
    def _one_way(self) -> Warmup:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError("`warmup_steps` and `warmup_fraction` are both given; keep one")
        return self

    def warmup(self, num_steps: int) -> int:
        """Warm-up in steps. Raises: ConfigError where it would not end before the run does."""
        steps = self.warmup_steps if self.warmup_steps is not None else round((self.warmup_fraction or 0) * num_steps)
        if steps >= num_steps > 1:
            raise ConfigError(
                f"train.schedule: a warm-up of {steps} steps does not end within the run's {num_steps} steps; "
                "lower warmup_steps or raise max_steps / max_epochs"
            )
        return steps


class Schedule(Protocol):
    """`factor` maps (step, num_steps) to a share of the peak rate in [0, 1]."""

    options: Warmup

    def factor(self, step: int, num_steps: int) -> float: ...


def _progress(options: Warmup, step: int, num_steps: int) -> tuple[float | None, float]:
    """(warm-up factor or None after it, share of the decay done in [0, 1])."""
    warmup = options.warmup(num_steps)
    if step < warmup:
        return (step + 1) / warmup, 0.0
    return None, min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))


@register("schedule", "constant")
class Constant:
    """factor = 1 after warm-up."""

    class Config(Warmup):
        pass

    def __init__(self, options: Config) -> None:
        self.options = options

    def factor(self, step: int, num_steps: int) -> float:
        rising, _ = _progress(self.options, step, num_steps)
        return 1.0 if rising is None else rising


@register("schedule", "linear")
class Linear:
    """factor = 1 - (1 - final) x, x the share of the decay that is done."""

    class Config(Warmup):
        pass

    def __init__(self, options: Config) -> None:
        self.options = options

    def factor(self, step: int, num_steps: int) -> float:
        rising, done = _progress(self.options, step, num_steps)
        return 1 - (1 - self.options.final_fraction) * done if rising is None else rising


@register("schedule", "cosine")
class Cosine:
    """factor = final + (1 - final) (1 + cos(pi x)) / 2.

    Source: Loshchilov & Hutter 2017, SGDR, section 3, one half-period: it never rises again.
    """

    class Config(Warmup):
        final_fraction: float = Field(0.1, ge=0, le=1)

    def __init__(self, options: Config) -> None:
        self.options = options

    def factor(self, step: int, num_steps: int) -> float:
        rising, done = _progress(self.options, step, num_steps)
        final = self.options.final_fraction
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2 if rising is None else rising


@register("schedule", "inverse-sqrt")
class InverseSqrt:
    """factor = max(final, sqrt(warmup / (step + 1))) after warm-up.

    Source: Vaswani et al. 2017, section 5.3.
    """

    class Config(Warmup):
        pass

    def __init__(self, options: Config) -> None:
        self.options = options

    def factor(self, step: int, num_steps: int) -> float:
        rising, _ = _progress(self.options, step, num_steps)
        warmup = max(1, self.options.warmup(num_steps))
        return max(self.options.final_fraction, math.sqrt(warmup / (step + 1))) if rising is None else rising


@register("schedule", "wsd")
class WarmupStableDecay:
    """factor = 1 until the last `decay_fraction` of the run, then linear down to `final_fraction`.

    Source: Hu et al. 2024, MiniCPM, section 4.
    """

    class Config(Warmup):
        decay_fraction: float = Field(0.2, ge=0, le=1)
        # share of the run's steps in which the rate falls

    options: Config

    def __init__(self, options: Config) -> None:
        self.options = options

    def factor(self, step: int, num_steps: int) -> float:
        rising, _ = _progress(self.options, step, num_steps)
        if rising is not None:
            return rising
        assert isinstance(self.options, WarmupStableDecay.Config)
        decay_steps = max(1, round(self.options.decay_fraction * num_steps))
        done = max(0.0, (step + 1 - (num_steps - decay_steps)) / decay_steps)
        return 1 - (1 - self.options.final_fraction) * done
