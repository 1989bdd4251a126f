"""A training with vLLM in the process, on a CPU; prints what its rollouts, syncs and logs say as one line of JSON.

The oracle is the policy's plain forward on every row of every rollout, with the weights that generated it and with
those of all other rollouts so far.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from conftest import SHAPE, prompts, sapo_config
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from sapo_trl import SAPOTrainer
from sapo_trl.rollout.rows import Row
from sapo_trl.rollout.vllm_ahead import BackgroundVLLM
from sapo_trl.rollout.worker import Job
from sapo_trl.tiny import build_tokenizer

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # vLLM's attention on a CPU takes no smaller heads
CASES = {
    "dense": {"eval_strategy": "steps", "eval_steps": 3},
    "sampler": {"old_logprobs": "sampler", "vllm_importance_sampling_correction": False, "num_mini_batches": 2},
    "moe-lora": {},
    "r3": {"routing_replay": "r3"},
}
AHEAD = {"rollouts_ahead": 1, "old_logprobs": "sampler", "vllm_importance_sampling_correction": False}
CASES["ahead"] = AHEAD | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
CASES["ahead"]["on_collapse"] = "none"  # it moves far on purpose


def build(case: str, folder: Path, tokenizer) -> str:
    """Path of a saved model: a tied head in `dense` and `server`, experts in all but `dense`, `sampler`, `ahead`."""
    torch.manual_seed(0)
    shape = SHAPE | WIDE | {"vocab_size": len(tokenizer), "initializer_range": 0.1}
    shape["tie_word_embeddings"] = case in ("dense", "server")
    if case in ("dense", "sampler", "ahead"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        layers = {"num_hidden_layers": 3, "mlp_only_layers": [1]}  # one layer without experts between two with
        experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(shape | layers | experts)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Measured(SAPOTrainer):
    """Compares the engine's log-probs of every rollout with the policy's: as it was when the rollout was generated, and
    as it was at the beginning of the others."""

    def train(self, checkpoint=None):
        if checkpoint is None:
            self.gaps, self.weights, self.completions = [], {}, []
        return super().train(checkpoint)

    def _generated_rows(self, rollout, generation_batch):
        rows, num_tokens = super()._generated_rows(rollout, generation_batch)
        trained, now = [p for p in self.model.parameters() if p.requires_grad], self.state.global_step
        present = [p.detach().clone() for p in trained]
        gaps = {"mode": self._mode, "step": now, "tokens": sum(row.num_trained for row in rows)}
        if self._mode == "eval":
            gaps["now"] = self._gap(rows)
        else:
            self.weights[now] = present
            self.completions += [row.input_ids.tolist() for row in rows]
            gaps["step"] = rollout.weights_step if self._ahead else now
            of = {step: self._gap_under(weights, trained, rows) for step, weights in self.weights.items()}
            gaps["now"] = of.pop(gaps["step"])
            gaps["before"] = min(of.values(), default=None)
            self._set(trained, present)
        self.gaps.append(gaps)
        return rows, num_tokens

    def _gap_under(self, weights, trained, rows) -> float:
        self._set(trained, weights)
        return self._gap(rows)

    def _set(self, parameters, weights) -> None:
        for p, values in zip(parameters, weights, strict=True):
            p.data.copy_(values)

    @torch.no_grad()
    def _gap(self, rows: list[Row]) -> float:
        """Largest |log p(engine) - log p(policy)| over all tokens of the rows."""
        worst = 0.0
        for row in rows:
            logits = self.model(input_ids=row.input_ids[None]).logits[0, row.predicting]
            logps = logits.float().log_softmax(-1).gather(1, row.targets[:, None])[:, 0]
            worst = max(worst, (logps - row.sampler_logps).abs().max().item())
        return worst


def three_runs(trainer: Measured) -> dict:
    """Train from the same weights, from a checkpoint of that run, and again: are the runs equal? And does a rollout
    ahead draw what the trainer draws from, who goes on meanwhile?"""
    first, found = {name: x.clone() for name, x in trainer.model.state_dict().items()}, []
    for checkpoint in (None, str(trainer.args.folder / "checkpoint-3"), None):
        trainer.model.load_state_dict(first)
        trainer.optimizer = trainer.lr_scheduler = None
        set_seed(trainer.args.seed)
        trainer.train(checkpoint)
        found.append(([*trainer.completions], {name: x.clone() for name, x in trainer.model.state_dict().items()}))
    (texts, weights), (_, resumed), (texts_again, weights_again) = found
    engine, random_state = BackgroundVLLM(trainer.vllm_generation, 1, lambda: 0), torch.get_rng_state()
    engine.start(Job([[5, 6], [7]], [4, 2], None, 1))
    lengths = [len(ids) for ids in engine.join().ids]
    return {
        "equal": texts == texts_again and all(torch.equal(x, weights_again[name]) for name, x in weights.items()),
        "resumed": all(torch.equal(x, resumed[name]) for name, x in weights.items()),
        "draws": not torch.equal(random_state, torch.get_rng_state()),
        "lengths": lengths,
    }


def main(case: str, folder: str) -> None:
    tokenizer = build_tokenizer()
    both = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=4, lora_alpha=32, target_parameters=both)
    fields = {"num_mini_batches": 2, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "engine_check_every": 1}
    fields |= {"use_vllm": True, "vllm_max_model_length": 64, "on_collapse": "stop", "lr_scheduler_type": "constant"}
    config = sapo_config(folder, **(fields | CASES[case]))
    reward = lambda completions, completion_ids, **_: [float(sum(ids) % 3) for ids in completion_ids]  # noqa: E731
    trainer = Measured(
        build(case, Path(folder) / "model", tokenizer), reward, config, prompts(), prompts(4),
        processing_class=tokenizer, peft_config=lora if case == "moe-lora" else None,
    )  # fmt: skip
    result = {}
    if case == "ahead":
        result = three_runs(trainer)
    else:
        trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    evaluations = [record for record in trainer.state.log_history if "eval_reward" in record]
    result |= {"gaps": trainer.gaps, "log": log, "evaluations": evaluations}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
