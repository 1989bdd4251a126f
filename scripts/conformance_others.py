"""The conformance test on the losses of TRL (installed), verl and ms-swift (from their wheels alone).

    pip download --no-deps verl==0.9.1 ms-swift==4.6.0 -d wheels
    python scripts/conformance_others.py --wheels wheels --output docs/results/conformance.json

A wheel's loss is compiled from its own source with what it calls there; a trainer's method is called on an object with
the attributes that it reads.
"""

import argparse
import ast
import json
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOTrainer
from trl import __version__ as trl_version

from sapo_trl.conformance import ALGORITHMS, Loss, check
from sapo_trl.files import write_json

CLIP = {"sapo": (0.2, 0.2), "grpo": (0.2, 0.27), "gspo": (3e-4, 4e-4)}


def trl_loss(algorithm: str) -> Loss:
    """`GRPOTrainer._compute_loss` behind given log-probs."""

    def loss(logps, old_logps, advantages, mask):
        low, high = CLIP[algorithm]
        args = SimpleNamespace(
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, delta=None, use_bias_correction_kl=False
        )
        accelerator = SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, **k: x, num_processes=1, device=torch.device("cpu")
        )
        trainer: Any = GRPOTrainer.__new__(GRPOTrainer)
        vars(trainer).update(
            args=args, loss_type="sapo" if algorithm == "sapo" else "grpo", beta=0.0, epsilon_low=low,
            epsilon_high=high, model=torch.nn.Module(), accelerator=accelerator,
            importance_sampling_level="sequence" if algorithm == "gspo" else "token", top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False, tools=None,
            current_gradient_accumulation_steps=1, aux_loss_enabled=False, _entropy_bonus_enabled=False,
            use_adaptive_entropy=False, environments=None, _metrics={"train": defaultdict(list)},
        )  # fmt: skip
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros_like(logps), None)
        batch = {
            "prompt_ids": torch.zeros(len(logps), 1, dtype=torch.long), "prompt_mask": torch.ones(len(logps), 1),
            "completion_ids": torch.zeros_like(mask, dtype=torch.long), "completion_mask": mask,
            "old_per_token_logps": old_logps, "advantages": advantages, "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        return trainer._compute_loss(trainer.model, batch)

    return loss


def source(wheels: Path, project: str, member: str) -> tuple[str, str]:
    """(version, text of a module) of the project's wheel."""
    (path,) = wheels.glob(f"{project}-*.whl")
    with zipfile.ZipFile(path) as wheel:
        return path.name.split("-")[1], wheel.read(member).decode()


def compiled(text: str, names: Sequence[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """The named functions of a module, or of its classes, compiled without the rest and without decorators."""
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name in names]
    for node in found:
        node.decorator_list = []
    code = "from __future__ import annotations\n" + "\n".join(ast.unparse(node) for node in found)
    exec(compile(code, "wheel", "exec"), namespace)
    return namespace


def verl_loss(wheels: Path, algorithm: str) -> tuple[str, Loss]:
    version, functional = source(wheels, "verl", "verl/utils/torch_functional.py")
    tools = SimpleNamespace(**compiled(functional, ("masked_sum", "masked_mean"), {"torch": torch}))
    _, text = source(wheels, "verl", "verl/trainer/ppo/core_algos.py")
    low, high = CLIP[algorithm]

    class Config(SimpleNamespace):
        def get(self, name, default=None):
            return vars(self).get(name, default)

    name = f"compute_policy_loss_{'vanilla' if algorithm == 'grpo' else algorithm}"
    other = type("AlgoConfig", (), {})
    space = {"torch": torch, "verl_F": tools, "ActorConfig": Config, "AlgoConfig": other}
    compiled(text, (name, "agg_loss"), space)
    config = Config(
        tau_pos=1.0, tau_neg=1.05, clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=1e9,
        global_batch_info={},
    )  # fmt: skip

    def loss(logps, old_logps, advantages, mask):
        wide = advantages[:, None].expand_as(logps)
        return space[name](old_logps, logps, wide, mask, loss_agg_mode="seq-mean-token-mean", config=config)

    return version, loss


def swift_loss(wheels: Path, algorithm: str) -> tuple[str, Loss]:
    version, text = source(wheels, "ms_swift", "swift/rlhf_trainers/grpo_trainer.py")
    space = {"torch": torch, "gather_object": lambda x: x, "nanmin": torch.min, "nanmax": torch.max}
    space |= {"WINDOW_NORMALIZED_LOSS_TYPES": ()}
    method = compiled(text, ("_compute_loss_and_metrics",), space)["_compute_loss_and_metrics"]
    low, high = CLIP[algorithm]

    def loss(logps, old_logps, advantages, mask):
        trainer = SimpleNamespace(
            model=torch.nn.Module(), compute_entropy=False, overlong_filter=False, beta=0.0, kl_in_reward=False,
            rollout_importance_sampling_mode=None, log_rollout_offpolicy_metrics=False, _has_teacher=False,
            disable_rollout_importance_sampling=True, loss_type="sapo" if algorithm == "sapo" else "grpo",
            importance_sampling_level="sequence" if algorithm == "gspo" else "token", tau_pos=1.0, tau_neg=1.05,
            epsilon_low=low, epsilon_high=high, args=SimpleNamespace(delta=None), off_policy_sequence_mask_delta=None,
            sdar_loss_coef=0.0, chord_sft_iterator=None, accelerator=SimpleNamespace(gather_for_metrics=lambda x: x),
            _get_per_token_logps_and_entropies=lambda *a, **k: (logps, None),
        )  # fmt: skip
        batch = SimpleNamespace(
            completion_mask=mask, truncated_mask=torch.zeros(len(mask), dtype=torch.bool),
            old_per_token_logps=old_logps, advantages=advantages[:, None].expand_as(logps),
            rollout_per_token_logps=None, teacher_per_token_logps=None,
        )  # fmt: skip
        return method(trainer, trainer.model, {}, batch)

    return version, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for algorithm in ALGORITHMS:
        losses = {
            "trl": (trl_version, trl_loss(algorithm)),
            "verl": verl_loss(arguments.wheels, algorithm),
            "ms-swift": swift_loss(arguments.wheels, algorithm),
        }
        for project, (version, loss) in losses.items():
            verdicts, looks_like = check(loss, algorithm)
            wrong = [v for v in verdicts if not v.passed]
            failed = {v.case: v.error or ("differs" if v.finite else "not finite") for v in wrong}
            rows.append({"project": f"{project} {version}", "algorithm": algorithm, "cases": len(verdicts),
                         "failed": failed, "looks_like": looks_like})  # fmt: skip
            print(json.dumps(rows[-1]))
    if arguments.output is not None:
        write_json(arguments.output, {"command": "python scripts/conformance_others.py", "rows": rows})


if __name__ == "__main__":
    main()
