"""Under torchrun, or alone: two optimizer steps of the update over several packs, with the model under FSDP2 if there
are two processes.

accelerate shards on GPUs only, so the model is wrapped here, into the units that its `fsdp2_prepare_model` makes.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import padded_rollout, sapo_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from sapo_trl.rollout.rows import rows_from_padded
from sapo_trl.tiny import build_tokenizer
from sapo_trl.update.loss import RouterLoss
from sapo_trl.update.parts import assemble


def made(kind: str):
    model = tiny_model(build_tokenizer(), kind == "moe")
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.train()


def shard(model, world: int) -> None:
    options = {"mesh": init_device_mesh("cpu", (world,))}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    ends = [model.model.norm, model.lm_head]
    if model.config.tie_word_embeddings:
        ends.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, **options)
    fully_shard(ends, **options, reshard_after_forward=False)
    fully_shard(model, **options)


def main(output: str, kind: str, base, model) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    config = sapo_config(output + ".run", per_device_train_batch_size=8 // world, max_tokens_per_pack=30)
    accelerator = Accelerator(cpu=True)  # after the config, which starts the state anew
    router = RouterLoss(8, 2, 0.01) if kind == "moe" else None
    parts = assemble(
        model, None, accelerator, config, config.build_objective(), router, pad_token_id=0, follows_generation=False,
        auto_checkpointing=False, has_images=False,
    )  # fmt: skip
    waits = []
    if world > 1:
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        parts.update.engine.__init__(accelerator)
        shard(model, world)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        set_sync = FSDPModule.set_requires_gradient_sync
        FSDPModule.set_requires_gradient_sync = lambda self, on, **kw: (waits.append(on), set_sync(self, on, **kw))
    gradients, packs = [], []
    for step in range(2):
        batch = padded_rollout(base, seed=step)
        rows = rows_from_padded(batch)[rank * 8 // world : (rank + 1) * 8 // world]
        tokens = float(batch["completion_mask"].sum()) / world
        (mini_batch,) = parts.forward.plan_mini_batches([rows], parts.plan.active([rows]), tokens)
        packs.append(len(mini_batch.packs))
        with parts.forward.packed(model):
            parts.update.run(model, mini_batch, True, None)
        held = {name: p.grad for name, p in model.named_parameters()}
        full = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in held.items()}
        gradients.append({name: gradient.tolist() for name, gradient in full.items()})
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad)
                p.grad = None
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    result = {
        "gradients": gradients,
        "packs": packs,
        "parameters_here": sum(p.numel() for p in local),
        "parameters": sum(p.numel() for p in model.parameters()),
        "waited_with_sums": False in waits,
    }
    if rank == 0:
        Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    kinds = sys.argv[2].split(",")
    # all before the processes know of each other: only the first would save
    for kind, pair in [(kind, (made(kind), made(kind))) for kind in kinds]:
        main(f"{sys.argv[1]}/{kind}.json", kind, *pair)
