"""The notebook of the quick start: its cells run one after the other, as Jupyter would run them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

NOTEBOOK = Path(__file__).parents[2] / "docs/quickstart.ipynb"
SIZES = "COLD_START_STEPS, TRAIN_STEPS = 300, 16"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Only the sizes are changed. A cell's text is compiled as it is: there is no magic of Jupyter's in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = ["".join(cell["source"]) for cell in cells("code")]
    assert code[0].startswith(SIZES)
    code[0] = code[0].replace(SIZES, "COLD_START_STEPS, TRAIN_STEPS = 2, 8")
    namespace = {"__name__": "__main__"}
    for number, text in enumerate(code):
        exec(compile(text, f"cell {number}", "exec"), namespace)
    assert namespace["same"] is True
    texts = [[{"content": r"\boxed{8}"}], [{"content": r"\boxed{7}"}]]
    assert namespace["right_and_short"](texts, ["8", "8"]) == [0.991, -0.009]
    assert len(namespace["log"]) == 8 and namespace["again"].state.global_step == 8
    start = load_file(tmp_path / "runs/quickstart/model/model.safetensors")
    trained = dict(namespace["again"].model.named_parameters())
    assert any(not torch.equal(start[name], p) for name, p in trained.items() if name in start)  # it has moved
    assert capsys.readouterr().out.count("checkpoint-4 equal those saved") == 1


def test_what_is_shown_was_printed_by_these_cells():
    """Every cell was executed in order, without an error, and the resumed run ended at the same weights."""
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert code[-1]["outputs"][-1]["data"]["text/plain"] == ["True"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
