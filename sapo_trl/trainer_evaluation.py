"""Evaluations while training: every problem counts once, and every set has sampling and names of its own."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import GRPOTrainer

from sapo_trl.config import SAPOConfig
from sapo_trl.data.preflight import check_eval_datasets
from sapo_trl.eval_sets import EvalSet
from sapo_trl.evaluation.training import EvaluationRecord
from sapo_trl.monitor.watchdog import Watchdog
from sapo_trl.rewards import accuracy_reward
from sapo_trl.rewards.contract import reward_name
from sapo_trl.setup_checks import check_evaluation_batch

# Under this name `accuracy_reward` is logged: its mean over an evaluation set is Pass@1
ACCURACY = reward_name(accuracy_reward)


class EvaluationTrainer(GRPOTrainer):
    """TRL's trainer whose evaluations count every problem once."""

    args: SAPOConfig
    reward_funcs: list[Any]
    num_generations_eval: int
    _eval_set: EvalSet | None = None  # the one of `eval_sets` that is evaluated now
    _watchdog: Watchdog

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """TRL's, with the sampling that `eval_sets` names for this set."""
        name = eval_dataset if isinstance(eval_dataset, str) else metric_key_prefix.removeprefix("eval_")
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_eval_datasets(eval_dataset, self.reward_funcs, self.rollout_func, self.environment_factories)
        usual, self._eval_set = self.num_generations_eval, self.args.evaluation_sets.get(name)
        if self._eval_set is not None and self._eval_set.num_samples is not None:
            self.num_generations_eval = self._eval_set.num_samples
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.num_generations_eval, self._eval_set = usual, None

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """TRL's; every problem counts once, and every set has names of its own."""
        check_evaluation_batch(self.args, self.num_generations_eval)
        dataset = self.eval_dataset if dataloader is None else dataloader.dataset
        num = len(dataset) * self.num_generations_eval if isinstance(dataset, Dataset) else None
        ks = (self.num_generations_eval,) if self._eval_set is None else self._eval_set.ks or ()
        self._evaluation = EvaluationRecord(num, self.num_generations_eval, ks)
        with self._watchdog.phase("evaluation", self.state.global_step):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        logged, weights = self._metrics["eval"], self.reward_weights
        values = self._evaluation.values(logged, self.reward_func_names, weights, ACCURACY)
        logged.clear()  # TRL would log them as eval_<name>, whatever the set
        prefix = kwargs.get("metric_key_prefix", "eval")
        if output.metrics is not None:
            output.metrics.update({f"{prefix}_{name}": value for name, value in values.items()})
        return output
