"""Images in prompts (Qwen3-VL): the padded layout against TRL's own loss, and a training run through the processor."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import one_update, relative_error, sapo_config, sapo_trainer
from datasets import Dataset
from picture_world import content_reward, small_model, small_processor, with_images
from PIL import Image
from test_parity import trl_side

from sapo_trl import SAPOTrainer
from sapo_trl.rollout.rows import Images, rows_from_padded
from sapo_trl.setup_checks import prepare_pictures
from sapo_trl.update.check import packed_equals_plain
from sapo_trl.update.pictures import pictures_of


@pytest.fixture(scope="module")
def processor():
    return small_processor()


@pytest.fixture(scope="module")
def model(processor):
    return small_model(processor)


@pytest.mark.parametrize("budget", [10_000, 40, 1])
@pytest.mark.parametrize("layout", ["segments", "padded"])
def test_gradients_equal_trls(tmp_path, model, processor, layout, budget):
    """Rows in packs, end to end or right-padded, beside TRL's left-padded batch; the vision tower included."""
    batch = with_images(model, processor)
    fields = {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    expected_loss, expected = trl_side(tmp_path, processor.tokenizer, model, batch, **fields)
    trainer = sapo_trainer(tmp_path, processor.tokenizer, model, max_tokens_per_pack=budget)
    assert trainer._forward.layout == "segments"
    if layout == "padded":
        trainer._forward.use_padded("to compare")
    loss, actual, metrics = one_update(trainer, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(actual, expected) < 2e-6
    assert any("visual" in name and value.abs().max() > 0 for name, value in expected.items())
    assert metrics["log_ratio/abs_mean"] > 0.1 and (metrics["update/packs"] > 2) == (budget < 100)


def test_pixels_belong_to_their_row(tmp_path, model, processor):
    """Other pixels in row 3 change row 3 alone."""
    trainer = sapo_trainer(tmp_path, processor.tokenizer, model)
    batch = with_images(model, processor)
    rows = rows_from_padded(batch)
    changed = copy.copy(rows[3])
    changed.images = Images(rows[3].images.pixels + 1.0, rows[3].images.grid, "another")
    results = []
    for row in (rows[3], changed):
        pack = [*rows[:3], row, *rows[4:]]
        with torch.no_grad(), trainer._forward.packed(trainer.model):
            logps = trainer._forward(trainer.model, trainer._forward.build_inputs(pack)).logps
        results.append(logps.split([r.num_trained for r in pack]))
    for i, (before, after) in enumerate(zip(*results, strict=True)):
        assert torch.equal(before, after) == (i != 3)


def test_a_mini_batch_without_images_gives_the_vision_tower_zeros(tmp_path, model, processor):
    trainer = sapo_trainer(tmp_path, processor.tokenizer, model)
    trainer._forward.pictures = pictures_of(trainer.model, "segments", 0, has_images=True)  # as for a dataset with them
    batch = with_images(model, processor)
    rows = [row for row in rows_from_padded(batch) if row.images is None]
    _, found, _ = one_update(trainer, batch, rows)
    tower = {name: value for name, value in found.items() if "visual" in name}
    assert len(found) == len(list(trainer.model.parameters())) and tower
    assert not any(value.any() for value in tower.values())


def test_what_cannot_become_inputs_is_refused(tmp_path, model, processor):
    trainer = sapo_trainer(tmp_path, processor.tokenizer, model)
    batch = with_images(model, processor)
    batch["completion_ids"][1, 2] = processor.image_token_id
    with pytest.raises(ValueError, match="a completion holds the image placeholder, token 266: images in answers"):
        one_update(trainer, batch)
    other = with_images(model, processor) | {"image_sizes": torch.ones(8, 2)}
    with pytest.raises(NotImplementedError, match=r"not Qwen's \(image_sizes\)"):
        rows_from_padded(other)


def test_what_a_rollout_cannot_carry_is_refused(tmp_path, model, processor):
    """Images for a model that got a tokenizer only, and images where the dataset has no column of them."""
    picture = Image.new("RGB", (8, 8))
    chat = [{"role": "user", "content": "1+1="}]
    rows = Dataset.from_list([{"prompt": chat, "images": [picture]} for _ in range(8)])
    with pytest.raises(ValueError, match="the training set has images, but Qwen3VLFor.* got a tokenizer only"):
        SAPOTrainer(model, content_reward, sapo_config(tmp_path), rows, processing_class=processor.tokenizer)
    with pytest.raises(ValueError, match="overlap_rewards=True, but prompts have images"):
        SAPOTrainer("org/model", content_reward, sapo_config(tmp_path, overlap_rewards=True), rows)
    trainer = SAPOTrainer(
        copy.deepcopy(model), content_reward, sapo_config(tmp_path, max_steps=1), rows, processing_class=processor
    )
    trainer.carries_images = False
    with pytest.raises(ValueError, match="put them into a column `images`"):
        trainer.train()


def test_memory_is_not_measured_with_images(tmp_path, model, processor, capsys):
    trainer = sapo_trainer(
        tmp_path, processor.tokenizer, model, max_tokens_per_pack="auto", gradient_checkpointing="auto"
    )
    trainer._plan.memory.settle(trainer.model, longest_prompt=20)  # text alone: the probe asks for no image
    assert "tokens fit into a pack" in capsys.readouterr().out
    trainer._plan.memory.has_images, trainer._plan.memory.is_settled = True, False
    trainer._plan.memory.settle(trainer.model, longest_prompt=20)
    assert "what images take is not measured; packs hold at most" in capsys.readouterr().out


def test_training_on_images_through_the_processor(tmp_path, model, processor):
    """Prompts with one picture or two, generated, rewarded and trained; pixels reach the vision tower."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1="}],
            "images": [Image.new("RGB", (8 * (1 + i % 2), 8), (16 * i, 255 - 16 * i, 90))] * (1 + i % 2),
        }
        for i in range(16)
    ]
    config = sapo_config(
        tmp_path, num_mini_batches=2, max_steps=4, logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant"
    )
    before = copy.deepcopy(model.state_dict())
    trainer = SAPOTrainer(
        copy.deepcopy(model), content_reward, config, Dataset.from_list(rows), processing_class=processor
    )
    trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    assert len(log) == 4 and log[1]["log_ratio/abs_mean"] > 1e-3 and log[0]["log_ratio/abs_mean"] == 0
    after = trainer.model.state_dict()
    assert any("visual" in name and not torch.equal(after[name], before[name]) for name in before)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_completions_of_one_picture_forward_it_once(tmp_path, model, processor):
    """Prompts that rows share bring their pictures once; the same text under another picture is another prompt."""
    g = torch.Generator().manual_seed(5)
    marks = [processor.vision_start_token_id, *[processor.image_token_id] * 6, processor.vision_end_token_id, 5, 6, 7]
    pixels = [torch.randn(24, 96, generator=g) for _ in range(2)]
    completions = torch.randint(3, 200, (6, 9), generator=g)
    batch = {
        "prompt_ids": torch.tensor([marks] * 6), "prompt_mask": torch.ones(6, len(marks), dtype=torch.long),
        "completion_ids": completions, "completion_mask": torch.ones_like(completions),
        "advantages": torch.tensor([1.0, -0.5, 0.3, -1.0, 0.7, 0.2]), "num_images": [1] * 6,
        "pixel_values": torch.cat([pixels[i // 3] for i in range(6)]),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * 6),
        "old_per_token_logps": torch.full((6, 9), -5.5) + 0.3 * torch.randn(6, 9, generator=g),
        "num_items_in_batch": torch.tensor(54),
    }  # fmt: skip
    found = {}
    for layout in ("segments", "padded"):
        trainer = sapo_trainer(tmp_path, processor.tokenizer, model, max_tokens_per_pack=1000)
        if layout == "padded":
            trainer._forward.use_padded("to compare")
        rows = rows_from_padded(batch)
        assert len({id(row.images) for row in rows}) == 2
        found[layout] = one_update(trainer, batch, rows)
        inputs = trainer._forward.build_inputs(rows).model_inputs
        assert len(inputs["pixel_values"]) == 24 * (2 if layout == "segments" else 6)
        keys = [row.prompt_key for row in rows]
        assert keys == ([0, 0, 0, 1, 1, 1] if layout == "segments" else [None] * 6)
    assert found["segments"][0] == pytest.approx(found["padded"][0], rel=1e-5)
    assert relative_error(found["segments"][1], found["padded"][1]) < 2e-6


def test_experts_are_replayed_beside_pictures(tmp_path, processor):
    """A Mixture-of-Experts: routes recorded and replayed in packs with a shared prompt, as in the padded layout."""
    model, found = small_model(processor, moe=True), {}
    for layout in ("segments", "padded"):
        trainer = sapo_trainer(tmp_path, processor.tokenizer, model, algorithm="grpo-r2", router_aux_loss_coef=0.0)
        assert trainer._forward.layout == "segments"
        trainer._forward.pictures = pictures_of(trainer.model, "segments", 0, has_images=True)
        if layout == "padded":
            trainer._forward.use_padded("to compare")
        batch = with_images(model, processor)
        del batch["old_per_token_logps"]
        rows = rows_from_padded(batch)
        trainer._plan.passes.record([rows[:2], rows[2:]])  # old log-probs and routes of the second part
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if "gate.weight" in name:
                    p.neg_()  # the routers would choose otherwise now
        found[layout] = one_update(trainer, batch, rows[2:])
        assert found[layout][2]["routing/changed_frac"] > 0.5
    assert found["segments"][0] == pytest.approx(found["padded"][0], rel=1e-5)
    assert relative_error(found["segments"][1], found["padded"][1]) < 5e-6


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
def test_older_families_lie_in_packs_too(tmp_path, processor, family):
    """Measured on a row with a picture, as before every run."""
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "pad_token_id": processor.tokenizer.pad_token_id, "max_position_embeddings": 128,
    }  # fmt: skip
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": 0.3}
    if family == "Qwen2VL":
        tower |= {"embed_dim": 16, "hidden_size": 32}
    else:
        tower |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = {name: vars(processor)[name] for name in names}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=tower, **marks)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    trainer = sapo_trainer(tmp_path, processor.tokenizer, model)
    trainer._forward.pictures = pictures_of(trainer.model, trainer._forward.layout, 0, has_images=True)
    assert packed_equals_plain(trainer._forward, trainer.model, torch.randint(3, 200, (40,))) < 1e-5
    assert trainer._forward.layout == "segments"


def test_vllm_is_told_what_must_not_be_sampled(model, processor):
    generation = SimpleNamespace(generation_kwargs={"bad_words": ["x"], "seed": 1})
    trainer = SimpleNamespace(processing_class=processor, model=model, use_vllm=True, vllm_generation=generation)
    ((what, _),) = prepare_pictures(trainer, has_images=True)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    assert what == "pictures" and generation.generation_kwargs == {"bad_words": ["x", *marks], "seed": 1}
