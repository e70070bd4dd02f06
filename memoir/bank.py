"""The masks of the edits made so far, and the search among them: exact, or approximate and faster among very many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numkong
import numpy as np
import torch
from torch import Tensor


class MaskBank:
    """Masks packed to bits; distances and overlaps are counted exactly, in integers.

    x_match = argmin d_H(M(a(x)), M(a(x'))) (MEMOIR, informed retention); of equals the newest wins. As MEMOIR's masks
    all have k ones, the nearest in Hamming distance is the one with the largest overlap.
    """

    # Words compared at a time, 16 MB: enough that what a call costs does not show.
    _BLOCK_WORDS = 1 << 21

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        """width: D, bits in a mask; device: where the masks lie and are compared."""
        self.width = width
        self.ids: list[str] = []
        self._words = torch.zeros(0, -(-width // 64), dtype=torch.int64, device=device)
        self._ones = torch.zeros(0, dtype=torch.int64, device=device)
        self._on_cpu = self._words.device.type == "cpu"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def packed(self) -> np.ndarray:
        """(n × ⌈D/64⌉) uint64, one row per edit."""
        return self._words[: len(self.ids)].cpu().numpy().view(np.uint64)

    def add(self, ids: Sequence[str], masks: Tensor) -> None:
        """Append masks (n × D) bool under the edits' ids."""
        self._append(ids, self._pack(masks), masks.sum(1))

    def remove(self, edit_id: str) -> int:
        """Forget one edit's mask; returns the row it had. KeyError where there is none."""
        if edit_id not in self.ids:
            raise KeyError(f"no mask of edit {edit_id!r} in the bank")
        row, total = self.ids.index(edit_id), len(self.ids)
        for kept in (self._words, self._ones):
            kept[row : total - 1] = kept[row + 1 : total].clone()
        self.ids.pop(row)
        return row

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        """Take over ids and packed masks (n × ⌈D/64⌉) uint64."""
        if packed.shape != (len(ids), self._words.shape[1]):
            raise ValueError(f"packed masks have shape {packed.shape}, expected {(len(ids), self._words.shape[1])}")
        self.ids = []
        ones = np.bitwise_count(packed).sum(1, dtype=np.int64)
        self._append(ids, torch.from_numpy(packed.view(np.int64)), torch.from_numpy(ones))

    def nearest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For each mask (B × D) bool: the row of the nearest stored one, and their overlap in bits.

        Rows are -1 and overlaps 0 while the bank is empty.
        """
        if not len(self.ids):
            return np.full(len(masks), -1), np.zeros(len(masks), dtype=np.int64)
        queries = self._pack(masks)
        (rows, distances), *further = self._by_block(lambda start, end: self._closest(queries, start, end))
        for other, far in further:
            closer = far <= distances
            rows, distances = np.where(closer, other, rows), np.where(closer, far, distances)
        ones = self._ones[torch.from_numpy(rows)] + masks.sum(1).to(self._ones.device)
        return rows, (ones.cpu().numpy() - distances) // 2

    def overlaps(self, masks: Tensor) -> np.ndarray:
        """(B × n) int64, the overlap in bits of each mask (B × D) bool with every stored one."""
        queries, ones = self._pack(masks), masks.sum(1).to(self._ones.device)
        none = queries.new_zeros(len(queries), 0)
        blocks = self._by_block(lambda start, end: self._shared(queries, ones, start, end))
        return torch.cat([none, *blocks], dim=1).cpu().numpy()

    def masks(self, rows: np.ndarray) -> Tensor:
        """(n × D) bool, the stored masks of those rows."""
        words = self._words[torch.from_numpy(rows)].cpu().numpy()
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=self.width, bitorder="little")
        return torch.from_numpy(bits.view(bool)).to(self._words.device)

    def _append(self, ids: Sequence[str], rows: Tensor, counts: Tensor) -> None:
        made, needed = len(self.ids), len(self.ids) + len(rows)
        if needed > len(self._words):
            words, ones, room = self._words, self._ones, max(64, needed, 2 * made)
            self._words, self._ones = words.new_zeros(room, words.shape[1]), ones.new_zeros(room)
            self._words[:made], self._ones[:made] = words[:made], ones[:made]
        self._words[made:needed], self._ones[made:needed] = rows, counts
        self.ids.extend(ids)

    def _closest(self, queries: Tensor, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the stored masks from `start` to `end` the row of the one nearest to each packed query (B × W), and its
        distance, (B,) each."""
        stored = self._words[start:end]
        if self._on_cpu:
            distances = hamming(stored, queries).numpy()
            rows = distances.shape[1] - 1 - distances[:, ::-1].argmin(1)
            return start + rows, distances[np.arange(len(rows)), rows].astype(np.int64)
        # Distance and row as one number: the least has the least distance and, of equals, the last row.
        total = len(stored)
        last = torch.arange(total - 1, -1, -1, device=stored.device)
        found = torch.add(last, distant_bits(stored, queries), alpha=total).amin(1).cpu().numpy()
        return end - 1 - found % total, found // total

    def _shared(self, queries: Tensor, ones: Tensor, start: int, end: int) -> Tensor:
        """‖M ∧ M'‖₁ (B × m) int64 of packed queries (B × W) int64, with so many ones (B,) int64, with the stored masks
        from `start` to `end`: half of what |M| + |M'| is more than d_H."""
        stored = self._words[start:end]
        distances = hamming(stored, queries).long() if self._on_cpu else distant_bits(stored, queries)
        return (self._ones[start:end] + ones[:, None] - distances) >> 1

    def _by_block(self, work: Callable[[int, int], Any]) -> list[Any]:
        """work(start, end) for the stored rows, a block at a time; on a CPU on as many threads as torch may use."""
        step = max(1, self._BLOCK_WORDS // self._words.shape[1])
        blocks = [(start, min(start + step, len(self.ids))) for start in range(0, len(self.ids), step)]
        threads = min(torch.get_num_threads(), len(blocks)) if self._on_cpu else 1
        if threads <= 1:
            return [work(*block) for block in blocks]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda block: work(*block), blocks))

    def _pack(self, masks: Tensor) -> Tensor:
        """(n × ⌈D/64⌉) int64 on the bank's device."""
        if masks.shape[-1] != self.width:
            raise ValueError(f"masks have {masks.shape[-1]} bits, expected {self.width}")
        packed = np.packbits(masks.cpu().numpy(), axis=1, bitorder="little")
        if missing := -packed.shape[1] % 8:
            packed = np.pad(packed, ((0, 0), (0, missing)))
        return torch.from_numpy(packed.view(np.int64)).to(self._words.device)


class ApproximateBank(MaskBank):
    """The same, searched along a graph of near neighbours (HNSW, Malkov and Yashunin 2018) by faiss, an extra.

    It may miss the nearest mask; the overlap with what it finds is exact, and so are `overlaps`. A mask that is removed
    stays in the graph as a way to others, until most of it is such.
    """

    LINKS, EFFORT = 32, 64  # of a mask in the graph; masks looked at on the way, at least
    CANDIDATES = 8  # neighbours asked for, of which the first that is still stored is taken
    FEW = 1 << 20  # words in the bank, 8 MB, up to which looking at all of them is as fast

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        try:
            import faiss  # only now: it brings a mathematical library of its own
        except ImportError:
            raise ImportError("an approximate search needs faiss: pip install 'memoir[search]'") from None
        super().__init__(width, device)
        self._faiss = faiss
        self._clear()

    def remove(self, edit_id: str) -> int:
        row = super().remove(edit_id)
        self._row_of[self._row_of == row] = -1
        self._row_of[self._row_of > row] -= 1
        return row

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        super().replace(ids, packed)
        self._clear()

    def nearest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        if len(self.ids) * self._words.shape[1] <= self.FEW:
            return super().nearest(masks)
        self._grow()
        queries = self._pack(masks).cpu()
        found = self._graph.search(_bytes(queries), self.CANDIDATES)[1]  # -1 where there are no more
        candidates = np.where(found >= 0, self._row_of[found], -1)
        rows = np.take_along_axis(candidates, (candidates >= 0).argmax(1)[:, None], axis=1)[:, 0]
        if (lost := rows < 0).any():  # all that was found is removed
            rows[lost] = super().nearest(masks[torch.from_numpy(lost)])[0]
        shared = np.bitwise_count(queries.numpy().view(np.uint64) & self.packed[rows])
        return rows, shared.sum(1, dtype=np.int64)

    def _clear(self) -> None:
        self._graph = self._faiss.IndexBinaryHNSW(64 * self._words.shape[1], self.LINKS)
        self._graph.hnsw.efSearch = self.EFFORT
        self._row_of = np.zeros(0, dtype=np.int64)  # of each mask in the graph the row, -1 once it is removed

    def _grow(self) -> None:
        """Enter what was appended; once most of the graph is gone, all of it anew."""
        known = int((self._row_of >= 0).sum())
        if known < len(self._row_of) / 2:
            self._clear()
            known = 0
        if known == len(self.ids):
            return
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # several would link masks in an order that differs from run to run
        try:
            self._graph.add(_bytes(self._words[known : len(self.ids)].cpu()))
        finally:
            self._faiss.omp_set_num_threads(threads)
        self._row_of = np.concatenate([self._row_of, np.arange(known, len(self.ids))])


def _bytes(words: Tensor) -> np.ndarray:
    """(n × 8 W) uint8 of packed masks (n × W) int64 on a CPU."""
    return np.ascontiguousarray(words.numpy()).view(np.uint8)


def count_bits(words: Tensor) -> Tensor:
    """Ones in each int64 of a tensor, int64 of its shape: sums of neighbouring bits, pairs, nibbles, then bytes."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return (words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56


def distant_bits(stored: Tensor, queries: Tensor) -> Tensor:
    """d_H (B × n) int64 of packed masks in torch alone, wherever they lie: stored (n × W) int64, queries (B × W)."""
    return torch.stack([count_bits(stored ^ query).sum(1) for query in queries])


def hamming(stored: Tensor, queries: Tensor) -> Tensor:
    """d_H (B × n) of packed masks on a CPU, as fast as they are read: stored (n × W) int64, queries (B × W) int64.

    Whole numbers in float64: of all types that numkong puts out, the one that it does not take a slow way to.
    """
    return torch.from_numpy(np.asarray(numkong.cdist(_bytes(queries), _bytes(stored), metric="hamming", dtype="uint1")))
