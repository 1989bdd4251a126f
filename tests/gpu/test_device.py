"""The update on a real CUDA device: against TRL, through torch's variable-length kernel, at the edge of its memory.

Where there is no CUDA device the same tests run on the CPU, with the kernel and the memory limit pretended, so that
their code is known to work; one test then says that a device is missing.
"""

from contextlib import contextmanager

import pytest
import torch
from conftest import (
    gradients,
    length_reward,
    one_update,
    padded_rollout,
    prompts,
    relative_error,
    sapo_trainer,
    tiny_model,
)
from trl import GRPOConfig, GRPOTrainer

from sapo_trl.rollout.rows import Row
from sapo_trl.update import memory
from sapo_trl.update.attention import TORCH_VARLEN
from sapo_trl.update.memory import activation_bytes
from sapo_trl.update.packing import PackedForward

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
NUM_ROWS, ROW_TOKENS = (32, 1024) if HAS_CUDA else (8, 48)  # a GPU's allocator hands out blocks of 20 MiB
ROOM = 400 * 2**20 if HAS_CUDA else 40 * 2**20  # bytes that the memory probe is told are free

pytestmark = pytest.mark.gpu


def test_there_is_a_cuda_device():
    if not HAS_CUDA:
        pytest.skip("no CUDA device: the tests of this folder ran on the CPU")
    assert torch.ones(2, device="cuda").sum().item() == 2.0


def device_trainer(tmp_path, tokenizer, model, **fields):
    trainer = sapo_trainer(tmp_path, tokenizer, model, use_cpu=not HAS_CUDA, **fields)
    assert next(trainer.model.parameters()).device.type == DEVICE
    return trainer


def on_device(batch: dict) -> dict:
    return {key: value.to(DEVICE) for key, value in batch.items()}


def trl_update(tmp_path, tokenizer, model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of TRL's own SAPO branch on the device."""
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=12,
        steps_per_generation=4, loss_type="sapo", use_cpu=not HAS_CUDA, bf16=False, gradient_checkpointing=False,
        report_to="none",
    )  # fmt: skip
    trainer = GRPOTrainer(model, length_reward, config, prompts(), processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def long_rows(model, seed: int = 3) -> list[Row]:
    """`NUM_ROWS` rows of `ROW_TOKENS` tokens, each a prompt of 16, half of them with A < 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (NUM_ROWS, ROW_TOKENS), generator=g)
    trained = torch.ones(ROW_TOKENS - 16, dtype=torch.bool)
    return [Row(row, 16, trained, 1.5 if i % 2 else -0.5) for i, row in enumerate(ids)]


def update_of(trainer, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    return one_update(trainer, {"num_items_in_batch": sum(row.num_trained for row in rows)}, rows)


def test_loss_and_gradient_equal_trls(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    batch = on_device(padded_rollout(model, tool_mask=True))
    trainer = device_trainer(tmp_path, tokenizer, model)
    loss, actual, metrics = one_update(trainer, batch)
    expected_loss, expected = trl_update(tmp_path, tokenizer, model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert relative_error(actual, expected) < 1e-5
    assert metrics["log_ratio/abs_mean"] > 0.03  # off-policy, or the comparison says nothing


def test_packs_and_shared_prompts_change_no_gradient(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    results = []
    for tokens, share in ((4096, False), (40, False), (60, True)):
        batch = on_device(padded_rollout(model))
        batch["prompt_ids"][1:3], batch["prompt_mask"][1:3] = batch["prompt_ids"][0], batch["prompt_mask"][0]
        trainer = device_trainer(
            tmp_path, tokenizer, model, max_tokens_per_pack=tokens, share_prompts=share, gradient_checkpointing=share
        )
        results.append(one_update(trainer, batch))
    (_, whole, _), *others = results
    for _, gradient, metrics in others:
        assert relative_error(gradient, whole) < 1e-5 and metrics["update/packs"] > 1
    assert others[0][2]["update/shared_tokens"] == 0 < others[1][2]["update/shared_tokens"]


def pretended_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What `torch.nn.attention.varlen.varlen_attn` computes, by its documentation."""
    lengths = cu_seq_q.diff().tolist()
    rows = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)))
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = [attend(*row, is_causal=window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa) for row in rows]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def ungrouped_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same as torch 2.11 has it: without grouped heads."""
    assert q.shape[1] == k.shape[1]
    return pretended_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def varlen_trainer(tmp_path, tokenizer, model, monkeypatch, kernel=pretended_varlen, **fields):
    """A trainer in bf16 whose rows go through torch's kernel; on a CPU, which has none, through its stand-in."""
    trainer = device_trainer(tmp_path, tokenizer, model, bf16=True, **fields)
    if not HAS_CUDA:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        trainer._forward._try_torch_varlen(trainer.model)
    assert (trainer._forward.layout, trainer._forward.kernel) == ("flash", TORCH_VARLEN), trainer._forward.reason
    return trainer


@pytest.mark.parametrize("kernel", [pretended_varlen, ungrouped_varlen])
def test_the_variable_length_kernel_in_half_precision(tmp_path, tokenizer, monkeypatch, kernel):
    model = tiny_model(tokenizer)
    batch = on_device(padded_rollout(model, tool_mask=True))
    _, expected, _ = one_update(device_trainer(tmp_path, tokenizer, model), batch)
    errors = {}
    for share in (False, True):
        fields = {"share_prompts": share, "max_tokens_per_pack": 60}
        trainer = varlen_trainer(tmp_path, tokenizer, model, monkeypatch, kernel, **fields)
        with torch.autocast(DEVICE, torch.bfloat16):
            _, gradient, _ = one_update(trainer, batch)
        errors[share] = relative_error(gradient, expected)
    assert 0 < max(errors.values()) < 0.05


def test_a_run_in_half_precision(tmp_path, tokenizer, monkeypatch):
    """Generation, rewards, old log-probs and two rollouts' updates, as a user runs them."""
    fields = {"max_steps": 4, "num_mini_batches": 2, "logging_steps": 1, "max_tokens_per_pack": "auto"}
    trainer = varlen_trainer(tmp_path, tokenizer, tiny_model(tokenizer), monkeypatch, **fields)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 4 and all(record["grad_norm"] < 100 for record in records)
    assert [record["update/oom_retries"] for record in records] == [0.0] * 4
    moved = {name: (p - before[name]).abs().max().item() for name, p in trainer.model.named_parameters()}
    assert 0 < max(moved.values()) < 1e-3  # four steps of AdamW at 1e-6


@contextmanager
def too_little_memory(trainer, num_tokens: int, monkeypatch):
    """Inside, a pack of `num_tokens` tokens does not fit and one of a quarter does."""
    if not HAS_CUDA:
        call = PackedForward.__call__

        def limited(self, model, inputs, router_logits=False):
            if inputs.model_inputs["input_ids"].numel() > num_tokens // 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return call(self, model, inputs, router_logits)

        monkeypatch.setattr(PackedForward, "__call__", limited)
        yield
        return
    with trainer._forward.packed(trainer.model):
        needed = activation_bytes(trainer._forward, trainer.model, num_tokens)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + needed // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_pack_that_does_not_fit_starts_again_and_changes_no_gradient(tmp_path, tokenizer, monkeypatch):
    model, whole = tiny_model(tokenizer), NUM_ROWS * ROW_TOKENS
    small = device_trainer(tmp_path, tokenizer, model, max_tokens_per_pack=whole // 8)
    _, expected, _ = update_of(small, long_rows(model))
    del small
    trainer = device_trainer(tmp_path, tokenizer, model, max_tokens_per_pack=whole)
    with too_little_memory(trainer, whole, monkeypatch), pytest.warns(UserWarning, match="did not fit into memory"):
        _, actual, metrics = update_of(trainer, long_rows(model))
    assert metrics["update/oom_retries"] >= 1 and trainer._forward.max_tokens <= whole // 2
    assert relative_error(actual, expected) < 1e-5


def test_activation_memory_is_a_straight_line(tmp_path, tokenizer):
    """What the probe extrapolates from two sizes is there at a third; the head's buffer is not on the line."""
    trainer = device_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    probe = trainer._plan.memory
    with trainer._forward.packed(trainer.model):
        low, high, far = (
            activation_bytes(trainer._forward, trainer.model, n) - probe._head_bytes(trainer.model, n)
            for n in (512, 1536, 8192)
        )
    assert far == pytest.approx(low + (high - low) / 1024 * (8192 - 512), rel=0.05)


def peak_bytes(trainer, rows: list[Row]) -> int:
    """Bytes that forward and backward of the rows take at most beside the weights; on a CPU those that are kept."""
    if not HAS_CUDA:
        with trainer._forward.packed(trainer.model):
            return activation_bytes(trainer._forward, trainer.model, sum(map(len, rows)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update_of(trainer, rows)
    return torch.cuda.max_memory_allocated() - before


def test_what_the_probe_says_fits_does_fit(tmp_path, tokenizer, monkeypatch):
    model = tiny_model(tokenizer)
    trainer = device_trainer(tmp_path, tokenizer, model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: ROOM)
    fits = trainer._plan.memory.tokens_that_fit(trainer.model)
    assert fits >= 256 and fits % 256 == 0
    trainer._forward.max_tokens = fits
    ids = (torch.arange(fits) % model.config.vocab_size).split(256)
    rows = [Row(part, 16, torch.ones(240, dtype=torch.bool), 1.0) for part in ids]
    assert 0.2 * ROOM < peak_bytes(trainer, rows) <= ROOM
