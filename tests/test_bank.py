from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.bank import ApproximateBank, MaskBank, count_bits, distant_bits, hamming


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 40), st.integers(0, 2**31 - 1), st.data())
def test_bank_finds_what_brute_force_finds(width, stored, seed, data):
    rng = np.random.default_rng(seed)
    bank, rows = MaskBank(width), []
    for i in range(stored):
        if rows and data.draw(st.booleans(), label="remove"):
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


def test_a_search_in_blocks_is_the_search_in_one(monkeypatch):
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((500, 300)) < 0.3)
    bank = MaskBank(300)
    bank.add([str(i) for i in range(500)], masks)
    queries = torch.from_numpy(rng.random((8, 300)) < 0.3)
    whole = bank.nearest(queries)
    monkeypatch.setattr(MaskBank, "_BLOCK_WORDS", 7)
    for found, expected in zip(bank.nearest(queries), whole, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_way_of_searching_is_brute_force(device, threads, monkeypatch):
    rng = np.random.default_rng(3)
    order = np.argsort(rng.random((262, 130)))[:, :40]  # all masks have 40 ones, as MEMOIR's have k
    every = torch.zeros(262, 130, dtype=torch.bool).scatter_(1, torch.from_numpy(order), True)
    masks, queries = every[:257], every[257:]
    queries[0] = masks[40] = masks[11]  # of equals the newest wins
    bank = MaskBank(130)
    bank.add([str(i) for i in range(len(masks))], masks)
    monkeypatch.setattr(MaskBank, "_BLOCK_WORDS", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(bank, "_on_cpu", device == "cpu")
    expected = (queries[:, None] & masks).sum(-1).numpy()
    rows, overlap = bank.nearest(queries)
    newest = expected.shape[1] - 1 - expected[:, ::-1].argmax(1)
    assert np.array_equal(rows, newest) and rows[0] == 40
    assert np.array_equal(overlap, expected.max(1)) and np.array_equal(bank.overlaps(queries), expected)


def test_bits_are_counted_in_every_place_of_a_word():
    words = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, -2, 0x0123456789ABCDEF])
    assert count_bits(words).tolist() == [int(word).bit_count() for word in words.numpy().view(np.uint64)]


def test_hamming_distances_are_those_of_the_bits():
    generator = torch.Generator().manual_seed(0)
    stored, queries = (torch.randint(-(2**62), 2**62, (n, 3), generator=generator) for n in (9, 4))
    expected = [
        [sum(int(word).bit_count() for word in (s ^ q).numpy().view(np.uint64)) for s in stored] for q in queries
    ]
    assert hamming(stored, queries).tolist() == distant_bits(stored, queries).tolist() == expected


def test_an_approximate_search_finds_nearly_all_that_an_exact_one_does(monkeypatch):
    """Masks in families, as prompts of like wording have them, and queries that share 80 % with a stored one."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(ApproximateBank, "FEW", 0)
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
