from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir import bank as bank_module
from memoir.bank import MaskBank, count_bits

DEVICES = ("cpu", "gpu")  # the search of a GPU in torch, here on CPU tensors


def bank_on(device: str, width: int) -> MaskBank:
    bank = MaskBank(width)
    bank.on_gpu = device == "gpu"
    return bank


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), stored=st.integers(0, 40), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_bank_finds_what_brute_force_finds(device, width, stored, seed, data):
    rng = np.random.default_rng(seed)
    bank, rows = bank_on(device, width), []
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
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [7, 100, 1 << 20])
def test_every_way_of_searching_is_brute_force(device, threads, block, monkeypatch):
    rng = np.random.default_rng(3)
    order = np.argsort(rng.random((262, 130)))[:, :40]  # all masks have 40 ones, as MEMOIR's have k
    every = torch.zeros(262, 130, dtype=torch.bool).scatter_(1, torch.from_numpy(order), True)
    masks, queries = every[:257], every[257:]
    queries[0] = masks[40] = masks[11]  # of equals the newest wins
    bank = bank_on(device, 130)
    bank.add([str(i) for i in range(len(masks))], masks)
    monkeypatch.setattr(bank_module, "BLOCK", block)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    expected = (queries[:, None] & masks).sum(-1).numpy()
    rows, overlap = bank.nearest(queries)
    newest = expected.shape[1] - 1 - expected[:, ::-1].argmax(1)
    assert np.array_equal(rows, newest) and rows[0] == 40
    assert np.array_equal(overlap, expected.max(1)) and np.array_equal(bank.overlaps(queries), expected)


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


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_packed_words_are_the_bits_of_the_masks(width):
    masks = torch.rand(5, width, generator=torch.Generator().manual_seed(0)) < 0.4
    bank = MaskBank(width)
    bank.add(list("abcde"), masks)
    expected = [
        [sum(1 << bit for bit, one in enumerate(row[start : start + 64]) if one) for start in range(0, width, 64)]
        for row in masks.tolist()
    ]
    assert bank.packed.tolist() == expected


def test_bits_are_counted_in_every_word():
    rng = np.random.default_rng(0)
    words = np.concatenate([rng.integers(0, 2**64, 500, dtype=np.uint64), np.array([0, 2**64 - 1], dtype=np.uint64)])
    found = count_bits(torch.from_numpy(words.view(np.int64)))
    assert found.tolist() == [int(word).bit_count() for word in words.tolist()]


@pytest.mark.parametrize("device", DEVICES)
def test_a_bank_takes_over_its_own_masks_and_those_of_another(device):
    masks = torch.rand(9, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    bank, other = bank_on(device, 70), MaskBank(70)
    bank.add([str(i) for i in range(9)], masks)
    bank.nearest(masks)
    other.replace(bank.ids[3:], bank.packed[3:])
    bank.replace(bank.ids[3:], bank.packed[3:])
    for one in (bank, other):
        assert one.ids == [str(i) for i in range(3, 9)] and torch.equal(one.masks(np.arange(6)), masks[3:])
        assert one.nearest(masks[3:])[0].tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"packed masks have shape \(2, 1\), expected \(2, 2\)"):
        bank.replace(["a", "b"], np.zeros((2, 1), dtype=np.uint64))


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
