"""The measurement before the first rollout: which models pass, which take the padded layout, which are refused."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import SHAPE, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    ModernBertDecoderConfig,
    NemotronConfig,
    NemotronHConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

from sapo_trl.model import without_adapters
from sapo_trl.update.check import noise_in_training, packed_equals_plain
from sapo_trl.update.head import add_token_head
from sapo_trl.update.packing import PackedForward

VOCABULARY = 200
TINY = SHAPE | {"vocab_size": VOCABULARY}
NO_WIDTH = {name: value for name, value in TINY.items() if name != "head_dim"}
IDS = torch.randint(3, VOCABULARY, (23,), generator=torch.Generator().manual_seed(1))
HYBRID = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8,
    "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}


def random_model(config, std: float = 0.3):
    """A model whose log-probs differ clearly from token to token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=std)
    return model


def packed_forward(model, temperature: float = 0.8) -> PackedForward:
    return PackedForward(model, None, Accelerator(cpu=True), 0, temperature, False, max_tokens=1000, share_prompts=True)


@pytest.mark.parametrize("config", [Qwen3Config(**TINY), Qwen3MoeConfig(**TINY, **MOE)], ids=["qwen3", "qwen3-moe"])
def test_packs_of_plain_transformers_pass(config):
    model = random_model(config).train()
    forward = packed_forward(model)
    assert packed_equals_plain(forward, model, IDS) < 1e-5
    assert forward.layout == "segments" and forward.share_prompts and model.training


def test_a_model_that_is_evaluated_inside_a_wrapper_stays_in_its_mode(tokenizer):
    """`eval_on_start` under DDP: transformers calls `eval` on the model and not on the wrapper."""
    model = tiny_model(tokenizer)
    wrapper = torch.nn.DataParallel(model).train()
    model.eval()
    packed_equals_plain(packed_forward(model), wrapper, IDS)
    assert not model.training


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_random_in_the_forward_pass_is_measured(tokenizer, p):
    """A dropout that no module shows; evaluation mode hides it, and stays."""
    model = tiny_model(tokenizer).eval()
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, _, out: torch.nn.functional.dropout(out, p, module.training))
    before = torch.get_rng_state()
    assert packed_equals_plain(packed_forward(model), model, IDS) < 1e-5
    noise = noise_in_training(packed_forward(model), model, IDS)
    assert (noise > 0.01) if p else (noise == 0.0)
    assert torch.equal(torch.get_rng_state(), before) and not model.training


@pytest.mark.parametrize("length", [2, 3, 500])
def test_rows_of_any_length(tokenizer, length):
    model = tiny_model(tokenizer)
    assert packed_equals_plain(packed_forward(model), model, torch.arange(length) % 200 + 3) < 1e-5


class Scaled(Qwen3ForCausalLM):
    """Multiplies its logits by a number that no configuration names."""

    scale = 1.5

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.scale
        return outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_follows_from_the_precision(dtype):
    """A multiplier that half precision could not tell from rounding is a fault in float32."""
    model = Scaled(Qwen3Config(**TINY))
    model.load_state_dict(random_model(Qwen3Config(**TINY)).state_dict())
    model.scale = 1.002
    with pytest.raises(ValueError, match=r"rounding explains 0\.0001"):
        packed_equals_plain(packed_forward(model), model, IDS)
    model = model.to(dtype)
    assert 1e-4 < packed_equals_plain(packed_forward(model), model, IDS) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["segments", "padded"])
def test_a_head_with_a_multiplier_is_refused_with_the_number(dtype, layout):
    """The expected difference by hand: logits z and 1.5 z of the plain model."""
    torch.manual_seed(0)
    plain = random_model(Qwen3Config(**TINY)).to(dtype)
    model = Scaled(plain.config).to(dtype)
    model.load_state_dict(plain.state_dict())
    forward = packed_forward(model, temperature=1.0)
    forward.layout = layout
    with pytest.raises(ValueError, match=r"off those of Scaled's own forward by \S+ a token") as error:
        packed_equals_plain(forward, model, IDS)
    assert forward.layout == "padded"  # tried before it was refused
    prompt, end = IDS[:11], IDS[11:]
    differences = []
    for row in (torch.cat([prompt, end]), torch.cat([prompt, end.flip(0)[:7]])):
        with torch.no_grad():
            z = plain(input_ids=row[None]).logits[0, 10:-1].float()
        ours, own = ((s * z).log_softmax(-1).gather(1, row[11:, None]) for s in (1.0, 1.5))
        differences.append((ours - own).abs().mean().item())
    found = float(str(error.value).split("forward by ")[1].split()[0])
    assert found == pytest.approx(max(differences), rel=0.06)
    assert f"{found:.2g}" in str(error.value) and "loss_type: sapo" in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**NO_WIDTH, logits_scaling=4.0),
        ModernBertDecoderConfig(**NO_WIDTH, pad_token_id=0, bos_token_id=1, eos_token_id=2),  # a dense layer
        RecurrentGemmaConfig(**TINY, lru_width=32, logits_soft_cap=4.0),  # a soft cap of another name
    ],
    ids=lambda config: config.model_type,
)
def test_heads_of_published_families_are_refused(config):
    model = random_model(config)
    with pytest.raises(ValueError, match="its logits are not softcap"):
        packed_equals_plain(packed_forward(model), model, IDS)


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_soft_cap_is_part_of_the_head(cap):
    model = random_model(Gemma2Config(**TINY, final_logit_softcapping=cap))
    forward = packed_forward(model)
    assert packed_equals_plain(forward, model, IDS) < 1e-5
    model.config.final_logit_softcapping = 2 * cap  # what the model reads, not what the head was built with
    with pytest.raises(ValueError, match="its logits are not softcap"):
        packed_equals_plain(forward, model, IDS)


def test_layers_that_the_packed_layout_does_not_know():
    """A family whose attention hands nothing on, and state-space layers."""
    model = random_model(NemotronConfig(**TINY))
    forward = packed_forward(model)
    assert forward.layout == "segments"
    assert packed_equals_plain(forward, model, IDS) < 1e-5
    assert forward.layout == "padded" and not forward.share_prompts
    assert "got no segments" in str(forward)
    hybrid = NemotronHConfig(**{k: v for k, v in TINY.items() if k != "num_hidden_layers"}, **HYBRID)
    model = random_model(hybrid)
    forward = packed_forward(model)
    assert forward.layout == "padded" and packed_equals_plain(forward, model, IDS) < 1e-5


def test_state_from_row_to_row_is_measured_in_packs():
    """A hybrid model that says nothing of its layers is forwarded in packs, whose second row sees the first."""
    hybrid = NemotronHConfig(**{k: v for k, v in TINY.items() if k != "num_hidden_layers"}, **HYBRID)
    model = random_model(hybrid)
    forward = packed_forward(model)
    forward.layout, forward.share_prompts = "segments", False
    assert packed_equals_plain(forward, model, IDS) < 1e-5
    assert forward.layout == "padded" and "off the model's own log-probs by" in forward.reason


def test_nan_is_no_equality(tokenizer):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(ValueError, match="by nan a token"):
        packed_equals_plain(packed_forward(model), model, IDS)


def test_tokens_of_their_own_in_a_tied_head_are_refused(tokenizer):
    model = tiny_model(tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    with pytest.raises(NotImplementedError, match="and trainable_token_indices where the head is tied"):
        add_token_head(without_adapters(get_peft_model(model, adapter)), 1.0)


def test_a_deep_copy_computes_with_its_own_weights(tokenizer):
    model, ids = tiny_model(tokenizer), torch.tensor([[5, 6, 7]])
    add_token_head(model, 1.0)
    expected, made = model(ids).logits, copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(made(ids).logits, expected) and not torch.equal(model(ids).logits, expected)
    head = {"predict": torch.tensor([1]), "targets": torch.tensor([7])}
    assert made(ids, **head).logps != model(ids, **head).logps


def test_an_adapter_on_the_head_is_refused_and_a_head_that_is_trained_whole_is_not(tokenizer):
    """The adapter starts at zero, so that no measurement sees it; PEFT's copy of the head is read as the head."""
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(NotImplementedError, match="adapter changes the output head of Qwen3ForCausalLM"):
        packed_forward(get_peft_model(tiny_model(tokenizer), adapter))
    whole = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(tokenizer), whole)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.3)
    assert packed_equals_plain(packed_forward(model), model, IDS) < 1e-5
