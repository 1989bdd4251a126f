"""The run of a `SAPOTrainer`: exact resume, signals, and checkpoints that are either whole or not there."""

from __future__ import annotations

from contextlib import closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState

from sapo_trl.checkpoints import weights
from sapo_trl.checkpoints.capture import capture, moving_reference, restore
from sapo_trl.checkpoints.disk import explained
from sapo_trl.checkpoints.resume import agreed_checkpoint, finished, identity, stream_place
from sapo_trl.checkpoints.saving import write_checkpoint
from sapo_trl.files import way_back, write_text
from sapo_trl.monitor.card import model_card
from sapo_trl.monitor.files import recorded_settings
from sapo_trl.monitor.preemption import Preemption
from sapo_trl.monitor.watchdog import peers_named
from sapo_trl.rollout.sampler import EpochSampler
from sapo_trl.setup_checks import refuse_bypassed_attributes
from sapo_trl.trainer_prompts import PromptTrainer
from sapo_trl.trl_seams import TrainOutput, loaded_from, run_folder
from sapo_trl.update.finite import (
    BeforeOptimizerStep,
    FiniteGuard,
    NonFiniteError,
    check_replicas,
    nonfinite_parameters,
    replica_checksum,
)


class CheckpointTrainer(PromptTrainer):
    """A trainer whose killed runs go on bit for bit; `checkpoints/` has what is written and read."""

    has_trained: bool  # a resumed run may have had nothing left to do
    num_iterations: int
    _finite: FiniteGuard
    _before_step: BeforeOptimizerStep
    _preemption: Preemption

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """transformers' `train`; every call starts with a rollout of its own.

        Args:
            resume_from_checkpoint: a folder, or True, `true` or `latest` for the newest valid checkpoint of
                `output_dir`; default: the field of the same name.

        Raises:
            ValueError: a damaged checkpoint, or one of a run with other settings. Before anything is changed.
            PeerError: another process of the run has ended.
        """
        refuse_bypassed_attributes(self)
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        folder, notes = agreed_checkpoint(wanted, self.args.folder, self._identity, self.accelerator)
        self.accelerator.print(*notes, sep="\n", flush=True) if notes else None
        planned = 0 if folder is None else self._planned_steps()
        if folder is not None and (end := finished(folder, planned)) is not None:
            step, why = end
            self.accelerator.print(f"resume: {folder} is at {why}: nothing is left to do; it holds the model")
            self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint and self.loads_finished:
                self._load_best_model()
            elif self.loads_finished:
                self._load_from_checkpoint(str(folder))
            return TrainOutput(step, 0.0, {})
        self._rollout, self._step, self.has_trained = None, 0, True
        self._prompts = self._new_prompts()
        self._finite.reset()
        callbacks = self.callback_handler.callbacks  # whoever was added since sees the gradients before
        callbacks.append(callbacks.pop(callbacks.index(self._before_step)))
        with (
            closing(self._watchdog),
            nullcontext() if self._ahead is None else self._ahead.running(),
            self._preemption.installed(),
            peers_named(self.accelerator.process_index, self.accelerator.num_processes, self.args.folder),
            explained(self.args.folder),
        ):
            output = super().train(str(folder) if folder else None, *args, **kwargs)
        if self._finite.failure:
            raise NonFiniteError(self._finite.failure)
        if not self.state.global_step and isinstance(self.train_dataset, IterableDataset):
            num = self.plan.prompts_per_rollout
            raise ValueError(f"nothing was trained: the stream ended before the {num} prompts of one rollout.")
        check_replicas(self.accelerator.gather(self._checksum()).tolist(), self.state.global_step + 1)
        return output

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        """transformers' own, which with `save_total_limit: 1` would delete the last checkpoint beside the best one, and
        with the mean loss of the whole run."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
            return TrainOutput(output.global_step, self.mean_loss, output.metrics)
        finally:
            self.args.save_total_limit = limit

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _checksum(self) -> Tensor:
        """`replica_checksum` of the policy, (1,)."""
        checksum = replica_checksum(self.model, self.accelerator)
        return torch.as_tensor(checksum, device=self.accelerator.device).view(1)

    @property
    def preempted_at(self) -> int | None:
        """The step after which a signal ended the last `train`, or None."""
        return self._preemption.stopped_at

    @property
    def loads_finished(self) -> bool:
        """Whether `train` loads the weights of a run that it finds finished: ZeRO and FSDP do so as they begin only."""
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def _engine_loads(self) -> bool:
        """ZeRO and FSDP keep the weights in files of their own and load them strictly; PEFT loads adapters."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel)

    @cached_property
    def _identity(self) -> dict:
        """What decides whether a resumed run is the same run."""
        return identity(self.args, self.train_dataset) | {"reward_funcs": self.reward_func_names}

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """The model card, then a checkpoint that is either whole or not there."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = Path(run_folder(self, trial))
        self.create_model_card()
        # a run that a signal ends must be able to go on
        model_only = self.args.save_only_model and self.preempted_at is None
        if self._ahead is not None and not model_only:
            with self._watchdog.phase("rollout", self.state.global_step):
                self._ahead.join()
        with self._watchdog.phase("save", self.state.global_step):
            facts: dict[str, Any] = {"identity": self._identity}
            if self._ends_for_lack_of_prompts():
                facts["ended"] = self._solved()
            write_checkpoint(self, folder, capture(self), facts, model_only, moving_reference(self))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """README.md of the output folder, as TRL's method of this name writes it when a model is saved or pushed.

        Args:
            model_name: default: the last part of the Hub id, of `run_name` or of `output_dir`.
            dataset_name: a preset or a Hub id; default: that of the run's settings, where it is known.
            tags: besides the trainer's own.
        """
        if not self.is_world_process_zero():
            return
        place = self.hub_model_id or str(self.args.folder)
        name = model_name or Path(self.hub_model_id or self.args.run_name or self.args.folder).name
        base = loaded_from(self.model.config)
        settings = recorded_settings(self)
        settings = settings if dataset_name is None else {**settings, "dataset_name": dataset_name}
        more = [tags] if isinstance(tags, str) else tags or []
        known = None if not base or Path(base).exists() else base
        card = model_card(
            name, place, known, self.args, settings, self.state.log_history, sorted({*more, *self._tag_names})
        )
        write_text(self.args.folder / "README.md", card)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' `save_model`, which refuses weights that are not finite.

        Raises:
            NonFiniteError: names the parameters; nothing is written.
        """
        if names := nonfinite_parameters(self.model):
            raise NonFiniteError(
                f"the weights of {', '.join(names[:3])} ({len(names)} in all) are not finite, so they are not saved to "
                f"{output_dir or self.args.output_dir}. {way_back(self.args.folder)}"
            )
        folder = Path(output_dir or self.args.folder)
        super().save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads, with the Hub's token
        if _internal_call:  # on every process: a checkpoint
            weights.save_hash(self.model, folder, self.accelerator)
        elif self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """transformers' own leaves a Mixture-of-Experts model with the experts of the base weights."""
        if self._engine_loads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            weights.load_weights(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The first call after whoever loaded the weights of a resumed run: they are compared with those saved."""
        if checkpoint is not None:
            self.accelerator.print(weights.compare_hash(self.model, checkpoint, self.accelerator))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self._engine_loads:
            super()._load_best_model()
        else:
            weights.load_weights(self.model, best)
        self.accelerator.print(f"best model: {weights.compare_hash(self.model, best, self.accelerator)}")

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        """TRL's order of prompts, also after a resume in a later epoch."""
        return EpochSampler(
            epoch=lambda: int(self.state.epoch or 0),
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.plan.prompts_per_rollout,
            repeat_count=self.plan.steps_per_rollout * self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """(passes over the data, batches of the pass that has begun) where the run goes on."""
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or isinstance(self.train_dataset, Dataset) or self.args.ignore_data_skip:
            return place
        return stream_place(Path(resume_from_checkpoint), self.args.gradient_accumulation_steps)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last call before the first step of a resumed run: random states, and everything in the run state."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.accelerator.print(*restore(self, Path(checkpoint)), sep="\n")
