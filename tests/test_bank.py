from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir import kernels
from memoir.bank import ApproximateBank, DeviceBank, MaskBank, count_bits, distant_bits, make_bank, pack_bits

BANKS = {"cpu": MaskBank, "device": lambda width: DeviceBank(width, "cpu")}


@pytest.mark.parametrize("kind", BANKS)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), stored=st.integers(0, 40), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_bank_finds_what_brute_force_finds(kind, width, stored, seed, data):
    rng = np.random.default_rng(seed)
    bank, rows = BANKS[kind](width), []
    for i in range(stored):
        if rows and data.draw(st.booleans(), label="search, then remove"):
            bank.nearest(torch.zeros(1, width, dtype=torch.bool))
            gone = rows.pop(data.draw(st.integers(0, len(rows) - 1)))
            bank.remove(gone[0])
        mask = rng.random(width) < 0.4
        rows.append((f"e{i}", mask))
        bank.add([f"e{i}"], torch.from_numpy(mask)[None])
    query = rng.random((3, width)) < 0.4
    found, overlap = bank.nearest(torch.from_numpy(query))
    assert bank.ids == [name for name, _ in rows]
    for q, row, count in zip(query, found, overlap, strict=True):
        distances = [int(np.sum(q ^ mask)) for _, mask in rows]
        if not distances:
            assert (row, count) == (-1, 0)
        else:
            assert row == len(distances) - 1 - distances[::-1].index(min(distances))
            assert count == np.sum(q & rows[row][1])
    if rows:
        expected = np.array([[np.sum(q & mask) for _, mask in rows] for q in query])
        assert np.array_equal(bank.overlaps(torch.from_numpy(query)), expected)
        assert np.array_equal(bank.masks(np.arange(len(rows))).numpy(), np.stack([mask for _, mask in rows]))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("block", [7, 100, 1 << 20])
def test_every_way_of_searching_is_brute_force(kind, threads, block, monkeypatch):
    rng = np.random.default_rng(3)
    order = np.argsort(rng.random((262, 130)))[:, :40]  # all masks have 40 ones, as MEMOIR's have k
    every = torch.zeros(262, 130, dtype=torch.bool).scatter_(1, torch.from_numpy(order), True)
    masks, queries = every[:257], every[257:]
    queries[0] = masks[40] = masks[11]  # of equals the newest wins
    bank = BANKS[kind](130)
    bank.add([str(i) for i in range(len(masks))], masks)
    monkeypatch.setattr(bank, "block", block)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    expected = (queries[:, None] & masks).sum(-1).numpy()
    rows, overlap = bank.nearest(queries)
    newest = expected.shape[1] - 1 - expected[:, ::-1].argmax(1)
    assert np.array_equal(rows, newest) and rows[0] == 40
    assert np.array_equal(overlap, expected.max(1)) and np.array_equal(bank.overlaps(queries), expected)
    assert torch.equal(
        torch.from_numpy(bank.columns(rows, 40)), masks[torch.from_numpy(rows)].nonzero()[:, 1].view(5, 40)
    )


@pytest.mark.parametrize("width", [500, 512, 513, 1300])
def test_the_nearest_is_found_whatever_the_first_words_of_masks_say(width):
    rng = np.random.default_rng(0)
    masks = rng.random((120, width)) < 0.3
    queries = masks[rng.permutation(120)[:40]].copy()
    for i, query in enumerate(queries):  # from equal to a stored mask to farther from it than from others
        query[rng.permutation(width)[: i * width // 50]] ^= True
    masks[60:80, :512] = queries[20:, :512]  # the first words promise what the others do not keep
    masks[80:] = masks[40:].copy()[:40]  # and most are there twice
    bank = MaskBank(width)
    bank.add([str(i) for i in range(120)], torch.from_numpy(masks))
    distances = (queries[:, None] ^ masks).sum(-1)
    last = 119 - distances[:, ::-1].argmin(1)
    for some in (slice(None), *(slice(i, i + 1) for i in range(40))):
        rows, overlaps = bank.nearest(torch.from_numpy(queries[some]))
        assert np.array_equal(rows, last[some])
        assert np.array_equal(overlaps, (queries & masks[last]).sum(1)[some])


@pytest.mark.parametrize(("k", "message"), [(2, "too many"), (4, "too few")])
def test_columns_are_as_many_as_a_mask_has_ones(k, message):
    bank = MaskBank(70)
    bank.add(["a"], torch.arange(70)[None] % 30 == 9)
    assert bank.columns(np.array([0]), 3).tolist() == [[9, 39, 69]]
    with pytest.raises(ValueError, match=message):
        bank.columns(np.array([0]), k)


def test_a_compiled_loop_holds_nothing_of_the_others_that_are_kept():
    """Kept code of two loops that one of them is part of, compiled at different times, would be taken for the same."""
    ask = numba.njit(kernels._ask.py_func)
    a, prompt, sums = torch.ones(1, 2, 64), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, 8)
    decisions, table = torch.zeros(1, 6, dtype=torch.long), torch.full((64, 8), 2.0)
    lie = [tensor.data_ptr() for tensor in (a, prompt, sums, decisions, table)]
    assert ask(*lie, 1, 2, 8, 3, np.arange(64), np.ones((1, 1), np.uint64) * 7, 1.0)
    assert decisions.tolist() == [[0, 3, 0, 0, 1, 2]] and (sums == 6).all()
    (code,) = ask.inspect_llvm().values()
    assert "NumbaEnv" in code
    for name in ("last", "largest", "pack", "nearest", "columns", "_add_weighted"):
        assert f"{len(name)}{name}B" not in code, name


def test_loops_are_compiled_where_nothing_can_be_cached():
    code = "from memoir.kernels import pack; import numpy as np; print(pack(np.ones((1, 3), dtype=bool)))"
    nowhere = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}
    done = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True)
    assert done.stdout == "[[7]]\n", done.stderr


@pytest.mark.parametrize("width", [1, 63, 64, 130])
def test_masks_are_packed_alike_on_every_device(width):
    masks = torch.rand(5, width, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[0], masks[1] = True, False
    expected = [
        [sum(int(bit) << i for i, bit in enumerate(mask[j : j + 64])) for j in range(0, width, 64)] for mask in masks
    ]
    assert kernels.pack(masks.numpy()).tolist() == expected
    assert pack_bits(masks).numpy().view(np.uint64).tolist() == expected


def test_a_bank_is_chosen_by_device():
    assert type(make_bank(64)) is MaskBank and type(make_bank(64, "meta")) is DeviceBank


def test_bits_are_counted_in_every_place_of_a_word():
    words = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, -2, 0x0123456789ABCDEF])
    assert count_bits(words).tolist() == [int(word).bit_count() for word in words.numpy().view(np.uint64)]


@pytest.mark.parametrize("count", [5, 700])
def test_distances_are_those_of_the_bits(count):
    generator = torch.Generator().manual_seed(0)
    stored, queries = (torch.randint(-(2**62), 2**62, (n, 3), generator=generator) for n in (count, 4))
    stored[0], queries[0] = -1, 0
    expected = [
        [sum(int(word).bit_count() for word in (s ^ q).numpy().view(np.uint64)) for s in stored] for q in queries
    ]
    assert [distant_bits(stored, query).tolist() for query in queries] == expected
    words, masks = (
        stored.numpy().view(np.uint64),
        np.unpackbits(queries.numpy().view(np.uint8), axis=1, bitorder="little"),
    )
    rows, distances, shared = kernels.nearest(words, masks.astype(bool))
    assert distances.tolist() == [min(row) for row in expected]
    assert [row[i] for row, i in zip(expected, rows, strict=True)] == distances.tolist()
    both = (stored[torch.from_numpy(rows)] & queries).numpy().view(np.uint64)
    assert shared.tolist() == [sum(int(word).bit_count() for word in words) for words in both]


@pytest.mark.slow  # compiles C++
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_distances_are_the_same_from_one_kernel():
    bank, masks = DeviceBank(130, "cpu"), torch.rand(90, 130, generator=torch.Generator().manual_seed(0)) < 0.3
    bank.add([str(i) for i in range(80)], masks[:80])
    expected = bank.nearest(masks), bank.overlaps(masks)
    bank._fused = torch.compile(distant_bits, dynamic=True)
    assert np.array_equal(bank.nearest(masks), expected[0]) and np.array_equal(bank.overlaps(masks), expected[1])
    assert bank._fused is not None


def test_without_a_compiler_masks_are_compared_all_the_same():
    def broken(*tensors):
        raise RuntimeError("no C compiler")

    bank, masks = DeviceBank(64, "cpu"), torch.rand(9, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    bank.add([str(i) for i in range(9)], masks)
    bank._fused = broken
    with pytest.warns(UserWarning, match="step by step, which is slower.*no C compiler"):
        assert bank.nearest(masks)[0].tolist() == list(range(9))
    assert bank.nearest(masks)[0].tolist() == list(range(9))  # and says so once


def test_an_approximate_search_finds_nearly_all_that_an_exact_one_does(monkeypatch):
    """Masks in families, as prompts of like wording have them, and queries that share 80 % with a stored one."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(ApproximateBank, "BLOCK", 0)
    rng = np.random.default_rng(0)

    def near(mask, share):
        """A mask of as many ones, of which `share` are those of this one."""
        ones, zeros, moved = np.flatnonzero(mask), np.flatnonzero(~mask), round((1 - share) * mask.sum())
        found = mask.copy()
        found[rng.permutation(ones)[:moved]], found[rng.permutation(zeros)[:moved]] = False, True
        return found

    families = [rng.permutation(np.arange(300) < 75) for _ in range(20)]
    stored = np.stack([near(families[i % 20], 0.5) for i in range(800)])
    queries = torch.from_numpy(np.stack([near(mask, 0.8) for mask in stored]))
    exact, graph = MaskBank(300), ApproximateBank(300)
    for bank in (exact, graph):
        bank.add([str(i) for i in range(500)], torch.from_numpy(stored[:500]))
        bank.nearest(queries[:1])
        for gone in (*range(0, 400, 2), 499):  # some of the graph is gone
            bank.remove(str(gone))
        bank.add([str(i) for i in range(500, 800)], torch.from_numpy(stored[500:]))
    assert graph.ids == exact.ids
    rows, overlaps = graph.nearest(queries)
    assert overlaps.tolist() == [int((q & m).sum()) for q, m in zip(queries, graph.masks(rows), strict=True)]
    assert np.mean(overlaps == exact.nearest(queries)[1]) >= 0.99
    for gone in exact.ids[:590]:  # most of it
        graph.remove(gone)
    assert [graph.ids[row] for row in graph.nearest(queries[-9:])[0]] == [str(i) for i in range(791, 800)]
    graph.replace(exact.ids[:3], exact.packed[:3])
    graph.nearest(queries[:1])
    for gone in exact.ids[:2]:  # fewer are left than are asked for
        graph.remove(gone)
    assert graph.nearest(queries[:2])[0].tolist() == [0, 0]
    graph.replace(exact.ids[:1], exact.packed[:1])
    assert graph.nearest(queries[:2])[0].tolist() == [0, 0]


def test_bank_refuses_what_does_not_fit():
    bank = MaskBank(64)
    with pytest.raises(ValueError, match="masks have 65 bits, expected 64"):
        bank.add(["a"], torch.zeros(1, 65, dtype=torch.bool))
    with pytest.raises(KeyError, match="no mask of edit 'a'"):
        bank.remove("a")


def test_overlaps_beyond_256_are_counted_exactly():
    """bfloat16 counts only to 256; a mask of the real size has 4096 ones."""
    bank = MaskBank(14336)
    mask = torch.zeros(1, 14336, dtype=torch.bool)
    mask[0, :4096] = True
    bank.add(["whole"], mask)
    query = mask.clone()
    query[0, :1] = False
    assert bank.nearest(query)[1].tolist() == [4095]
