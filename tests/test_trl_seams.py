"""What we rely on in TRL, transformers and accelerate: held still, named in one module, and checked at import."""

import ast
import hashlib
import inspect
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, length_reward, prompts, sapo_trainer, tiny_model
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import grpo_trainer

import sapo_trl
from sapo_trl import SAPOTrainer, trl_seams
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.trl_seams import ATTRIBUTES, SOURCES, check_installed, digest, texts_stay_local

PACKAGE = Path(sapo_trl.__file__).parent
PATHS = [(module, name) for (_, module), names in SOURCES.items() for name in names]
TRAINERS_METHODS = {name.split(".")[-1] for _, name in PATHS if name.startswith(("GRPOTrainer.", "Trainer."))}

# ---- sources and versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), PATHS, ids=[name for _, name in PATHS])
def test_source_of_what_we_build_on(module, name):
    """A mismatch asks for reading the new source against its use, then for the new hash."""
    tested = next(names[name] for (_, at), names in SOURCES.items() if at == module and name in names)
    assert digest(module, name) == tested


def test_nothing_is_said_where_all_is_as_tested(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_installed()
    assert capsys.readouterr() == ("", "")


def another_log(self, logs, start_time=None):
    pass


def test_a_changed_method_is_named(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "log", another_log)
    monkeypatch.delattr(GRPOTrainer, "_log_metric")
    monkeypatch.setattr(grpo_trainer, "gather_object", len)  # built in: it has no source
    with pytest.raises(ImportError) as error:
        check_installed()
    message = str(error.value)
    assert "trl 1.16.0 is installed" in message and "accelerate 1.15.0 is installed" in message
    assert "these have changed: GRPOTrainer._log_metric, GRPOTrainer.log." in message
    assert "these have changed: gather_object." in message and "transformers 5.23.0 is" not in message
    assert "pip install trl==1.16.0 transformers==5.23.0 accelerate==1.15.0" in message
    assert "SAPO_TRL_UNTESTED_VERSIONS=1" in message


def test_an_unknown_minor_version_is_named_and_a_patch_is_not(monkeypatch):
    installed = {"trl": "1.16.4", "transformers": "5.24.0.dev0", "accelerate": "1.15.0"}
    monkeypatch.setattr(trl_seams, "version", installed.__getitem__)
    with pytest.raises(ImportError, match=r"with transformers 5\.23\.0, and transformers 5\.24\.0\.dev0") as error:
        check_installed()
    assert "none has changed" in str(error.value) and "trl 1.16.4" not in str(error.value)
    installed["transformers"] = "5.23.1"
    check_installed()


def test_the_environment_variable_turns_the_error_into_a_warning(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "log", another_log)
    monkeypatch.setenv("SAPO_TRL_UNTESTED_VERSIONS", "1")
    with pytest.warns(UserWarning, match=r"these have changed: GRPOTrainer\.log\. SAPO_TRL_UNTESTED_VERSIONS=1"):
        check_installed()
    monkeypatch.setenv("SAPO_TRL_UNTESTED_VERSIONS", "0")
    with pytest.raises(ImportError):
        check_installed()


def test_the_check_runs_when_the_trainer_is_imported_and_not_before():
    program = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "1.99.0" if name == "accelerate" else version(name)
import sapo_trl, sapo_trl.config
print("imported", flush=True)
import sapo_trl.trainer
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 1 and done.stdout.endswith("imported\n")
    assert "ImportError: sapo_trl was tested with accelerate 1.15.0, and accelerate 1.99.0 is installed" in done.stderr


def test_a_private_name_that_is_gone_says_what_to_install(monkeypatch):
    monkeypatch.delattr("trl.trainer.utils.use_adapter")
    with pytest.raises(ImportError, match=r"'use_adapter'.*installed: trl \S+, .*pip install trl==1\.16\.0"):
        runpy.run_path(trl_seams.__file__)
    assert digest("trl.trainer.utils", "use_adapter") == digest("trl.nowhere", "f") == "missing"


def test_signatures():
    names = lambda f: list(inspect.signature(f).parameters)  # noqa: E731
    assert names(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert names(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]
    assert names(GRPOTrainer._calculate_rewards) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert names(ChunkedLogProbFunction.forward)[1:] == [
        "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
        "final_logit_softcapping", "logit_scale", "outputs",
    ]  # fmt: skip


# ---- names in one module -------------------------------------------------------------------------------------------

LIBRARIES = ("trl", "transformers", "accelerate", "peft", "torch")
# Modules below a library's own name that its documentation imports from; torch documents all of its modules
PUBLIC = {"trl.rewards", "transformers.utils", "transformers.integrations", "transformers.trainer_callback"}
PUBLIC |= {"accelerate.utils", *LIBRARIES}
# A check of torch's on the device, and numerator and denominator of mpmath's fractions, which have no public name
ALLOWED = {"_assert_async", "_mpq_"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, module and class variables, attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return set(filter(is_private, names))


def used_names(tree: ast.AST) -> set[str]:
    """Private attributes that a module reads or sets, by name or by text; those of the standard library left out."""
    names, standard = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            standard |= {alias.name for alias in node.names if alias.name in sys.stdlib_module_names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in standard:
            names.add(node.attr)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("getattr", "hasattr", "setattr", "attrgetter") and len(node.args) > 1:
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return set(filter(is_private, names))


def private_imports(tree: ast.AST) -> set[str]:
    """Imports of a private name, or of a module that a library does not document."""
    found = set()
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in modules:
            parts, names = module.split("."), [alias.name for alias in node.names]
            if parts[0] in LIBRARIES:
                hidden = parts[0] != "torch" and module not in PUBLIC
                found |= {module} if hidden or any(map(is_private, [*parts, *names])) else set()
    return found


def modules_of_the_package() -> dict[str, ast.AST]:
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "trl_seams.py"
    }


LISTED = {name.split(".")[-1] for _, name in PATHS} | {attribute.name for attribute in ATTRIBUTES}


def test_private_parts_of_libraries_are_used_in_one_module_only():
    modules = modules_of_the_package()
    ours = set().union(*map(own_names, modules.values()))
    trainers = {attribute.name for attribute in ATTRIBUTES if attribute.owner == "GRPOTrainer"} | TRAINERS_METHODS
    found = {}
    for path, tree in modules.items():
        foreign = used_names(tree) - ours - trainers - ALLOWED
        if foreign or private_imports(tree):
            found[path] = sorted(foreign | private_imports(tree))
    assert found == {}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from trl.trainer.utils import pad", {"trl.trainer.utils"}),
        ("import transformers.cache_utils", {"transformers.cache_utils"}),
        ("from torch._dynamo import disable", {"torch._dynamo"}),
        ("from accelerate.utils import _x", {"accelerate.utils"}),
        ("x = model.config._attn_implementation", {"_attn_implementation"}),
        ("model.config._attn_implementation = x", {"_attn_implementation"}),
        ("getattr(model, '_no_split_modules', 1)", {"_no_split_modules"}),
        ("import os\nos._exit(1)", set()),
        ("self._mine = 1\nself._mine", set()),
        ("from torch.nn.attention.varlen import varlen_attn", set()),
        ("from transformers import AutoModel\nAutoModel.__name__", set()),
    ],
)
def test_the_walk_finds_private_parts(code, found):
    tree = ast.parse(code)
    assert (used_names(tree) - own_names(tree)) | private_imports(tree) == found


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory, tokenizer):
    """TRL's own trainer."""
    fields = PLAIN | {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4}
    config = GRPOConfig(output_dir=str(tmp_path_factory.mktemp("plain")), **fields)
    return GRPOTrainer(tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer)


def test_attributes_are_there_and_hold_what_we_say(plain_trainer):
    seen = {}

    def keep(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen["GenerationConfig"] = generation_config
        return input_ids

    model = plain_trainer.model
    ids = torch.tensor([[5, 6]], device=model.device)
    model.generate(input_ids=ids, generation_config=plain_trainer.generation_config, custom_generate=keep)
    objects = seen | {"GRPOTrainer": plain_trainer, "PreTrainedModel": model, "PretrainedConfig": model.config}
    for attribute in ATTRIBUTES:
        assert isinstance(getattr(objects[attribute.owner], attribute.name), attribute.kind), attribute
        assert attribute.holds


def test_what_the_trainer_shares_with_trls_is_listed(plain_trainer):
    """An override, or an attribute of the same name, that is not listed would meet TRL's by accident."""
    own = [cls for cls in SAPOTrainer.__mro__ if cls.__module__.startswith("sapo_trl.")]
    members = [item for cls in own for item in vars(cls).items()]
    overridden = {name for name, value in members if callable(value) and hasattr(GRPOTrainer, name)}
    assert {"_generate", "evaluation_loop", "training_step", "save_model"} <= overridden <= TRAINERS_METHODS
    used = set().union(*map(used_names, modules_of_the_package().values()))
    assert {"_metrics", "_step"} <= used & set(dir(plain_trainer)) <= LISTED


def test_texts_stay_local_gathers_all_but_the_texts(monkeypatch):
    gathered = []
    spy = lambda x: gathered.append(x) or [*x, *x]  # noqa: E731
    monkeypatch.setattr(grpo_trainer, "gather_object", spy)
    texts, equal = [["a"]], ["a"]
    with texts_stay_local(texts):
        assert grpo_trainer.gather_object(equal) == ["a", "a"]  # equal, and another object
        assert grpo_trainer.gather_object(texts[0]) == ["a"]
        texts.append(["later"])
        assert grpo_trainer.gather_object(texts[1]) == ["later"]
    assert gathered == [["a"]] and grpo_trainer.gather_object is spy
    with pytest.raises(RuntimeError, match="stop"), texts_stay_local(texts):
        raise RuntimeError("stop")
    assert grpo_trainer.gather_object is spy


# ---- what a rollout of TRL gives ------------------------------------------------------------------------------------


def test_keys_of_a_rollout(tmp_path, tokenizer):
    """The dictionary that `rows_from_padded` reads, from a real generation."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    trainer.model.train()
    batch = [row for row in prompts(8) for _ in range(4)]
    rollout = Rollout()
    with trainer._fills(rollout):
        output = trainer._generate_and_score_completions(batch)
    assert set(output) == {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
    }  # fmt: skip
    assert output["advantages"].shape == (32,)
    assert output["num_items_in_batch"] == output["completion_mask"].sum()


def test_advantages_are_what_the_stage_map_says(tmp_path, tokenizer):
    """A = (r - mean_G r)/(std_G r + 1e-4), std with G - 1."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    trainer.model.train()
    rollout = Rollout()
    with trainer._fills(rollout):
        output = trainer._generate_and_score_completions([row for row in prompts(8) for _ in range(4)])
    rewards = rollout.rewards[:, 0].view(-1, 4).double()
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    torch.testing.assert_close(
        output["advantages"].double(), ((rewards - mean) / (std + 1e-4)).flatten(), rtol=1e-5, atol=1e-6
    )


def test_every_field_of_grpo_config_is_known():
    """A new field of TRL must be honoured or refused, not inherited unseen."""
    assert hashlib.sha256(" ".join(sorted(GRPOConfig.__dataclass_fields__)).encode()).hexdigest()[:12] == "ee64c101c3e2"


def test_reward_keyword_arguments(tmp_path, tokenizer):
    """`log_metric`, `log_extra`, `trainer_state` and the dataset's columns reach a reward function."""
    seen = {}

    def reward(completions, answer, **kwargs):
        seen.update(kwargs, answer=answer)
        return length_reward(completions)

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    trainer.reward_funcs[0] = reward
    trainer.model.train()
    rollout = Rollout()
    with trainer._fills(rollout):
        trainer._generate_and_score_completions([row for row in prompts(2) for _ in range(4)])
    assert {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"} <= set(seen)
    assert seen["answer"] == ["1"] * 4 + ["2"] * 4
