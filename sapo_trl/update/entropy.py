"""The coefficient of the entropy bonus: constant, or moved after every step towards a target entropy, as in TRL."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sapo_trl.config import SAPOConfig


@dataclass
class EntropyController:
    """TRL's adaptive control: the bonus acts only while the last step's entropy was at or below the target.

    Attributes:
        coef: the coefficient; with `is_adaptive` it moves by `delta` per step within [low, high].
        last_entropy: mean entropy of the last optimizer step over all processes, in nats.
    """

    coef: float
    is_adaptive: bool
    target: float
    delta: float
    low: float
    high: float
    last_entropy: float = math.inf

    @classmethod
    def from_config(cls, config: SAPOConfig) -> EntropyController | None:
        """None where there is no entropy bonus."""
        if config.entropy_coef == 0.0 and not config.use_adaptive_entropy:
            return None
        return cls(
            config.entropy_coef, config.use_adaptive_entropy, config.entropy_target, config.entropy_coef_delta,
            config.entropy_coef_min, config.entropy_coef_max,
        )  # fmt: skip

    @property
    def applied(self) -> float:
        """The coefficient of this step's bonus."""
        return 0.0 if self.is_adaptive and self.last_entropy > self.target else self.coef

    def move(self, entropy: float) -> None:
        """After an optimizer step with mean entropy `entropy`."""
        if self.is_adaptive:
            step = self.delta if entropy <= self.target else -self.delta
            self.coef = min(max(self.coef + step, self.low), self.high)
            self.last_entropy = entropy
