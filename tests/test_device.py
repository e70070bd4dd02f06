"""What edits are on a GPU, on a stand-in for one: the same as on the CPU, and the host seldom waits for the device.

The stand-in is a device of its whole process, so one of its own does all of it, and the tests read what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import REQUESTS, small_model
from test_contract import METHODS, QUERIES, editor_for

from memoir.editors import EDITORS

pytestmark = pytest.mark.xdist_group("device")  # one process of its own for all of them

VARIANTS = {  # name → method and settings
    "relative steps": ("memoir", dict(step_rule="relative", learning_rate=1.0, batch_size=2)),
    "early stop": ("memoir", dict(iterations=8, stop_loss=5.5)),  # before its last step
    "centred": ("memoir", dict(feature="mean_centred", tau=0.5, prefixes=10, routing=False)),
    "pages": ("memoir-rls", dict(fill=0.01)),
    "random masks": ("memoir", dict(random_mask=True, k=9)),
    "FT-L": ("ft", dict(variant="FT-L", batch_size=3)),
}
FAMILIES = {"memoir": ("llama", "gpt2")}  # GPT-2 has layers of its own
SHORT = 3


def editor_on(device, name: str, family: str, **overrides):
    model = small_model(family)
    model.network.to(device)
    method, settings = VARIANTS.get(name, (name, {}))
    return editor_for(method, model, **overrides | settings)


def steps(name: str, count: int) -> dict[str, float]:
    """Settings with which every edit takes so many steps, unless its variant says otherwise."""
    method, _ = VARIANTS.get(name, (name, {}))
    known = EDITORS[method].Config.__dataclass_fields__
    limit = next((setting for setting in ("iterations", "value_steps") if setting in known), None)
    return {limit: count, "stop_loss": 0.0} if limit else {}


NO_STEPS = [name for name in METHODS if not steps(name, 1)]


def story(device, name: str, family: str, folder: Path) -> dict:
    """Edits, questions, an edit taken out, and all of it saved and loaded: what there is to see of them."""
    editor = editor_on(device, name, family, **steps(name, SHORT))
    reports = editor.edit(REQUESTS)
    if editor.can_forget:
        editor.forget(next(iter(editor.edits)))
    found = {"steps": [r.iterations for r in reports], "first": [r.loss_before for r in reports]}
    found |= {"last": [r.loss_after for r in reports], "kept": list(editor.edits)}
    loaded = editor_on(device, name, family, **steps(name, SHORT))
    loaded.resume(editor.save(folder))
    for which, one in {"": editor, "loaded ": loaded}.items():
        one.attach()
        found[which + "losses"] = one.losses(REQUESTS)
        found[which + "matches"] = one.matches(QUERIES)
        found[which + "answers"] = [one.ask(prompt, max_new_tokens=3) for prompt in QUERIES[1:4]]
        found[which + "contribution"] = one.explain(REQUESTS[0].prompt).contribution
    return found


def asked_of(device, name: str) -> dict:
    """How often the host waits in an edit of few steps and of twice as many; and in answers of few tokens and of twice
    as many, by an edited model and an unedited one, with the kernels that it starts."""
    from standin import traffic

    found = {}
    for count in (SHORT, 2 * SHORT):
        editor = editor_on(device, name, "llama", **steps(name, count))
        found["patches"] = len(editor.patches)
        editor.edit(REQUESTS[:1])
        with traffic() as asked:
            editor.edit(REQUESTS[1:], check=False)
        found[f"edit {count}"] = sum(asked.waits.values())
        for edited in (True, False):
            if not edited:
                editor.detach()
            with traffic() as asked:
                editor.model.generate(REQUESTS[1].prompt, max_new_tokens=count, min_new_tokens=count)
            found[f"{'edited' if edited else 'unedited'} {count}"] = sum(asked.waits.values()), asked.kernels
    return found


def everything(folder: Path) -> None:
    import torch
    from standin import GPU

    torch.set_num_threads(1)
    found = {"mixed": ""}
    try:
        torch.ones(2, device=GPU) + torch.ones(2)
    except RuntimeError as error:
        found["mixed"] = str(error)
    for name in (*METHODS, *VARIANTS):
        for family in FAMILIES.get(name, ("llama",)):
            for device in (torch.device("cpu"), GPU):
                key = f"{name} {family} {device.type}"
                found[key] = story(device, name, family, folder / key.replace(" ", "-"))
        found[f"{name} asked"] = asked_of(GPU, name)
    print("\n" + json.dumps(found))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    home = tmp_path_factory.mktemp("standin")
    env = os.environ | {"MEMOIR_HOME": str(home / "home")}
    command = [sys.executable, __file__, str(home)]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_standin_tells_devices_apart(seen):
    assert "two devices: [((2,), 'standin:0'), ((2,), 'cpu')]" in seen["mixed"]
    steps = seen["early stop llama standin"]["steps"]
    assert all(0 < count < 8 for count in steps), steps


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_edits_are_the_same_on_a_gpu(name, seen):
    for family in FAMILIES.get(name, ("llama",)):
        mine, expected = seen[f"{name} {family} standin"], seen[f"{name} {family} cpu"]
        assert mine.keys() == expected.keys()
        for what, value in expected.items():
            close = what.split()[-1] in ("first", "last", "losses", "contribution")
            assert mine[what] == (pytest.approx(value, rel=1e-3, abs=1e-4) if close else value), what
        assert [mine["loaded " + what] for what in ("matches", "answers")] == [mine["matches"], mine["answers"]]


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_the_host_waits_once_in_a_step(name, seen):
    """To read the loss that ends an edit, and for nothing else."""
    found = seen[f"{name} asked"]
    more = found[f"edit {2 * SHORT}"] - found[f"edit {SHORT}"]
    assert more == 0 if name in (*NO_STEPS, "early stop") else 0 < more <= 2 * SHORT


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_a_further_token_asks_little_more_of_the_device_than_unedited(name, seen):
    found = seen[f"{name} asked"]
    (waits, kernels), (plain_waits, plain_kernels) = (
        [more - few for few, more in zip(found[f"{which} {SHORT}"], found[f"{which} {2 * SHORT}"], strict=True)]
        for which in ("edited", "unedited")
    )
    assert waits == plain_waits > 0
    assert kernels <= plain_kernels + 8 * SHORT * found["patches"]


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
