"""Shared worlds: tiny Qwen3 models, trainers around them, and off-policy rollouts in TRL's padded form."""

import copy
import os
import signal
import tempfile

# Tiny models gain nothing from a second thread and lose a lot to it on a busy machine. Before torch starts; child
# processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A name that no folder has would be looked up five times before it is given up
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.rollout import ahead, worker
from sapo_trl.rollout.rows import rows_from_padded
from sapo_trl.tiny import build_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# bf16, checkpointing and reports off; nothing here is what a test is about
PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


_FOLDERS: dict[bool, tempfile.TemporaryDirectory] = {}


def tiny_model(tokenizer, moe: bool = False):
    """A Qwen3 of 2 layers with weights large enough that tokens differ clearly in probability.

    Loaded from a folder: TRL reloads the reference model by the policy's path.
    """
    if moe not in _FOLDERS:
        _FOLDERS[moe] = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        shape = SHAPE | {"vocab_size": len(tokenizer), "initializer_range": 0.1}
        if moe:
            config = Qwen3MoeConfig(**shape, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
            model = Qwen3MoeForCausalLM(config)
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        model.save_pretrained(_FOLDERS[moe].name)
    return AutoModelForCausalLM.from_pretrained(_FOLDERS[moe].name, dtype=torch.float32)


def length_reward(completions, **kwargs):
    """Differs between completions, so that groups are alive."""
    return [float(len(completion) % 5) for completion in completions]


def prompts(num: int = 64):
    return Dataset.from_list([{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(num)])


def sapo_config(tmp_path, **fields) -> SAPOConfig:
    defaults = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12}
    return SAPOConfig(output_dir=str(tmp_path), **(PLAIN | defaults | fields))


def sapo_trainer(tmp_path, tokenizer, model, **fields) -> SAPOTrainer:
    extra = {
        name: fields.pop(name) for name in ("objective", "rollout_func", "callbacks", "eval_dataset") if name in fields
    }
    config = sapo_config(tmp_path, **fields)
    return SAPOTrainer(copy.deepcopy(model), length_reward, config, prompts(), processing_class=tokenizer, **extra)


@torch.no_grad()
def sample(model, prompt: list[int], seed: int | None, temperature: float, limit: int) -> tuple[list, list]:
    """(ids, log-probs) of a completion, as an engine would give them; without a seed from torch's random stream."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids, drawn = list(prompt), []
    while len(drawn) < limit and (not drawn or ids[-1] != model.config.eos_token_id):
        logps = (model(torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)
        ids.append(int(torch.multinomial(logps.exp(), 1, generator=generator)))
        drawn.append(logps[ids[-1]].item())
    return ids[len(prompt) :], drawn


class ForkedWorker:
    """The rollout worker as a child of this process: the same code without seconds of imports. One thread each."""

    def __init__(self, connection: int, memory: int, threads: int):
        parent, self.status = os.getpid(), None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                worker.main(connection, parent, threads)
            finally:
                os._exit(0)

    def kill(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


@pytest.fixture
def forked_worker(monkeypatch):
    monkeypatch.setattr(ahead, "start_process", ForkedWorker)


def padded_rollout(model, seed: int = 1, temperature: float = 1.0, tool_mask: bool = False, drift: float = 0.3) -> dict:
    """Eight rows in TRL's form, off-policy by `drift` in log-ratio, some with A < 0, one with A = 0, one of 1 token."""
    g = torch.Generator().manual_seed(seed)
    prompt_lengths = [3, 5, 2, 7, 4, 4, 6, 3]
    lengths = [9, 4, 12, 1, 7, 7, 2, 11]
    width_p, width_c, rows = max(prompt_lengths), max(lengths), len(lengths)
    ids = torch.randint(3, model.config.vocab_size, (rows, width_p + width_c), generator=g)
    columns_p, columns_c = torch.arange(width_p), torch.arange(width_c)
    prompt_mask = (columns_p >= width_p - torch.tensor(prompt_lengths)[:, None]).long()
    completion_mask = (columns_c < torch.tensor(lengths)[:, None]).long()
    batch = {
        "prompt_ids": ids[:, :width_p] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, width_p:] * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0, 0.9, -0.2, 2.0]),
    }
    if tool_mask:
        batch["tool_mask"] = (columns_c % 4 != 2).long().repeat(rows, 1)
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    logps = plain_logps(model, batch, temperature)
    noise = lambda scale: scale * torch.randn(logps.shape, generator=g)  # noqa: E731
    batch["old_per_token_logps"] = (logps + noise(drift)) * completion_mask
    batch["ref_per_token_logps"] = (logps + noise(0.5)) * completion_mask
    batch["sampling_per_token_logps"] = (batch["old_per_token_logps"] + noise(drift)) * completion_mask
    batch["num_items_in_batch"] = 4 * mask.sum()
    return batch


@torch.no_grad()
def plain_logps(model, batch, temperature: float):
    """log-probs of the completion tokens, (B, C), by the model's ordinary forward on each row alone."""
    out = torch.zeros(batch["completion_ids"].shape)
    for i in range(len(out)):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0].float() / temperature
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        out[i, : len(completion)] = logps.gather(1, completion[:, None])[:, 0]
    return out


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(a: dict, b: dict) -> float:
    """Norm of the difference of all gradients over the norm of the second."""
    assert a.keys() == b.keys() and a
    difference = torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
    return float(difference / torch.cat([b[name].flatten() for name in a]).norm())


def one_update(trainer, batch, rows=None) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """(loss, gradients, metrics) of a padded rollout, or of `rows`, as one mini-batch through the packed update."""
    trainer.model.train()
    trainer.model.zero_grad()
    rows, tokens = rows_from_padded(batch) if rows is None else rows, float(batch["num_items_in_batch"])
    (mini_batch,) = trainer._forward.plan_mini_batches([rows], trainer._plan.active([rows]), tokens)
    with trainer._forward.packed(trainer.model):
        result, values = trainer.run_mini_batch(trainer.model, mini_batch, backward=True)
    return result.loss.item(), gradients(trainer.model), values
