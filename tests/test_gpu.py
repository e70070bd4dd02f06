"""On a real GPU: the contract in float32 and bfloat16, and in float32 the same edits as on the CPU.

Without a GPU test_device.py holds the same code to the same stories, on a stand-in.
"""

from __future__ import annotations

import pytest
import torch
from families import small_model
from test_contract import EDITS, METHODS, QUERIES, WITHOUT_WEIGHTS, edit, editor_for, logits, loss
from test_device import FAMILIES, VARIANTS, story

from memoir import shapes
from memoir.editors import load_editor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: torch.cuda.is_available() is false", allow_module_level=True)

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.gpu
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of all logits' norm


@pytest.fixture(params=CLOSE, ids=str)
def model(request):
    model = small_model("llama")
    model.network.to(DEVICE, request.param)
    return model


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_edits_are_those_of_the_cpu(name, tmp_path):
    for family in FAMILIES.get(name, ("llama",)):
        expected = story(torch.device("cpu"), name, family, tmp_path / "cpu")
        found = story(DEVICE, name, family, tmp_path / "gpu")
        for what, value in expected.items():
            close = what.split()[-1] in ("first", "last", "losses", "contribution")
            assert found[what] == (pytest.approx(value, rel=1e-3, abs=1e-4) if close else value), what


@pytest.mark.parametrize("method", METHODS)
def test_the_contract(method, model, tmp_path):
    """Fresh it is the identity; edits lower their losses; a batch answers as its members, a saved memory as the editor;
    detached it leaves no bit changed."""
    unedited, before = logits(model), [loss(model, request) for request in EDITS]
    editor = editor_for(method, model)
    assert torch.equal(logits(model), unedited)
    edit(editor, EDITS)
    assert all(site.device.type == DEVICE.type for site in editor.patches)
    if method not in WITHOUT_WEIGHTS:
        assert sum(loss(model, request) for request in EDITS) < sum(before)
    edited = logits(model)
    for row, query in zip(edited[:, -1].float(), QUERIES, strict=True):
        alone = logits(model, [query])[0, -1].float()
        assert (alone - row).norm() <= CLOSE[model.dtype] * row.norm()
    editor.save(tmp_path / "memory")
    loaded = load_editor(tmp_path / "memory", model)
    assert torch.equal(logits(model), edited)
    loaded.detach()
    assert torch.equal(logits(model), unedited)


def test_a_published_shape_is_measured(monkeypatch):
    """All of the command but the model's size."""
    small = small_model("llama")
    small.network.to(DEVICE, torch.bfloat16)
    monkeypatch.setattr(shapes, "shaped", lambda name, device: small)
    monkeypatch.setattr(shapes, "COUNTS", (1000,))
    found = shapes.measure_shapes(["llama-3-8b"], ["memoir", "ft", "rome+layer=1"], say=lambda line: None)
    rows = found["shapes"]["llama-3-8b"]["methods"]
    assert found["info"]["machine"] == torch.cuda.get_device_name()
    for row in rows.values():
        assert row["edits"] == 10 and row["seconds"] > 0 < row["floor_seconds"] and row["bytes_over_model"] > 0
    assert rows["memoir"]["prefill at 1000 edits"] > 0
