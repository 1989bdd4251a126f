"""The collapse guard: it compares the signals of a run with their own history, and warns or stops.

One value per rollout and signal is judged, the mean over the rollout's logged steps, because the value of a single step
depends on its place in the rollout, whose first update is on-policy; of the drift the last one, which has seen all of
the rollout's updates but its own. A value that a rule refuses is a strike, and is
not added to the history; `PATIENCE` strikes in a row raise an alarm. A number that is not finite, or a value over a
`limit`, raises one at once: after such an update every group may get equal rewards, and no second value is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from sapo_trl.monitor.files import Logs, record_warning

WARM_UP = 4  # rollouts of history before it can refuse anything; `Rule.limit` needs none
PATIENCE = 2  # rollouts in a row; for the reward, whose best needs no warm-up, more until WARM_UP + 1 were judged
NOISE = 4.0  # a value within so many standard deviations of the usual one is never refused
BEST_OF = 4  # rollouts of the running mean whose best is the usual reward
MAX_HISTORY = 256
# Drift over which a rollout no longer describes the policy, and the same while the reward is under `FALLING` times its
# best running mean. What 320 runs say of both: docs/gate.md.
MAX_DRIFT, MAX_DRIFT_FALLING, FALLING = 1.0, 0.2, 0.8


@dataclass(frozen=True)
class Rule:
    """When a signal is refused: under `below` or over `above` times its usual value, or over `limit` at any time, over
    `limit_falling` while the reward falls.

    `rise` is the smallest increase that counts. The usual value is the median of the history, or its best running mean
    (`of_best`). `of_last`: the rollout's last logged value is judged, not its mean. `reading` says what a refused value
    means and what to do.
    """

    signal: str
    reading: str
    below: float | None = None
    above: float | None = None
    limit: float | None = None
    limit_falling: float | None = None
    rise: float = 0.0
    of_best: bool = False
    of_last: bool = False
    must_be_finite: bool = True


_STEP_TOO_LARGE = "the policy moves too far per rollout: lower learning_rate or num_mini_batches"
_WRONG_ENGINE = (
    "the engine does not hold the policy's weights, or computes in a coarser number format than it says: look at what "
    "is sent to it after an update"
)
RULES = (
    Rule("entropy", "sampling has become random or always the same: lower learning_rate", 0.1, 5.0, rise=0.2),
    Rule("grad_norm", "the loss is no longer smooth where the policy is: lower learning_rate", above=10.0),
    Rule("effective_update_ratio", _STEP_TOO_LARGE, below=0.5),
    Rule("log_ratio/abs_mean", _STEP_TOO_LARGE, above=5.0, limit=0.5, rise=0.05),
    Rule("log_ratio/drift", _STEP_TOO_LARGE, limit=MAX_DRIFT, limit_falling=MAX_DRIFT_FALLING, of_last=True),
    Rule("sampling/kl", "rollout engine and trainer disagree: check that vLLM gets the weights", above=5.0, rise=0.05),
    Rule("sampling/engine_check", _WRONG_ENGINE, limit=1.0),
    Rule("reward", "the policy answers worse than it did", below=0.5, of_best=True, must_be_finite=False),
    Rule("loss", "the weights are lost from this step on; go back to an earlier checkpoint"),
)


def usual(rule: Rule, history: Sequence[float]) -> float:
    """The value that the next one is compared with; NaN without a history."""
    if not history:
        return math.nan
    if not rule.of_best:
        return median(history)
    ends = range(min(BEST_OF, len(history)), len(history) + 1)
    return max(fmean(history[max(0, end - BEST_OF) : end]) for end in ends)


def noise(history: Sequence[float]) -> float:
    """Standard deviation of one value, robust to outliers and to a trend: from the median step between neighbours."""
    steps = [abs(b - a) for a, b in pairwise(history)]
    return 1.4826 / math.sqrt(2) * median(steps) if steps else 0.0


def refused(rule: Rule, history: Sequence[float], value: float) -> str:
    """Why `value` is refused after `history`; an empty string if it is not."""
    if rule.limit is not None and value > rule.limit:
        return f"is above {rule.limit:g}"
    if len(history) < (1 if rule.of_best else WARM_UP):
        return ""
    centre, scale = usual(rule, history), NOISE * noise(history)
    whose = "best running mean" if rule.of_best else "usual"
    if rule.below is not None and centre - value > max((1 - rule.below) * abs(centre), scale):
        return f"is below {rule.below:g} x its {whose} {centre:.3g}"
    if rule.above is not None and value - centre > max((rule.above - 1) * abs(centre), scale, rule.rise):
        return f"is above {rule.above:g} x its {whose} {centre:.3g}"
    return ""


@dataclass(frozen=True)
class Alarm:
    """An alarm about one signal; `usual` is NaN without a history."""

    step: int
    signal: str
    value: float
    usual: float
    message: str


class CollapseGuard(TrainerCallback, ExportableState):
    """Judges each rollout by `RULES`; `args.on_collapse` says what an alarm does.

    `warn`: one line per signal and episode (an episode ends with a value that is not refused), also in
    `warnings.jsonl`. `stop`: the same, then a checkpoint is saved and training ends; `stopped_by` holds the alarms.

    The history is part of the checkpoint. A resumed run goes on with it, and may repeat an alarm.
    """

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self.history: dict[str, list[float]] = {rule.signal: [] for rule in RULES}
        self.window: dict[str, list[float]] = {}  # values of the rollout now running
        self.strikes: dict[str, int] = dict.fromkeys(self.history, 0)
        self.rollouts = 0  # judged
        self.stopped_by: list[Alarm] = []

    def state(self) -> dict:
        names = ("history", "window", "rollouts")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget()
        if state.global_step > 0:  # transformers restores callbacks only if asked to, and here nobody should have to
            for name, value in state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).items():
                setattr(self, name, value)

    def on_log(self, args, state, control, logs: Logs | None = None, **kwargs):
        logs = logs or {}
        if args.on_collapse == "none" or not self.history.keys() & logs.keys():
            return
        alarms = self.judge(state.global_step, logs, args.num_mini_batches * args.num_iterations)
        if args.world_size > 1:  # one decision for all: a process that went on alone would wait for the others forever
            alarms = broadcast_object_list([alarms])[0]
        for alarm in alarms if state.is_world_process_zero else ():
            print(f"collapse guard, step {alarm.step}: {alarm.message}", flush=True)
            record_warning(args.output_dir, alarm.step, "guard", alarm.message, alarm.signal, alarm.value, alarm.usual)
        if alarms and args.on_collapse == "stop":
            self.stopped_by += alarms
            control.should_save = control.should_training_stop = True

    def judge(self, step: int, logs: Logs, steps_per_rollout: int = 1) -> list[Alarm]:
        """The alarms of one log record; values count once their rollout is complete."""
        alarms = [alarm for rule in RULES if (alarm := self._not_finite(rule, step, logs))]
        for name in self.history:
            if (value := logs.get(name)) is not None and math.isfinite(value):
                self.window.setdefault(name, []).append(value)
        if step // steps_per_rollout > self.rollouts:
            window, self.window, self.rollouts = self.window, {}, step // steps_per_rollout
            falls = self._falls(window.get("reward", []))
            for rule in RULES:
                if falls and rule.limit_falling is not None:
                    reading = f"the reward falls, and {rule.reading}"
                    rule = replace(rule, limit=rule.limit_falling, reading=reading)
                if values := window.get(rule.signal):
                    alarm = self._judge(rule, step, values[-1] if rule.of_last else fmean(values))
                    alarms += [alarm] if alarm else []
        return alarms

    def _falls(self, rewards: Sequence[float]) -> bool:
        """Whether the rollout's reward is under `FALLING` times its best running mean, by more than its noise."""
        (rule,) = (rule for rule in RULES if rule.of_best)
        history = self.history[rule.signal]
        if not rewards or len(history) < 2:
            return False
        best = usual(rule, history)
        return best > 0 and best - fmean(rewards) > max((1 - FALLING) * best, noise(history))

    def _not_finite(self, rule: Rule, step: int, logs: Logs) -> Alarm | None:
        """TRL logs a mean of nothing but NaN as None."""
        value = logs.get(rule.signal, 0.0)
        value = math.nan if value is None else value
        if not rule.must_be_finite or math.isfinite(value):
            return None
        is_told, self.strikes[rule.signal] = self.strikes[rule.signal] >= PATIENCE, PATIENCE
        return None if is_told else self._alarm(rule, step, value, "is not finite")

    def _judge(self, rule: Rule, step: int, value: float) -> Alarm | None:
        name = rule.signal
        patience = max(PATIENCE, WARM_UP + 1 - len(self.history[name])) if rule.of_best else PATIENCE
        if not (why := refused(rule, self.history[name], value)):
            self.strikes[name] = 0
            self.history[name] = [*self.history[name], value][-MAX_HISTORY:]
            return None
        self.strikes[name] += 1
        if rule.limit is not None and value > rule.limit:
            self.strikes[name] = max(patience, self.strikes[name])
            why += " at this rollout's last mini-batch" if rule.of_last else " in this rollout's mean"
        else:
            why += f" in {patience} rollouts in a row"
        return self._alarm(rule, step, value, why) if self.strikes[name] == patience else None

    def _alarm(self, rule: Rule, step: int, value: float, why: str) -> Alarm:
        message = f"{rule.signal} {value:.3g} {why}; {rule.reading}."
        return Alarm(step, rule.signal, value, usual(rule, self.history[rule.signal]), message)


def collapse_alarms(trainer: Trainer) -> list[Alarm]:
    """The alarms for which the guard has ended the run; empty if it has not."""
    guards = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CollapseGuard))
    return [alarm for guard in guards for alarm in guard.stopped_by]
