"""The one table of metrics: what each logged name means, who measures it, and where it is shown.

The step's metrics, the live view, the collapse guard, the report and the documentation all read `METRICS`. A name may
hold placeholders: `<k>` and `<layer>` stand for digits, `<percent>` for a decimal number, any other one for any text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from numbers import Real
from typing import Any, Literal

DIGITS = {"k": r"\d+", "layer": r"\d+", "percent": r"[\d.]+"}  # placeholder -> what it stands for, else any text
Reduction = Literal["mean", "maximum", "derived", "host"]


@dataclass(frozen=True)
class Metric:
    """A metric, or the family of those whose names fit `name`.

    Attributes:
        name: as logged, with placeholders for a family.
        title: the title of its picture, with the placeholders of `name`; empty for names that are not the package's own
            (those of a reward function or a subclass), which are shown as they are.
        unit: of its values; empty for a pure number.
        symbol: what its axis says where it has no unit.
        reduction: `mean`: a sum over a sum of weights, over the packs and processes of an optimizer step; `maximum`
            over them; `derived` from reduced counts; `host`: logged by the trainer, TRL or transformers itself.
        section: of the report; empty: the report does not show it.
        panel: title of the panel that it shares with others of its section; empty: a panel of its own.
        drawn: False where the report shows it in a table, or in a picture of another kind, only.
        by_staleness: also drawn by the number of updates since the rollout.
        overview: one of the training curves that are drawn by default.
        label: its short name in the live view; empty: the live view does not show it.
    """

    name: str
    title: str = ""
    unit: str = ""
    reduction: Reduction = "mean"
    section: str = ""
    panel: str = ""
    drawn: bool = True
    by_staleness: bool = False
    overview: bool = False
    label: str = ""
    symbol: str = ""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"<(\w+)>", self.name)  # text, placeholder, text, ...
        named = [f"(?P<{x}>{DIGITS.get(x, '.+')})" if i % 2 else re.escape(x) for i, x in enumerate(parts)]
        return re.compile("".join(named), re.DOTALL)

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


# Group of tokens -> its description: the sign of A, and whether the step moves r towards 1 or away from it
GROUPS = {"pos": "A > 0", "neg": "A < 0", "corrective": "step towards r = 1", "expansive": "step away from r = 1"}
FRACTION, NATS, TOKENS = "fraction", "nats per token", "tokens"


def _of_groups(kind: str, title: str) -> tuple[Metric, ...]:
    """Means over the tokens of each group; those by sign are also drawn by staleness for the gate weight."""
    drawn, symbol = ("pos", "neg") if kind == "weight" else (), "w" if kind == "weight" else "w·r"
    return tuple(
        Metric(f"gate/{kind}_{group}_mean", f"Mean {title}, {words}", by_staleness=group in drawn, symbol=symbol)
        for group, words in GROUPS.items()
    )


def _tails(kind: str, percent: int, title: str) -> Metric:
    symbol = "w" if kind == "weight" else "w·r"
    return Metric(f"gate/{kind}_<group>_p{percent}", f"{title}: <group>", "", "derived", panel=title, symbol=symbol)


REWARD = (
    Metric("reward", "Training reward", reduction="host", overview=True, label="reward", symbol="reward"),
    Metric("eval_pass_at_1", "Held-out Pass@1", reduction="host", overview=True, label="Pass@1", symbol="Pass@1"),
    Metric("eval_<set>_pass_at_1", "Held-out Pass@1: <set>", reduction="host", overview=True, symbol="Pass@1"),
    Metric("reward_std", "Standard deviation of the reward", reduction="host", symbol="reward"),
    Metric("eval_reward", "Held-out reward", reduction="host", label="eval", symbol="reward"),
    Metric("frac_reward_zero_std", "Prompts all scored alike", FRACTION, "host"),
    Metric("rewards/<function>/mean", "Mean of <function>", reduction="host", symbol="reward"),
    Metric("rewards/<function>/std", "Standard deviation of <function>", reduction="host", drawn=False),
    Metric("rewards/unscorable_frac", "Completions without a reward", FRACTION, "host"),
)
DATA = (
    Metric("data/<dataset>/reward", "Training reward: <dataset>", reduction="host", panel="Training reward by dataset"),
    Metric("data/<dataset>/accuracy", "Right completions: <dataset>", FRACTION, "host", panel="Accuracy by dataset"),
    Metric("data/rounds", "Generations of a rollout", reduction="host"),
    Metric("data/useful_frac", "Generated prompts whose rewards differ", FRACTION, "host"),
    Metric("data/extra_completions", "Generated beyond a rollout's completions", "completions", "host"),
    Metric("data/missing_prompts", "Prompts of a rollout whose rewards are equal", "prompts", "host"),
    Metric("data/prompts", "Prompts taken for a rollout", "prompts", "host", drawn=False),
    Metric("data/prompts_left", "Prompts that are not solved yet", "prompts", "host"),
    Metric("data/passes", "Passes over the prompts", reduction="host", drawn=False),
    Metric("data/<dataset>/passes", "Passes over the prompts: <dataset>", reduction="host", drawn=False),
    Metric("data/<dataset>/length", "Completion length: <dataset>", TOKENS, "host", panel="Length by dataset"),
)
GATE = (
    Metric(
        "effective_update_ratio",
        "Effective update ratio",
        "mean of min(1, w)",
        by_staleness=True,
        overview=True,
        label="update ratio",
    ),
    *_of_groups("weight", "gate weight"),
    *_of_groups("pull", "effective weight w·r"),
    Metric("gate/expansive_frac", "Steps away from r = 1", "fraction of tokens"),
    Metric(
        "gate/leak_neg",
        "Leak: A < 0 and r fallen below 0.8",
        "fraction of Σ|A|·w·r",
        by_staleness=True,
        label="leak",
    ),
    Metric("gate/pull_mean", "Mean effective weight w·r", symbol="w·r"),
    _tails("weight", 1, "Gate weight that 1% of tokens are below"),
    _tails("weight", 10, "Gate weight that 10% of tokens are below"),
    _tails("pull", 10, "Effective weight w·r that 10% of tokens are below"),
    _tails("pull", 99, "Effective weight w·r that 1% of tokens are above"),
    Metric("gate/<name>", reduction="host"),
    Metric("ratio/max", "Largest ratio r", reduction="maximum", by_staleness=True, symbol="r"),
    Metric("ratio/mean", "Mean ratio r", symbol="r"),
    Metric("ratio/p<percent>", "Ratio r that <percent>% of tokens are below", "", "derived", drawn=False, symbol="r"),
    Metric("log_ratio/abs_mean", "Mean |log r|", by_staleness=True, symbol="|log r|"),
    Metric("log_ratio/noise_abs_mean", "Mean |log r| without any update: two passes over a few rows", drawn=False),
    Metric("log_ratio/drift", "Drift since the rollout, mean (log r)²/2", NATS, by_staleness=True, label="drift"),
    *(
        Metric(
            f"log_ratio/abs_{sign}_{way}_mean",
            f"Mean |log r|, {GROUPS[sign]}, {GROUPS[way]}",
            panel="Mean |log r| by sign of A and direction",
            symbol="|log r|",
        )
        for sign in ("pos", "neg")
        for way in ("corrective", "expansive")
    ),
    Metric("log_ratio/clamped_frac", "Tokens whose log r is clamped", FRACTION),
    Metric("log_ratio/<name>", reduction="host"),
    Metric("clip_ratio/high_mean", "Tokens without gradient, r > 1", FRACTION),
    Metric("clip_ratio/low_mean", "Tokens without gradient, r < 1", FRACTION),
    Metric("clip_ratio/region_mean", "Tokens without gradient", FRACTION, by_staleness=True),
    Metric("clip_ratio/<name>", reduction="host"),
    Metric("sampling/engine_check", "Engine's log-probs off the policy's, over rounding", "1 is the limit", "host"),
    Metric("sampling/weights_age", "Age of the weights that generated the rollout's oldest rows", "updates", "host"),
    Metric("sampling/kl", "KL of rollout engine and trainer", NATS),
    Metric("sampling/log_ratio_abs_mean", "Mean |log(π_old/π_engine)|"),
    Metric("sampling/sampling_logp_difference/mean", "Mean gap of the engine's log-probs", "nats"),
    Metric("sampling/importance_sampling_ratio/mean", "Mean correction π_old/π_engine"),
    Metric("sampling/lost_frac", "Tokens whose correction is cut or masked", FRACTION),
    Metric("sampling/removed_tokens_frac", "Tokens that the correction removes", FRACTION),
    Metric("sampling/removed_sequences_frac", "Sequences of which it leaves no token", FRACTION),
    Metric("sampling/removed_advantage_frac", "Share of |A| on removed tokens", FRACTION),
    Metric("sampling/<name>", reduction="host"),
    Metric("sequence/gate_gap", "Mean D_i of a sequence", symbol="D_i"),
    Metric("sequence/log_ratio_var", "Mean Var_i of a sequence's log r", symbol="Var_i"),
    Metric("sequence/within_bound_frac", "Sequences within the bound, Eq. 21", FRACTION),
    Metric("sequence/<name>", reduction="host"),
)
COMPLETIONS = (
    Metric("completions/mean_length", "Completion length", TOKENS, "host", overview=True, label="length"),
    Metric("completions/clipped_ratio", "Completions cut at the limit", FRACTION, "host"),
    Metric("completions/interrupted_frac", "Completions whose thought was interrupted", FRACTION, "host"),
    Metric("entropy", "Entropy", NATS, overview=True, label="entropy"),
    Metric("completions/<which>_length", "Completion length, <which>", TOKENS, "host", drawn=False),
)
OPTIMIZER = (
    Metric("loss", "Loss", reduction="host"),
    Metric("grad_norm", "Gradient norm", reduction="host", overview=True, label="grad norm", symbol="norm"),
    Metric("kl", "KL to the reference", NATS, label="kl"),
    Metric("kl_clamped_frac", "Tokens whose KL is clamped or not a number", FRACTION, drawn=False),
    Metric("learning_rate", "Learning rate", reduction="host", label="lr", symbol="learning rate"),
    Metric("aux_loss", "Load-balancing loss of the routers"),
    Metric("entropy_bonus", "Entropy that the bonus averages", NATS),
    Metric("entropy_coef", "Coefficient of the entropy bonus", reduction="host"),
)
ROUTING = (
    Metric("routing/changed_frac", "Expert selections changed", FRACTION, "derived", by_staleness=True),
    Metric("routing/load_entropy", "Entropy of the experts' loads", "nats", "derived"),
    Metric("routing/load_max", "Largest load of an expert", FRACTION, "derived"),
    Metric("routing/load_min", "Smallest load of an expert", FRACTION, "derived"),
    Metric("routing/router_entropy", "Router entropy", NATS, "derived"),
    Metric("routing/layer_<layer>/<name>", "Layer <layer>: <name>", reduction="derived", drawn=False),
    Metric("routing/<name>", reduction="host"),
)
VERDICTS = (
    Metric("verdict/capped_frac", "Answers read only up to the longest length", FRACTION, "host", panel="Verdicts"),
    Metric("verdict/<verdict>_frac", "Answers with the verdict <verdict>", FRACTION, "host", panel="Verdicts"),
    Metric("verdict/<name>", reduction="host", panel="Verdicts"),
    Metric("gym/no_answer_frac", "Completions without an answer for reasoning-gym", FRACTION, "host"),
    Metric("gym/timeout_frac", "Answers past the deadline of reasoning-gym's scorer", FRACTION, "host"),
    Metric("gym/error_frac", "Answers on which reasoning-gym's scorer fails", FRACTION, "host"),
)
TIME = (
    Metric("update/skipped_rows_frac", "Rows not forwarded: A = 0, or no token to train on", FRACTION),
    Metric("update/<name>_frac", reduction="host"),
    Metric("step_time", "Optimizer step", "s", "host", panel="Seconds"),
    Metric("time/rollout_s", "Generation and rewards of a rollout", "s", "host", panel="Seconds"),
    Metric("time/reward_s", "Rewards of a rollout", "s", "host", panel="Seconds"),
    Metric("time/ahead_wait_s", "Waiting for the rollout ahead", "s", "host", panel="Seconds"),
    Metric("time/ahead_generation_s", "Generation of the rollout ahead", "s", "host", panel="Seconds"),
    Metric("time/ahead_generation_cpu_s", "Generation of the rollout ahead, processor", "s", "host", panel="Seconds"),
    Metric("time/old_and_reference_logps_s", "Old and reference log-probs", "s", "host", panel="Seconds"),
    Metric("time/update_s", "Forward and backward of a mini-batch", "s", "host", panel="Seconds"),
    Metric("verdict/time_s", "Grading", "s", "host", panel="Seconds"),
    Metric("time/<phase>", reduction="host", panel="Seconds"),
    Metric("update/skipped_tokens", "In skipped rows", TOKENS, drawn=False),
    Metric("update/forwarded_tokens", "Forwarded by a mini-batch", TOKENS, drawn=False),
    Metric("update/shared_tokens", "Spared by sharing prompts", TOKENS, drawn=False),
    Metric("update/trained_tokens", "Trained on by a mini-batch", TOKENS, drawn=False),
    Metric("update/packs", "Packs of a mini-batch", drawn=False),
    Metric("update/skipped_steps", "Optimizer steps skipped, not finite", reduction="host", drawn=False),
    Metric("update/oom_retries", "Packs halved for lack of memory", drawn=False),
    Metric("update/imbalance", "Busiest process over the mean", reduction="host", drawn=False),
    Metric(
        "update/imbalance_before_dealing",
        "Busiest process over the mean, before rows move",
        reduction="host",
        drawn=False,
    ),
)
ELSEWHERE = (
    Metric("num_tokens", "Seen since the start", TOKENS, "host"),
    Metric("num_input_tokens_seen", "Seen since the start", TOKENS, "host"),
    Metric("tools/call_frequency", "Tool calls of a completion", reduction="host"),
    Metric("tools/failure_frequency", "Tool calls that fail", FRACTION, "host"),
    Metric("step", "Optimizer step", reduction="host"),
    Metric("time_s", "Time since the start of training", "s", "host"),
    Metric("epoch", "Epoch", reduction="host"),
    Metric("total_flos", "Floating-point operations", reduction="host"),
    Metric("train_<name>", "Whole run: <name>", reduction="host"),
    Metric("mini_batch_<k>/<metric>", "<metric>, <k> updates after the rollout", reduction="derived"),
    Metric("<metric>_low", "<metric>, lower end of the interval", reduction="host"),
    Metric("<metric>_high", "<metric>, upper end of the interval", reduction="host"),
    Metric("eval_<metric>", "Held-out: <metric>", reduction="host"),
)

# In the order of the page; within a section in the order of its panels.
SECTIONS = {
    "Reward": REWARD,
    "Data": DATA,
    "Gate": GATE,
    "Completions": COMPLETIONS,
    "Optimizer": OPTIMIZER,
    "Routing": ROUTING,
    "Verdicts": VERDICTS,
    "Time and tokens": TIME,
}
METRICS: tuple[Metric, ...] = (
    *(replace(metric, section=name) for name, metrics in SECTIONS.items() for metric in metrics),
    *ELSEWHERE,
)
# What an optimizer step sums, in one order on every process
MEANS = tuple(metric.name for metric in METRICS if metric.reduction == "mean")
MAXIMA = tuple(metric.name for metric in METRICS if metric.reduction == "maximum")
_BY_NAME = {metric.name: metric for metric in METRICS}
LIVE_LABELS = {metric.name: metric.label for metric in METRICS if metric.label}  # name -> label of the live view


@cache
def find(name: str) -> Metric | None:
    """The row of a logged name: its own, or else the first family that it fits; None for an unknown one.

    >>> find("mini_batch_3/ratio/max").name, find("ratio/p0.1").name, find("loss_of_mine")
    ('mini_batch_<k>/<metric>', 'ratio/p<percent>', None)
    """
    families = (metric for metric in METRICS if "<" in metric.name and metric.pattern.fullmatch(name))
    return _BY_NAME.get(name) or next(families, None)


def title(name: str) -> str:
    """The title of a picture of `name`, with its unit; the name itself where the table has no title for it.

    >>> title("entropy"), title("eval_aime25_pass_at_1"), title("mini_batch_2/ratio/max")
    ('Entropy (nats per token)', 'Held-out Pass@1: aime25', 'Largest ratio r, 2 updates after the rollout')
    """
    metric = find(name)
    if metric is None or not metric.title:
        return name
    match = metric.pattern.fullmatch(name)
    parts = match.groupdict() if match else {}
    texts = {x: title(text) if x == "metric" else text for x, text in parts.items()}
    return re.sub(r"<(\w+)>", lambda placeholder: texts[placeholder[1]], metric.heading)


def check_logged(name: str, value: Any) -> None:
    """What a reward function logs by `log_metric`.

    Raises:
        ValueError: the run has a metric of that name, which would become the mean of both; or the value is no number.
    """
    is_own = name in _BY_NAME or name.startswith("rewards/") or re.match(r"(pass|maj)_at_\d", name) is not None
    if is_own and not name.startswith(("verdict/", "gym/")):  # those are logged by rewards
        raise ValueError(f"log_metric({name!r}, ...): the run has a metric of this name. Log it under another.")
    if not isinstance(value, Real) and math.prod(getattr(value, "shape", (0,))) != 1:
        raise ValueError(f"log_metric({name!r}, ...) got a {type(value).__name__} instead of a number.")


def markdown_table() -> str:
    """`METRICS` as a Markdown table for the documentation."""
    lines = ["| name | what it is | reduction | section of the report |", "|---|---|---|---|"]
    for metric in METRICS:
        text = metric.heading.replace("|", "\\|").replace("<", "&lt;") or "a name of your own"
        lines.append(f"| `{metric.name}` | {text} | {metric.reduction} | {metric.section or '—'} |")
    return "\n".join(lines)
