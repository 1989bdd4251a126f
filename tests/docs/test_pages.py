"""The generated pages are those of the code, and every field of the config is in the table once."""

import dataclasses
import re
from pathlib import Path

import pytest
import reliability
from accelerate import ParallelismConfig
from conftest import sapo_config

import docs
from sapo_trl import faults
from sapo_trl.bounds import WITHOUT_EFFECT
from sapo_trl.config import SAPOConfig

FOLDER = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", docs.PAGES)
def test_a_generated_page_is_up_to_date(name):
    assert (FOLDER / name).read_text() == docs.page(name), "run python scripts/docs.py"


def test_the_readme_is_short_and_its_pictures_and_pages_are_there():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    rows = [line for line in text.splitlines() if line.startswith("|")]
    long = [cell for row in rows for cell in row.strip("|").split("|") if len(cell.split()) > 15]
    assert rows and not long, long
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]*)\)", text) if "://" not in target]
    assert targets and [target for target in targets if not (FOLDER.parent / target).exists()] == []


def test_the_page_of_faults_names_every_action_and_place_and_nothing_else(monkeypatch):
    rows = [line.split("`")[1] for line in (FOLDER / "faults.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == list(reliability.FAULTS), "run python scripts/reliability.py page"
    found = []
    for row in rows:
        monkeypatch.setenv(faults.VARIABLE, row)
        found.append(faults.wanted.__wrapped__())
    assert {fault["place"] for fault in found} == set(faults.PLACES)
    assert {fault["action"] for fault in found} == {*faults.ANYWHERE, *faults.DAMAGE, *faults.NUMBERS}
    assert {option for fault in found for option in fault} == {"action", "place", *faults.OPTIONS}


def test_every_field_has_a_row():
    rows = [line.split("`")[1] for line in docs.field_table(SAPOConfig).splitlines()[2:]]
    assert sorted(rows) == sorted(f.name for f in dataclasses.fields(SAPOConfig) if f.init)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_field_without_effect_is_refused(tmp_path, name):
    """Any other value than the neutral one, by the type of the field."""
    values = {"enable_jit_checkpoint": True, "batch_eval_metrics": True, "pad_to_multiple_of": 8, "label_names": ["x"]}
    values |= {"include_for_metrics": ["x"], "train_sampling_strategy": "group_by_length", "data_seed": 3}
    values |= {"torch_empty_cache_steps": 3, "eval_accumulation_steps": 3, "parallelism_config": ParallelismConfig()}
    values |= {"include_num_input_tokens_seen": "all"}
    values |= {"dynamic_sampling_max_rounds": 3}
    values |= dict.fromkeys(("length_column_name", "torch_compile_backend", "torch_compile_mode"), "x")
    default = {f.name: f.default for f in dataclasses.fields(SAPOConfig)}[name]
    value = (not default) if isinstance(default, bool) else values.get(name, 0.5)
    with pytest.raises(ValueError, match=f"{name}.*has no effect"):
        sapo_config(tmp_path, **{name: value})
