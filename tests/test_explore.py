"""The computations behind the exploring notebooks, against brute force, dense algebra and direct simulation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.editors import make_editor
from memoir.editors.memoir_rls import MEMOIRbyRLS
from memoir.evaluation import Evaluation
from memoir.explore import ablations, calibrate, capacity, columns, figures, overlap, retention, speed
from memoir.files import read_json
from memoir.records import EditRequest, Probe
from memoir.run import run_edits
from memoir.sites import watching

SETTINGS = dict(
    layer=1, k=16, feature="last", tau=0.97, iterations=6, step_rule="constant", learning_rate=3.0, prefixes=0
)
RATIOS = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=12).map(np.array)


def request(i: int) -> EditRequest:
    return EditRequest(
        prompt=f"{i} things, {i * 7}",
        target=f"made of {i % 5}",
        probes=(
            Probe(kind="rephrase", prompt=f"Things, {i} of {i * 7}", answer=f"made of {i % 5}"),
            Probe(kind="unrelated", prompt=f"Nothing like it {i}", answer="rain and snow"),
            Probe(kind="same_subject", prompt=f"{i} things weigh", answer="much"),
        ),
    )


EDITS = [request(i) for i in range(7)]


@pytest.fixture
def model():
    return small_model("llama")


# Columns -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(any), st.sampled_from([0.5, 0.9, 0.99]))
def test_an_edits_columns_are_the_fewest_that_hold_its_energy(row, share):
    found = columns.fewest_columns(np.array([row], dtype=float), share)[0]
    enough = [
        len(chosen)
        for size in range(1, len(row) + 1)
        for chosen in itertools.combinations(range(len(row)), size)
        if sum(row[i] for i in chosen) >= share * sum(row) - 1e-9
    ]
    assert found.sum() == min(enough)
    assert np.array(row)[found].sum() >= share * sum(row) - 1e-9


@pytest.mark.parametrize("method, settings", [("memoir", SETTINGS), ("ft", {"layer": 1, "iterations": 3})])
def test_column_writes_are_the_steps_of_the_residual_weight(model, method, settings):
    found = columns.column_writes(make_editor(method, model, **settings), EDITS, progress=False)
    editor = make_editor(method, model, **settings)
    weights = [torch.zeros_like(columns.residual_weight(editor))]
    for edit in EDITS:
        editor.edit(edit)
        weights.append(columns.residual_weight(editor).clone())
    for i, row in enumerate(found.energy):
        assert row == pytest.approx(((weights[i + 1] - weights[i]) ** 2).sum(0).numpy(), rel=1e-4, abs=1e-12)
    assert found.read[0] == 0 and (found.read[1:] > 0).all()


def test_variants_of_a_method_differ_in_their_lines():
    writes = dict.fromkeys("abc", columns.ColumnWrites(np.eye(3), np.zeros(3)))
    figure = figures.column_drift(writes, {"a": "MEMOIR", "b": "MEMOIR", "c": "FT"})
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    styles = [lines[label].get_linestyle() for label in "abc"]
    assert styles[0] != styles[1] and styles[0] == styles[2]
    assert lines["a"].get_color() == lines["b"].get_color() != lines["c"].get_color()


def test_a_method_without_columns_of_one_projection_is_refused(model):
    with pytest.raises(ValueError, match="unedited does not write into the columns"):
        columns.residual_weight(make_editor("unedited", model))


# Overlap and τ -------------------------------------------------------------------------------------------------------


def test_overlaps_are_counted_bit_by_bit(model):
    asked = overlap.prompts_of(EDITS)
    editor = make_editor("memoir", model, background=["Sun", "Rain falls"], **SETTINGS)
    features = overlap.prompt_features(editor, [prompt for *_, prompt in asked])
    assert set(features) == {"last", "mean", "mean_centred"}
    found = overlap.overlaps(EDITS, features["mean"], 16)
    sets = [set(row.abs().argsort(descending=True)[:16].tolist()) for row in features["mean"]]
    seen = {kind: [] for kind in found.ratio}
    for (kind, own, _), mask in zip(asked, sets, strict=True):
        shared = [len(mask & stored) for stored in sets[: len(EDITS)]]
        nearest = max(range(len(EDITS)), key=lambda i: (shared[i], i))
        seen[kind].append((shared[nearest] / 16, nearest == own))
    for kind, rows in seen.items():
        assert found.ratio[kind].tolist() == [ratio for ratio, _ in rows]
        assert found.right[kind].tolist() == [right for _, right in rows]
    assert found.ratio["edited"].tolist() == [1.0] * len(EDITS)


@pytest.mark.parametrize("feature", ["last", "mean", "mean_centred"])
def test_overlaps_are_those_by_which_the_editor_routes(model, feature):
    settings = {**SETTINGS, "feature": feature, "on_conflict": "keep-both"}
    editor = make_editor("memoir", model, background=["Sun", "Rain falls"], **settings)
    asked = overlap.prompts_of(EDITS)
    features = overlap.prompt_features(editor, [prompt for *_, prompt in asked])[feature]
    editor.edit(EDITS)
    found = overlap.overlaps(EDITS, features, 16)
    for kind in found.ratio:
        explained = [editor.explain(prompt).score for k, _, prompt in asked if k == kind]
        assert found.ratio[kind] == pytest.approx(explained)


def test_both_fingerprints_are_those_by_which_editors_route(model):
    background = ["Sun", "Rain falls"]
    settings = {**SETTINGS, "feature": "mean_centred", "on_conflict": "keep-both"}
    both = {"prompt": {}, "prompt and subject": {"subject_layer": 0, "subject_share": 0.4}}
    found = overlap.fingerprints(
        make_editor("memoir", model, background=background, **settings, **both["prompt and subject"]), EDITS
    )
    for name, more in both.items():
        editor = make_editor("memoir", model, background=background, **settings, **more)
        editor.edit(EDITS)
        for kind, ratios in found[name].ratio.items():
            asked = [prompt for k, _, prompt in overlap.prompts_of(EDITS) if k == kind]
            assert ratios == pytest.approx([editor.explain(prompt).score for prompt in asked])


@settings(deadline=None)  # a busy machine is no failure
@given(RATIOS, RATIOS, RATIOS, st.data())
def test_what_a_threshold_trades_is_counted(rephrased, one, other, data):
    right = np.array([data.draw(st.booleans()) for _ in rephrased])
    found = overlap.Overlaps(
        ratio={"edited": np.ones(1), "rephrase": rephrased, "unrelated": one, "same_subject": other},
        right={"edited": np.ones(1, bool), "rephrase": right},
    )
    seen = set(zip(*(values.round(9).tolist() for values in overlap.trade(found)), strict=True))
    ratios = {*(rephrased * right).tolist(), *one.tolist(), *other.tolist()} - {0}
    points = {
        ((np.mean(one >= tau) + np.mean(other >= tau)) / 2, np.mean((rephrased >= tau) & right)) for tau in ratios
    }
    assert seen == {(round(float(x), 9), round(float(y), 9)) for x, y in points}
    best = max([y for x, y in points if x <= 0.3], default=0.0)
    assert overlap.read_at({"any": found}, 0.3) == {"any": pytest.approx(best)}


@settings(deadline=None)  # a busy machine is no failure
@given(RATIOS, RATIOS)
def test_auroc_counts_pairs(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert overlap.auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


@settings(deadline=None)  # a busy machine is no failure
@given(RATIOS, RATIOS, RATIOS)
def test_tau_has_the_best_balanced_accuracy_that_any_threshold_has(wanted, one, other):
    unwanted = {"unrelated": one, "same_subject": other}
    tau, accuracy = overlap.pick_tau(wanted, unwanted)
    by_hand = {
        t: (np.mean(wanted >= t) + (np.mean(one < t) + np.mean(other < t)) / 2) / 2
        for t in [n / 20 - 0.025 for n in range(1, 21)] + [1.0]
    }
    assert accuracy == pytest.approx(max(by_hand.values()))
    assert overlap.balanced_accuracy(tau, wanted, unwanted) == accuracy
    assert 0 < tau <= 1


def test_without_a_prompt_that_must_not_read_there_is_no_tau():
    with pytest.raises(ValueError, match="no locality probes, so τ cannot be chosen; expected at least one"):
        overlap.pick_tau(np.array([0.7]), {})


def test_tau_stands_in_the_middle_where_prompts_are_separated():
    assert overlap.pick_tau(np.array([0.7, 0.9]), {"unrelated": np.array([0.1, 0.5])}) == (pytest.approx(0.6), 1.0)


@settings(deadline=None)  # a busy machine is no failure
@given(RATIOS, RATIOS, st.floats(0.01, 1))
def test_the_other_rule_gives_the_highest_tau_that_reads_enough(wanted, other, share):
    best = np.mean(wanted > 0)
    if share > best:
        with pytest.raises(ValueError, match="generalization"):
            overlap.pick_tau(wanted, {"unrelated": other}, generalization=share)
        return
    tau, _ = overlap.pick_tau(wanted, {"unrelated": other}, generalization=share)
    assert np.mean(wanted >= tau) >= share - 1e-9
    assert np.mean(wanted >= np.nextafter(tau, 2)) < share - 1e-9


@pytest.mark.parametrize("tau", [0.0, 0.6, 0.8, 1.0])
def test_scores_by_tau_are_those_of_an_evaluation_at_that_tau(model, tau):
    editor = make_editor("memoir", model, **{**SETTINGS, "tau": 0.5, "on_conflict": "keep-both"})
    editor.edit(EDITS)
    curves = overlap.scores_by_tau(editor, EDITS, [tau])
    assert editor.memory.tau == 0.5
    editor.memory.tau = tau
    scores = Evaluation(editor, generate=False).checkpoint(EDITS).scores
    assert set(curves) == {"rel", "gen", "loc", "loc_same_subject"}
    for name, (value,) in curves.items():
        assert value == pytest.approx(scores[name])


# Retention -----------------------------------------------------------------------------------------------------------


def test_retention_is_the_run_at_its_checkpoints(model):
    found = retention.retention(make_editor("memoir", model, **SETTINGS), EDITS, [2, 5], progress=False)
    result = run_edits(
        make_editor("memoir", model, **SETTINGS), EDITS, checkpoints=[2, 5], progress=False, generate=False
    )
    assert found.at.tolist() == [2, 5, 7]
    for row, checkpoint in zip(found.rel, result.checkpoints, strict=True):
        assert row[: checkpoint.edits].tolist() == checkpoint.per_edit["rel"]
        assert np.isnan(row[checkpoint.edits :]).all()
    # A margin is positive where the whole answer is the model's own, and only there.
    assert ((found.margin > 0) == (found.rel == 1))[~np.isnan(found.rel)].all()


def test_margins_are_the_least_lead_of_an_answer_token(model):
    editor = make_editor("ft", model, layer=1, iterations=3)
    editor.edit(EDITS[:3])
    found = retention.margins(editor, EDITS)
    tokenizer = model.tokenizer
    for edit, margin in zip(EDITS, found, strict=True):
        prompt = tokenizer(edit.prompt)["input_ids"]
        whole = tokenizer(f"{edit.prompt} {edit.target}")["input_ids"]
        with torch.no_grad():
            logits = model.network(torch.tensor([whole])).logits[0]
        leads = [
            float(logits[i - 1, whole[i]] - max(v for t, v in enumerate(logits[i - 1].tolist()) if t != whole[i]))
            for i in range(len(prompt), len(whole))
        ]
        assert margin == pytest.approx(min(leads), abs=1e-4)


def test_ages_count_the_checkpoints_since_an_edit_was_first_looked_at():
    nan = math.nan
    values = np.array([[1, 2, nan, nan, nan], [3, 4, 5, 6, nan], [7, 8, 9, 10, 11]])
    found = retention.Retention(np.array([2, 4, 5]), values, values)
    age, mean = found.by_age(values)
    assert mean.tolist() == [np.mean([1, 2, 5, 6, 11]), np.mean([3, 4, 9, 10]), np.mean([7, 8])]
    assert age.tolist() == [np.mean([1, 0, 1, 0, 0]), np.mean([3, 2, 2, 1]), np.mean([4, 3])]
    assert found.drift[2].tolist() == [6, 6, 4, 4, 0]


# Ablations -----------------------------------------------------------------------------------------------------------


def test_every_ablation_changes_one_setting_of_the_paper_or_of_ours(model):
    config = make_editor("memoir", model, **SETTINGS).config
    variants = ablations.ablations(config, model)
    assert [label for group, label, _ in variants if group == "part"] == [
        "full",
        "no permutation",
        "random mask instead of top-k",
        "no conditional routing",
    ]
    assert all(len(change) == 1 and change.keys() <= vars(config).keys() for *_, change in variants[1:])
    assert [change["k"] for group, _, change in variants if group == "k"] == [4, 8, 16, 32]
    assert [change["layer"] for group, _, change in variants if group == "layer"] == [0, 1, 2]


# Capacity ------------------------------------------------------------------------------------------------------------


def random_keys(count: int, dimensions: int, seed: int = 0, share: float = 0.0) -> list[torch.Tensor]:
    """Keys of one to three tokens an edit, of which `share` of the energy lies in a direction that all have in
    common."""
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(1 + i % 3, dimensions, generator=generator) * (1 - share) ** 0.5 for i in range(count)]
    for key in keys:
        key[:, 0] += (share * dimensions) ** 0.5
    return keys


@pytest.mark.parametrize(("write", "room"), [("sgd", 0), ("rls", 0), ("rls", 12)])
def test_errors_are_those_of_random_answers_that_are_really_written(write, room):
    count, dimensions, width, ridge = 20, 30, 4000, MEMOIRbyRLS.Config.ridge
    keys = random_keys(count, dimensions, share=0.2)
    size = float(torch.cat(keys).square().sum(1).mean())
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(len(key), width, generator=generator) for key in keys]
    pages = [torch.zeros(dimensions, width)]
    page_of, written = [], [[]]
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        if room and sum(len(keys[j]) for j in written[-1]) >= room:
            pages.append(torch.zeros(dimensions, width))
            written.append([])
        written[-1].append(i)
        page_of.append(len(pages) - 1)
        if write == "sgd":  # the answer's own part, corrected for what is read already
            gram = key @ key.T + ridge * size * torch.eye(len(key))
            pages[-1] += key.T @ torch.linalg.solve(gram, value - key @ pages[-1])
        else:
            K, V = torch.cat([keys[j] for j in written[-1]]), torch.cat([values[j] for j in written[-1]])
            pages[-1] = torch.linalg.solve(K.T @ K + ridge * size * torch.eye(dimensions), K.T @ V)
    found = torch.cat(
        [
            (key @ pages[page] - value).square().sum(1) / width
            for key, value, page in zip(keys, values, page_of, strict=True)
        ]
    )
    geometry = capacity.Geometry.of(keys, write, room)
    assert geometry.errors() == pytest.approx(found.numpy(), rel=0.1, abs=0.01)
    alone = capacity.Geometry.of(keys[:7], write, room)  # a little other, since a key's mean size is another
    assert geometry.first(7).errors() == pytest.approx(alone.errors(), rel=0.1, abs=0.01)


def test_a_wider_layer_has_less_overlap_as_if_keys_were_drawn_there():
    narrow = capacity.Geometry.of(random_keys(60, 100, share=0.1), "sgd")
    for factor in (1, 2, 8):
        drawn = capacity.Geometry.of(random_keys(60, 100 * factor, seed=9, share=0.1), "sgd")
        wide = narrow.widened(factor)
        apart = wide.owner[:, None] != wide.owner
        assert float(wide.gram[apart].mean()) == pytest.approx(float(drawn.gram[apart].mean()), abs=0.03)
        assert float(wide.gram[apart].std()) == pytest.approx(float(drawn.gram[apart].std()), rel=0.15)
        assert wide.errors().mean() == pytest.approx(drawn.errors().mean(), rel=0.15)


def test_what_an_answer_bears_is_found_from_runs_that_it_made():
    geometry = capacity.Geometry.of(random_keys(40, 30), "sgd")
    runs = []
    for edits in (10, 20, 40):
        first = geometry.first(edits)
        survived = [np.mean(first.errors()[first.owner.numpy() == i] <= 0.8) for i in range(edits)]
        runs.append((first, 0.2, 0.2 + 0.8 * float(np.mean(survived))))
    found = capacity.bearable(runs)
    assert found == pytest.approx(0.8, abs=0.05)
    for first, before, after in runs:
        assert first.reliability(found, before) == pytest.approx(after, abs=0.02)


def test_keys_are_those_that_each_edit_writes_on(model):
    settings = {**SETTINGS, "feature": "mean_centred"}
    editor = make_editor("memoir", model, background=["Rain falls.", "Snow is white."], **settings)
    keys = capacity.edit_keys(editor, EDITS)
    assert not editor.edits and not editor.memory.weight.any()
    for edit, key in zip(EDITS, keys, strict=True):
        editor.edit(edit)
        batch = model.encode([edit.prompt], [edit.target], end=True)
        with editor.detached(), watching(editor.site) as seen:
            model.forward(batch)
        mask = editor.memory.fingerprint(seen[0][0], batch.prompt_mask)[0]
        places = batch.learn_mask[0].nonzero()[:, 0] - 1
        assert torch.allclose(key, (seen[0][0] * mask)[0, places], atol=1e-5)


def test_reliability_is_measured_before_and_after(model):
    before = capacity.unedited(make_editor("memoir", model, **SETTINGS), EDITS)
    after = capacity.measured(make_editor("memoir", model, **SETTINGS), EDITS, [3])
    result = run_edits(make_editor("memoir", model, **SETTINGS), EDITS, checkpoints=[3], progress=False)
    assert after == {checkpoint.edits: checkpoint.scores["rel"] for checkpoint in result.checkpoints}
    assert before == run_edits(make_editor("unedited", model), EDITS, progress=False).checkpoints[-1].scores["rel"]


# Sentences -----------------------------------------------------------------------------------------------------------


def test_sentences_tell_what_all_methods_keep_from_what_some_lose():
    whole = {"first_edits_rel": 1.0, "first_edits_margin_drift": -0.6}
    broken = {"first_edits_rel": 0.4, "first_edits_margin_drift": -31.0}
    told = retention.meaning({"MEMOIR": whole, "FT": broken}, 100)
    assert "1 of 2 methods" in told and "FT keeps the fewest, 40%" in told and "31.0 logits" in told
    assert "every method still gives all answers" in retention.meaning({"MEMOIR": whole}, 100)


def test_a_sentence_on_columns_names_the_steadiest_and_the_loosest():
    steady = {"first_edit_reading_moved": [0.0, 0.05], "columns_per_edit": 600.0}
    told = columns.meaning({"FT": {"first_edit_reading_moved": [0.0, 0.1]}, "MEMOIR": steady}, 4096)
    assert "least under MEMOIR, by 5% over 1 later edit, most under FT, by 10%." in told and "about 600 of 4096" in told
    assert "most under" not in columns.meaning({"MEMOIR": steady}, 4096)


def test_a_sentence_on_capacity_names_the_gap_and_the_width():
    checks = [{"reliability": 0.9, "reliability_predicted": 0.93}, {"reliability": None, "reliability_predicted": 0.1}]
    width = {"sgd": (0.5, 0.95), "rls": (0.7, 0.8)}
    widths = [
        {"write": write, "D": D, "T": 1000, "reliability_predicted": value}
        for write, values in width.items()
        for D, value in zip((1536, 3072), values, strict=True)
    ]
    told = capacity.meaning(checks, widths, [{"reliability": 0.7}])
    assert "in 1 checks to within 0.03" in told
    assert "edits at a reliability of 0.9, sgd needs D = 3,072 and rls needs more than D = 3,072, the widest" in told
    whole = [{"reliability": 1.0}]  # the predictions are lower bounds
    told = capacity.meaning(checks[1:], widths, whole)
    assert "sgd needs at most D = 3,072 and rls may need more than D = 3,072, the widest tried." in told
    assert "lower bounds" in capacity.fit_meaning(0.3, whole)
    assert "up to 0.30 times" in capacity.fit_meaning(0.3, [{"reliability": 0.7}])


# A first look, and what was measured on a GPU -----------------------------------------------------------------------


def test_a_first_look_tells_tau_and_writes_nothing(model):
    texts = [f"Text {i} of some {i * 3}" for i in range(20)]
    settings = {**SETTINGS, "tau": "auto", "feature": "mean_centred", "unrelated_share": 0.2}
    editor = make_editor("memoir", model, background=texts, **settings)
    told = calibrate.first_look(editor)
    assert told.startswith("MEMOIR on small-llama: block 1 of 3.") and "16 of 64 columns, feature mean_centred" in told
    assert f"τ = {editor.memory.tau:.3f}" in told and not editor.edits and not editor.memory.weight.any()
    share = float(told.split("unrelated texts ")[1].split("% reach τ with another background text")[0]) / 100
    assert share <= 0.2
    assert calibrate.first_look(make_editor("ft", model, layer=2)) == "FT on small-llama: block 2 of 3."


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        (range(30), [0, 7, 14, 22, 24, 29]),
        (range(0, 30, 2), [0, 8, 14, 20, 24, 28]),  # every other block is a mixture of experts
        ((0, 24), [0, 24]),
    ],
)
def test_layers_are_spread_over_the_dense_blocks_of_a_deep_model(dense, expected):
    deep = SimpleNamespace(blocks=range(30), dense=list(dense), site=lambda layer: SimpleNamespace(in_features=64))
    tried = ablations.ablations(SimpleNamespace(layer=24, k=16), deep)
    assert [change["layer"] for group, _, change in tried if group == "layer"] == expected


def test_the_readme_says_what_was_measured_at_llama_3_8bs_shape():
    found, readme = read_json(speed.MEASURED), (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("LLaMA-3-8B's shape with random weights") :].split("\n\n")[1]
    written = {line.split("|")[1].strip(): line for line in section.splitlines()[2:]}
    rows = found["shapes"]["llama-3-8b"]["methods"]
    names = {"memoir": "MEMOIR, edits in a list", "memoir+ahead=1+step_rule=relative": "MEMOIR, `step_rule=relative`"}
    shown = {names.get(label, label): row for label, row in rows.items() if label != "memoir+ahead=1"}
    assert {name.lower() for name in written} == {name.lower() for name in shown}
    for name, line in written.items():
        row = next(row for other, row in shown.items() if other.lower() == name.lower())
        _, _, seconds, floor, steps, first, memory, _ = line.split("|")
        assert float(seconds) == round(row["seconds"], 2) and float(first) == round(row["first_edit_seconds"], 1)
        assert float(floor) == pytest.approx(row["floor_seconds"], rel=0.1) and float(floor) < float(seconds)
        assert float(steps) == round(row["iterations"])
        assert float(memory.removesuffix("GB ")) == round(row["bytes_over_model"] / 1e9, 1)
    assert found["info"]["machine"] in readme and found["info"]["commit"].startswith("b51e495")


def test_rows_of_shapes_stand_in_figure_table_and_text():
    found = read_json(speed.MEASURED)
    table = speed.shapes_table(found)
    ours = ["MEMOIR", "MEMOIR+ahead=1+step_rule=relative", "MEMOIR+ahead=1"]
    theirs = ["FT", "DEFER", "GRACE", "WISE", "ROME", "MEMIT", "AlphaEdit"]
    assert [row["method"] for row in table] == ours + theirs
    told = speed.shapes_meaning(found)
    assert "0.32 s" in told and "ROME takes longest, 2.3 s" in told and "NVIDIA H200 at commit b51e495" in told
    labels = [label.get_text() for label in speed.shapes_figure(found).axes[0].get_yticklabels()]
    assert sorted(labels) == sorted(row["method"] for row in table) and labels[0].startswith("MEMOIR")
    found["shapes"]["llama-3-8b"]["methods"]["wise"] = {"reason": "no memory"}
    assert [row["note"] for row in speed.shapes_table(found) if row["method"] == "WISE"] == ["no memory"]
    assert len(speed.shapes_figure(found).axes[0].get_yticklabels()) == len(labels) - 1


@pytest.mark.parametrize(
    ("methods", "claim"),
    [
        (["ft"], "At llama-3-8b's shape, with random weights, FT takes longest, 0.1 s. Measured on"),
        ([], "No method was timed at llama-3-8b's shape."),
    ],
)
def test_shapes_are_told_without_memoir_and_without_any_method(methods, claim):
    """As `bench --shape llama-3-8b --methods ft` leaves them, and where the machine is too small."""
    found = read_json(speed.MEASURED)
    rows = found["shapes"]["llama-3-8b"]["methods"]
    found["shapes"]["llama-3-8b"]["methods"] = {label: rows[label] for label in methods} | {"wise": {"reason": "full"}}
    assert speed.shapes_meaning(found).startswith(claim)
    assert len(speed.shapes_figure(found).axes[0].get_yticklabels()) == len(methods)


def test_speed_is_told_with_and_without_the_plain_form():
    row = {"seconds": 0.5, "iterations": 4.0, "speedup": 3.0}
    record = {
        "summary": {"model": "small"},
        "plain": {"memoir": row, "plain": row},
        "overhead": [{"prefill": 1.1, "decode": 1.02, "edits": 1000}],
        "search": [{"masks": 100, "seconds": 0.01}],
    }
    assert "3.0 times as fast as its plain form" in speed.meaning(record)
    told = speed.meaning(record | {"plain": {}})
    assert "plain form" not in told and "prefill and decoding take 1.10 and 1.02 at 1,000 edits times" in told
    assert len(speed.edits_figure({"memoir": row}, record["plain"]).axes) == 2
    assert len(speed.edits_figure({"memoir": row}, {}).axes) == 1
