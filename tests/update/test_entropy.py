"""The adaptive entropy coefficient against TRL's controller, over one sequence of entropies."""

import torch
from conftest import PLAIN, length_reward, padded_rollout, prompts, sapo_config, tiny_model
from trl import GRPOConfig, GRPOTrainer

from sapo_trl.update.entropy import EntropyController

FIELDS = {
    "use_adaptive_entropy": True,
    "entropy_coef": 0.02,
    "entropy_target": 0.5,
    "entropy_coef_delta": 0.03,
    "entropy_coef_min": 0.01,
    "entropy_coef_max": 0.1,
}
# above the target, exactly on it, below it until the largest coefficient holds, and back until the smallest does
ENTROPIES = [0.9, 0.5, 0.2, 0.1, 0.3, 0.4, 0.49, 0.7, 0.8, 0.51, 0.9, 0.6, 0.2]


def trl_moves(tmp_path, tokenizer) -> list[tuple[float, float]]:
    """(coefficient applied, coefficient afterwards) of each step, from TRL's own `_compute_loss`."""
    model = tiny_model(tokenizer)
    batch = padded_rollout(model)
    config = GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=12, **PLAIN, **FIELDS)
    trainer = GRPOTrainer(model, length_reward, config, prompts(), processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    moves = []
    for entropy in ENTROPIES:
        entropies = torch.full(batch["completion_mask"].shape, entropy, requires_grad=True)
        logps = batch["old_per_token_logps"]
        trainer._get_per_token_logps_and_entropies = lambda *a, e=entropies, lp=logps, **k: (lp, e, None)
        loss = trainer._compute_loss(trainer.model, batch)
        (slope,) = torch.autograd.grad(loss, entropies)
        moves.append((-slope.sum().item(), trainer.entropy_coef))
    return moves


def test_it_moves_as_trls(tmp_path, tokenizer):
    controller = EntropyController.from_config(sapo_config(tmp_path, **FIELDS))
    for entropy, (applied, coef) in zip(ENTROPIES, trl_moves(tmp_path, tokenizer), strict=True):
        assert abs(controller.applied - applied) < 1e-6
        controller.move(entropy)
        assert abs(controller.coef - coef) < 1e-9
    assert controller.coef == 0.04  # 0.01 after five steps above the target, then one below it


def test_a_constant_coefficient_stays(tmp_path):
    controller = EntropyController.from_config(sapo_config(tmp_path, entropy_coef=0.01))
    controller.move(0.1)
    assert (controller.applied, controller.coef) == (0.01, 0.01)
    assert EntropyController.from_config(sapo_config(tmp_path)) is None
