"""The masks of the stored edits, packed to bits, and the exact search for the nearest one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 17  # words that one step of a CPU search compares: a megabyte stays in the cache


class MaskBank:
    """Packed masks with exact distances and overlaps, counted in integers.

    x_match = argmin d_H(M(a(x)), M(a(x'))) (MEMOIR, informed retention). MEMOIR's masks all have k ones, so the nearest
    mask in Hamming distance is the one with the largest overlap. Of equally near masks the newest wins.

    ids     of the edits, one per row
    packed  (n × ⌈D/64⌉) uint64, the masks; the first bit of a word is its lowest. A change makes a new array
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        """width: D, bits in a mask; device: where the search runs. A GPU keeps its own copy of the masks."""
        self.width, self.device = width, torch.device(device)
        self.on_gpu = self.device.type != "cpu"
        self.ids: list[str] = []
        self.packed = np.zeros((0, -(-width // 64)), dtype=np.uint64)
        self._copy = torch.zeros(self.packed.shape, dtype=torch.int64, device=self.device)  # of the first masks

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[str], masks: Tensor) -> None:
        """Append masks (n × D) bool under the edits' ids."""
        self.packed = np.concatenate([self.packed, self._pack(masks)])
        self.ids.extend(ids)

    def remove(self, edit_id: str) -> int:
        """Remove one edit's mask and return the row that it had. KeyError if there is none."""
        if edit_id not in self.ids:
            raise KeyError(f"no mask of edit {edit_id!r} in the bank")
        row = self.ids.index(edit_id)
        self.replace(self.ids[:row] + self.ids[row + 1 :], np.delete(self.packed, row, axis=0))
        return row

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        """Replace all ids and packed masks, (n × ⌈D/64⌉) uint64."""
        if packed.shape != (expected := (len(ids), self.packed.shape[1])):
            raise ValueError(f"packed masks have shape {packed.shape}, expected {expected}")
        self.ids, self.packed, self._copy = list(ids), packed, self._copy[:0]

    def nearest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For each mask (B × D) bool: the row of the nearest stored mask, and their overlap in bits, (B,) int64 each.

        While the bank is empty, rows are -1 and overlaps 0.
        """
        if not len(self.ids):
            return np.full(len(masks), -1), np.zeros(len(masks), dtype=np.int64)
        query = self._pack(masks)
        distances = self._count(query, np.bitwise_xor)
        rows = len(self.ids) - 1 - distances[:, ::-1].argmin(1)  # of equals the newest
        return rows, np.bitwise_count(self.packed[rows] & query).sum(1, dtype=np.int64)

    def overlaps(self, masks: Tensor) -> np.ndarray:
        """(B × n) int64, the overlap in bits of each mask (B × D) bool with every stored one."""
        return self._count(self._pack(masks), np.bitwise_and)

    def masks(self, rows: np.ndarray) -> Tensor:
        """(n × D) bool, the stored masks of some rows."""
        bits = np.unpackbits(self.packed[rows].view(np.uint8), axis=1, count=self.width, bitorder="little")
        return torch.from_numpy(bits.view(bool))

    def _pack(self, masks: Tensor) -> np.ndarray:
        if masks.shape[-1] != self.width:
            raise ValueError(f"masks have {masks.shape[-1]} bits, expected {self.width}")
        bits = np.packbits(masks.cpu().numpy(), axis=1, bitorder="little")
        return np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)

    def _count(self, query: np.ndarray, combine: np.ufunc) -> np.ndarray:
        """(B × n) int64: the ones of combine(stored, query), for packed queries (B × W)."""
        return self._count_on_device(query, combine) if self.on_gpu else self._count_on_cpu(query, combine)

    def _count_on_cpu(self, query: np.ndarray, combine: np.ufunc) -> np.ndarray:
        counts = np.empty((len(query), len(self.ids)), dtype=np.int64)
        step = max(1, BLOCK // query.shape[1])

        def count(start: int) -> None:
            block = self.packed[start : start + step]
            for row, words in zip(counts, query, strict=True):
                ones = np.bitwise_count(combine(block, words))
                row[start : start + step] = ones.sum(1, dtype=np.uint32)

        starts, threads = range(0, len(self.ids), step), torch.get_num_threads()
        if threads == 1 or len(starts) < 8:  # starting threads would take longer than the search itself
            for start in starts:
                count(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(count, starts))
        return counts

    def _count_on_device(self, query: np.ndarray, combine: np.ufunc) -> np.ndarray:
        if len(new := self.packed[len(self._copy) :]):
            self._copy = torch.cat([self._copy, torch.from_numpy(new.view(np.int64)).to(self.device)])
        queries = torch.from_numpy(query.view(np.int64)).to(self.device)
        in_torch = torch.bitwise_xor if combine is np.bitwise_xor else torch.bitwise_and
        counts = [count_bits(in_torch(self._copy, words)).sum(1) for words in queries]
        return torch.stack(counts).cpu().numpy()


def count_bits(words: Tensor) -> Tensor:
    """The number of ones in each int64 of a tensor: sums over pairs of bits, then nibbles, then bytes."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return (words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56
