"""What tests share: one thread (the models are too small to share out), and small models and edits as files."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the kernels and commands that tests start
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from families import byte_tokenizer, network

from memoir import grid


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(request, tmp_path, monkeypatch):
    """A cache of each test's own. Real weights and what notebooks measure are kept: both take too long to make anew."""
    if not {"real", "notebook"} & set(request.keywords):
        monkeypatch.setenv("MEMOIR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model("llama")`: the folder of a random model of that family."""
    folders = {}

    def folder(family: str):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            network(family).save_pretrained(folders[family])
            byte_tokenizer().save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def zsre_file(tmp_path_factory):
    """Twelve edits in the public WISE format of ZsRE, about nobody real."""
    names = ["Ida Verne", "Olo Stam", "Mira Keft", "Juri Pall", "Tess Avon", "Bo Lind"]
    names += ["Rhea Moss", "Ulf Grim", "Nia Cole", "Otto Fenn", "Pia Reed", "Sam Holt"]
    records = [
        {
            "subject": name,
            "src": f"What does {name} play?",
            "rephrase": f"Which instrument is {name}'s?",
            "alt": ["oboe", "harp", "lute"][i % 3],
            "loc": f"nq question: where is hill {i}?",
            "loc_ans": "north",
        }
        for i, name in enumerate(names)
    ]
    path = tmp_path_factory.mktemp("data") / "zsre.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def tiny_grid(tiny_model, zsre_file):
    """Makes the tables' cells for `unedited` on a tiny model; keyword arguments override anything."""

    def cells(**given):
        settings = dict(methods=["unedited"], model=str(tiny_model("llama")), datasets=["zsre"], T=(1, 4)) | given
        settings.setdefault("data_path", str(zsre_file))
        return grid.table_cells(
            settings.pop("methods"), settings.pop("model"), settings.pop("datasets"), T=settings.pop("T"), **settings
        )

    return cells
