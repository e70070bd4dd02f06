from __future__ import annotations

import numpy as np
import pytest
import torch
from families import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.memory import (
    MaskBank,
    ResidualMemory,
    count_bits,
    hamming,
    pool_prompt,
    random_mask,
    recursive_downdate,
    recursive_least_squares,
    shared_bits,
    tophash,
)
from memoir.sites import Span


def test_tophash_is_the_permuted_set_of_the_largest_entries():
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(5, 40, generator=generator)
    permutation = torch.randperm(40, generator=generator)
    mask = tophash(feature, 7, permutation)
    for row, found in zip(feature, mask, strict=True):
        largest = sorted(range(40), key=lambda j: -abs(float(row[j])))[:7]
        assert set(found.nonzero()[:, 0].tolist()) == {int(permutation[j]) for j in largest}


@pytest.mark.parametrize("k", [0, 41])
def test_tophash_refuses_impossible_widths(k):
    with pytest.raises(ValueError, match=f"k = {k} columns, expected 1 to 40"):
        tophash(torch.randn(1, 40), k)


def test_pooling_sees_the_prompt_only():
    a = torch.randn(2, 6, 8)
    prompt = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    background = torch.randn(8)
    expected = torch.stack([a[0, 2:5].mean(0), a[1, 1:3].mean(0)])
    torch.testing.assert_close(pool_prompt(a, prompt, "mean"), expected)
    torch.testing.assert_close(pool_prompt(a, prompt, "mean_centred", background), expected - background)
    torch.testing.assert_close(pool_prompt(a, prompt, "last"), torch.stack([a[0, 4], a[1, 2]]))
    noisy = torch.where(prompt[..., None], a, torch.full_like(a, 1e6))
    for feature in ("mean", "last"):
        torch.testing.assert_close(pool_prompt(noisy, prompt, feature), pool_prompt(a, prompt, feature))
    with pytest.raises(ValueError, match="needs the mean feature of background prompts"):
        pool_prompt(a, prompt, "mean_centred")
    with pytest.raises(ValueError, match="'median' is unknown; expected one of mean, mean_centred, last"):
        pool_prompt(a, prompt, "median")


def test_random_masks_have_k_columns_and_know_their_prompt():
    feature = torch.randn(3, 50)
    mask = random_mask(feature, 9)
    assert mask.sum(1).tolist() == [9, 9, 9]
    assert torch.equal(mask, random_mask(feature + 1e-6, 9)) and not torch.equal(mask[0], mask[1])


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
        counts = [int(np.sum(q & mask)) for _, mask in rows]
        if not counts:
            assert (row, count) == (-1, 0)
        else:
            assert count == max(counts) and row == len(counts) - 1 - counts[::-1].index(max(counts))
    if rows:
        expected = np.array([[np.sum(q & mask) for _, mask in rows] for q in query])
        assert np.array_equal(bank.overlaps(torch.from_numpy(query)), expected)
        assert np.array_equal(bank.masks(np.arange(len(rows))).numpy(), np.stack([mask for _, mask in rows]))


def test_bank_search_in_blocks_is_the_search_in_one(monkeypatch):
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
@pytest.mark.parametrize("searched_by", ["numpy", "faiss", "torch"])
def test_every_way_of_searching_is_brute_force(searched_by, threads, monkeypatch):
    if searched_by == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(3)
    masks, queries = (torch.from_numpy(rng.random((n, 130)) < 0.3) for n in (257, 5))
    queries[0] = masks[40] = masks[11]  # of equals the newest wins
    bank = MaskBank(130)
    bank.add([str(i) for i in range(len(masks))], masks)
    monkeypatch.setattr(MaskBank, "_BLOCK_WORDS", 100)
    monkeypatch.setattr(MaskBank, "_FAISS_WORDS", 0 if searched_by == "faiss" else 1 << 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if searched_by == "torch":  # what a bank on a GPU does
        monkeypatch.setattr(MaskBank, "_shared", lambda self, q, start, end: shared_bits(self._words[start:end], q))
    expected = (queries[:, None] & masks).sum(-1).numpy()
    rows, overlap = bank.nearest(queries)
    newest = expected.shape[1] - 1 - expected[:, ::-1].argmax(1)
    assert np.array_equal(rows, newest) and rows[0] == 40
    assert np.array_equal(overlap, expected.max(1)) and np.array_equal(bank.overlaps(queries), expected)


def test_bits_are_counted_in_every_place_of_a_word():
    words = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, -2, 0x0123456789ABCDEF])
    expected = [int(word).bit_count() for word in words.numpy().view(np.uint64)]
    assert count_bits(words).tolist() == expected


def test_hamming_distances_by_faiss_are_those_of_the_bits():
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    stored, queries = (torch.randint(-(2**62), 2**62, (n, 3), generator=generator) for n in (9, 4))
    assert torch.equal(hamming(stored, queries), count_bits(stored ^ queries[:, None]).sum(-1).int())


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


def test_residual_memory_against_its_equation():
    site = small_model("llama").site(1)
    memory = ResidualMemory(site, k=16, tau=0.75, feature="last", permutation=torch.randperm(64), device="cpu")
    memory.weight.normal_()
    a, y = torch.randn(3, 5, 64), torch.randn(3, 5, 32)
    prompt = torch.ones(3, 5, dtype=torch.bool)
    assert memory(a, y, Span(prompt)) is y  # no edits: the identity
    masks = memory.fingerprint(a, prompt)
    near = masks[1].clone()
    near[masks[1].nonzero()[:4, 0]] = False
    near[(~masks[1]).nonzero()[:4, 0]] = True  # shares 12 of 16 columns: R = 0.75, just enough
    memory.bank.add(["exact", "near"], torch.stack([masks[0], near]))
    out = memory(a, y, Span(prompt))
    torch.testing.assert_close(out[0], y[0] + (a[0] * masks[0]) @ memory.weight.T)
    torch.testing.assert_close(out[1], y[1] + (a[1] * near) @ memory.weight.T)
    overlap = max(int((masks[2] & m).sum()) for m in (masks[0], near)) / 16
    assert overlap < 0.75 and torch.equal(out[2], y[2])
    memory.tau = 0.76
    assert torch.equal(memory(a, y, Span(prompt))[1], y[1])


def ridge(keys, values, penalty):
    """The dense solution V Kᵀ (K Kᵀ + λI)⁻¹ in float64, K (D × n), V (d × n)."""
    return values @ keys.T @ torch.linalg.inv(keys @ keys.T + penalty * torch.eye(len(keys), dtype=torch.float64))


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_recursive_least_squares_is_the_ridge_solution_over_all_keys(penalty):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, inverse = torch.zeros(5, 30, dtype=torch.float64), torch.eye(30, dtype=torch.float64) / penalty
    chunks = []
    for size in (1, 4, 3, 20, 12):  # in the end more keys than columns
        keys, values = draw(30, size), draw(5, size)
        recursive_least_squares(weight, inverse, keys, values - weight @ keys)
        chunks.append((keys, values))
        K, V = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        torch.testing.assert_close(weight, ridge(K, V, penalty), rtol=1e-8, atol=1e-8)
    keys, values = chunks.pop(1)
    recursive_downdate(weight, inverse, keys, values)
    K, V = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
    torch.testing.assert_close(weight, ridge(K, V, penalty), rtol=1e-8, atol=1e-8)
