"""The table of algorithms: what each value of `algorithm` means. Rows differ in data only, never in code paths.

An algorithm of your own is one more row, added before the config is made, or named in the config by its dotted path:

    ALGORITHMS["mine"] = Algorithm(MyObjective, "sequence-mean")     # SAPOConfig(algorithm="mine")
    algorithm: my_package.my_module.MINE                             # in a YAML file

`MyObjective` is a frozen dataclass that extends `sapo_trl.objective.Objective`. Its fields are filled from the config's
fields of the same names and from `objective_kwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sapo_trl.baselines import Aspo, Cispo, Clip, Dppo, M2po, Topr, Vespo, Winners
from sapo_trl.errors import did_you_mean, imported
from sapo_trl.objective import AdaptiveGate, Objective, SequenceGate, SoftGate


@dataclass(frozen=True)
class Algorithm:
    """An objective, the level of its ratio, and how its tokens are averaged.

    Attributes:
        objective: class of the per-token surrogate J.
        aggregation: key of `sapo_trl.update.aggregation.AGGREGATIONS`.
        defaults: the algorithm's own defaults of the objective's fields, where they differ from those of the class.
        loss_type: TRL's name of the same loss; TRL's branch is the oracle of the parity tests.
        level: `token` or `sequence`, TRL's `importance_sampling_level`.
        replay: routing replay that belongs to the algorithm (Mixture-of-Experts only), or `none`.
        paper, title: arXiv number and title, for the model card.
    """

    objective: type[Objective]
    aggregation: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loss_type: str = "grpo"
    level: str = "token"
    replay: str = "none"
    paper: str = ""
    title: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Name -> default of every field of the objective."""
        return {f.name: self.defaults.get(f.name, f.default) for f in fields(self.objective)}


_TIGHT, _WIDE = {"epsilon": 3e-4, "epsilon_high": 4e-4}, {"epsilon": 0.2, "epsilon_high": 0.27}
_EVEN = {"epsilon": 0.2, "epsilon_high": 0.2}
# grpo and gspo clip as the baselines of the SAPO paper do, luspo as gspo, because it publishes no range of its own.
ALGORITHMS: dict[str, Algorithm] = {
    "sapo": Algorithm(
        SoftGate, "sequence-mean", loss_type="sapo", paper="2511.20347", title="Soft Adaptive Policy Optimization"
    ),
    "sapo-sequence": Algorithm(
        SequenceGate, "sequence-mean", level="sequence",
        paper="2511.20347", title="Soft Adaptive Policy Optimization",
    ),
    "sapo-adaptive": Algorithm(
        AdaptiveGate, "sequence-mean", paper="2511.20347", title="Soft Adaptive Policy Optimization",
    ),
    "gspo": Algorithm(
        Clip, "sequence-mean", _TIGHT, level="sequence",
        paper="2507.18071", title="Group Sequence Policy Optimization",
    ),
    "grpo": Algorithm(
        Clip, "sequence-mean", _WIDE,
        paper="2402.03300", title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    ),
    "grpo-r2": Algorithm(
        Clip, "sequence-mean", _WIDE, replay="r2",
        paper="2512.01374", title="Stabilizing Reinforcement Learning with LLMs: Formulation and Practices",
    ),
    "dapo": Algorithm(
        Clip, "rollout-token-mean", {"epsilon": 0.2, "epsilon_high": 0.28}, loss_type="dapo",
        paper="2503.14476", title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    ),
    "dr-grpo": Algorithm(
        Clip, "constant", _EVEN, loss_type="dr_grpo",
        paper="2503.20783", title="Understanding R1-Zero-Like Training: A Critical Perspective",
    ),
    "bnpo": Algorithm(Clip, "token-mean", _EVEN, loss_type="bnpo"),
    "luspo": Algorithm(
        Clip, "sequence-sum", _TIGHT, loss_type="luspo", level="sequence",
        paper="2602.05261", title="Length-Unbiased Sequence Policy Optimization",
    ),
    "cispo": Algorithm(
        Cispo, "rollout-token-mean", loss_type="cispo",
        paper="2506.13585", title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    ),
    "vespo": Algorithm(
        Vespo, "rollout-token-mean", loss_type="vespo",
        paper="2602.10693", title="VESPO: Variational Sequence-Level Soft Policy Optimization",
    ),
    "topr": Algorithm(
        Topr, "sequence-mean",
        paper="2503.14286", title="Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs",
    ),
    "dppo-tv": Algorithm(
        Dppo, "rollout-token-mean",
        paper="2602.04879", title="Rethinking the Trust Region in LLM Reinforcement Learning",
    ),
    "dppo-kl": Algorithm(
        Dppo, "rollout-token-mean", {"dppo_divergence": "kl", "dppo_threshold": 0.05},
        paper="2602.04879", title="Rethinking the Trust Region in LLM Reinforcement Learning",
    ),
    "m2po": Algorithm(
        M2po, "rollout-token-mean",
        paper="2510.01161",
        title="Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?",
    ),
    "aspo": Algorithm(
        Aspo, "rollout-token-mean",
        paper="2510.06062", title="ASPO: Asymmetric Importance Sampling Policy Optimization",
    ),
    "wapo": Algorithm(
        Winners, "sequence-mean", _EVEN,
        paper="2606.16154", title="A Gradient Perspective on RLVR Stability and Winner Advantage Policy Optimization",
    ),
}  # fmt: skip


def find_algorithm(name: str) -> Algorithm:
    """The row of `ALGORITHMS`, or the `Algorithm` at a dotted path; an `Objective` there is averaged as SAPO's.

    Raises:
        ValueError: neither of the two.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        raise ValueError(f"algorithm={name!r} is no dotted path. Write {name.replace(':', '.')}.")
    if "." in name:
        module, _, attribute = name.rpartition(".")
        known = vars(imported(module, f"algorithm={name!r}"))
        if attribute not in known:
            raise ValueError(f"algorithm={name!r}: module {module} has no {attribute}.{did_you_mean(attribute, known)}")
        row = known[attribute]
        if isinstance(row, Algorithm):
            return row
        if isinstance(row, type) and issubclass(row, Objective):
            return Algorithm(row, "sequence-mean", title=row.__name__)
        raise ValueError(f"algorithm={name!r} is {type(row).__name__}, not an Algorithm or an Objective.")
    known = ", ".join(ALGORITHMS)
    hint = did_you_mean(name.lower(), ALGORITHMS)
    raise ValueError(f"algorithm={name!r} is unknown; known: {known}, or a dotted path.{hint}")


def users_of(option: str) -> list[str]:
    """Names of the algorithms whose objective has a field of this name."""
    return [name for name, row in ALGORITHMS.items() if option in row.options]
