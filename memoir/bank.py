"""The masks of the edits made so far, and the search among them: exact, or approximate and faster among very many."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from memoir import kernels


class MaskBank:
    """Masks packed to bits; distances and overlaps are counted exactly, in integers.

    x_match = argmin d_H(M(a(x)), M(a(x'))) (MEMOIR, informed retention); of equals the newest wins. As MEMOIR's masks
    all have k ones, the nearest in Hamming distance is the one with the largest overlap.

    ids     of the edits, one per row
    packed  (n × ⌈D/64⌉) uint64, the rows in use of what there is room for; at hand, as every question asks for it
    block   masks that one thread compares in one call
    """

    BLOCK = 1 << 21  # words in a block, 16 MB: enough that what a call costs does not show

    def __init__(self, width: int):
        """width: D, bits in a mask."""
        self.width = width
        self.ids: list[str] = []
        self._words = np.zeros((0, -(-width // 64)), dtype=np.uint64)
        self.block = max(1, self.BLOCK // self._words.shape[1])
        self.packed = self._words

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[str], masks: Tensor) -> None:
        """Append masks (n × D) bool under the edits' ids."""
        self._append(ids, kernels.pack(self._checked(masks).cpu().numpy()))

    def remove(self, edit_id: str) -> int:
        """Forget one edit's mask; returns the row it had. KeyError where there is none."""
        if edit_id not in self.ids:
            raise KeyError(f"no mask of edit {edit_id!r} in the bank")
        row = self.ids.index(edit_id)
        self.packed[row:-1] = self.packed[row + 1 :]
        self.packed = self.packed[:-1]
        self.ids.pop(row)
        return row

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        """Take over ids and packed masks (n × ⌈D/64⌉) uint64."""
        if packed.shape != (len(ids), self._words.shape[1]):
            raise ValueError(f"packed masks have shape {packed.shape}, expected {(len(ids), self._words.shape[1])}")
        self.ids, self.packed = [], self._words[:0]
        self._append(ids, packed)

    def nearest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For each mask (B × D) bool: the row of the nearest stored one, and their overlap in bits.

        Rows are -1 and overlaps 0 while the bank is empty.
        """
        if not len(self.ids):
            return np.full(len(masks), -1), np.zeros(len(masks), dtype=np.int64)
        return self._closest(self._checked(masks))

    def overlaps(self, masks: Tensor) -> np.ndarray:
        """(B × n) int64, the overlap in bits of each mask (B × D) bool with every stored one."""
        return self._shared(self._checked(masks))

    def masks(self, rows: np.ndarray) -> Tensor:
        """(n × D) bool, the stored masks of those rows."""
        words = self._words[rows]
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=self.width, bitorder="little")
        return torch.from_numpy(bits.view(bool))

    def columns(self, rows: np.ndarray, k: int) -> np.ndarray:
        """(n × k) int64, the columns of the stored masks of those rows, which have k each."""
        return kernels.columns(self._words, rows, k)

    def _append(self, ids: Sequence[str], words: np.ndarray) -> None:
        made, needed = len(self.ids), len(self.ids) + len(words)
        if needed > len(self._words):
            room = np.zeros((max(64, needed, 2 * made), words.shape[1]), dtype=np.uint64)
            room[:made] = self.packed
            self._words = room
        self._words[made:needed] = words
        self.packed = self._words[:needed]
        self.ids.extend(ids)

    def _closest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What `nearest` returns, for masks (B × D) bool and a bank that is not empty; on as many threads as torch may
        use."""
        masks = masks.cpu().numpy()
        if len(self.ids) <= self.block or torch.get_num_threads() == 1:
            rows, _, overlaps = kernels.nearest(self.packed, masks)
            return rows, overlaps
        step, starts = self.block, range(0, len(self.ids), self.block)
        with ThreadPoolExecutor(min(torch.get_num_threads(), len(starts))) as pool:
            found = pool.map(lambda start: kernels.nearest(self.packed[start : start + step], masks), starts)
        rows, distances, overlaps = map(np.stack, zip(*found, strict=True))
        block, query = len(starts) - 1 - distances[::-1].argmin(0), np.arange(len(masks))  # of equals the last
        return block * step + rows[block, query], overlaps[block, query]

    def _shared(self, masks: Tensor) -> np.ndarray:
        """What `overlaps` returns, for masks (B × D) bool."""
        return kernels.shared(self.packed, masks.cpu().numpy())

    def _checked(self, masks: Tensor) -> Tensor:
        """Masks (n × D) bool in one piece; ValueError where they have another width."""
        if masks.shape[-1] != self.width:
            raise ValueError(f"masks have {masks.shape[-1]} bits, expected {self.width}")
        return masks.contiguous()


class DeviceBank(MaskBank):
    """The same, searched on a GPU, which keeps a copy of the masks."""

    BLOCK = 1 << 24  # where each step of counting makes a copy of them, 128 MB

    def __init__(self, width: int, device: torch.device | str):
        super().__init__(width)
        self._copy = torch.zeros(0, self._words.shape[1], dtype=torch.int64, device=device)
        # In one kernel, which reads the masks once. It is compiled at the first search.
        self._fused = torch.compile(distant_bits, dynamic=True) if self._copy.is_cuda else None

    def remove(self, edit_id: str) -> int:
        row = super().remove(edit_id)
        self._copy = torch.cat([self._copy[:row], self._copy[row + 1 :]])
        return row

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        super().replace(ids, packed)
        self._copy = self._copy[:0]

    def _shared(self, masks: Tensor) -> np.ndarray:
        masks = masks.to(self._copy.device)
        distances, ones = (found.cpu().numpy() for found in (self._distances(masks), masks.sum(1, keepdim=True)))
        return self._overlap(np.arange(len(self.ids)), distances, ones)

    def _closest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        # Distance and row as one number: the least has the least distance and, of equals, the last row.
        total, masks = len(self.ids), masks.to(self._copy.device)
        last = torch.arange(total - 1, -1, -1, device=masks.device)
        least = torch.add(last, self._distances(masks), alpha=total).amin(1)
        # The host waits once, for both.
        least, ones = torch.stack([least, masks.sum(1)]).cpu().numpy()
        rows, distances = total - 1 - least % total, least // total
        return rows, self._overlap(rows, distances, ones)

    def _overlap(self, rows: np.ndarray, distances: np.ndarray, ones: np.ndarray) -> np.ndarray:
        """|M ∧ M'|, half of what |M| + |M'| is more than d_H: of stored masks M, by row, with M' of so many ones."""
        return (np.bitwise_count(self._words[rows]).sum(1, dtype=np.int64) + ones - distances) >> 1

    def _distances(self, masks: Tensor) -> Tensor:
        """d_H (B × n) int64 of masks (B × D) bool on the device and all stored ones."""
        known = len(self._copy)
        if known < len(self.ids):
            self._copy = torch.cat([self._copy, _int64(self.packed[known:]).to(self._copy.device)])
        return torch.stack([self._distances_of(query) for query in pack_bits(masks)])

    def _distances_of(self, query: Tensor) -> Tensor:
        if self._fused:
            try:
                return self._fused(self._copy, query)
            except Exception as error:  # no C compiler, say; what torch raises then has no common class
                warnings.warn(
                    f"masks are compared step by step, which is slower: no kernel could be compiled ({error})",
                    stacklevel=2,
                )
                self._fused = None
        blocks = self._copy.split(self.block)
        return torch.cat([distant_bits(block, query) for block in blocks])


class ApproximateBank(MaskBank):
    """The same, searched along a graph of near neighbours (HNSW, Malkov and Yashunin 2018) by faiss, an extra.

    It may miss the nearest mask; the overlap with what it finds is exact, and so are `overlaps`. A mask that is removed
    stays in the graph as a way to others, until most of it is such.
    """

    # Up to a `block` of masks looking at all of them is as fast.
    LINKS, EFFORT = 32, 64  # of a mask in the graph; masks looked at on the way, at least
    CANDIDATES = 8  # neighbours asked for, of which the first that is still stored is taken

    def __init__(self, width: int):
        try:
            import faiss  # only now: it brings a mathematical library of its own
        except ImportError:
            raise ImportError("an approximate search needs faiss: pip install 'memoir[search]'") from None
        super().__init__(width)
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

    def _closest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        if len(self.ids) <= self.block:
            return super()._closest(masks)
        self._grow()
        queries = kernels.pack(masks.cpu().numpy())
        found = self._graph.search(queries.view(np.uint8), self.CANDIDATES)[1]  # -1 where there are no more
        candidates = np.where(found >= 0, self._row_of[found], -1)
        rows = np.take_along_axis(candidates, (candidates >= 0).argmax(1)[:, None], axis=1)[:, 0]
        if (lost := rows < 0).any():  # all that was found is removed
            rows[lost], _ = super()._closest(masks[lost])
        return rows, np.bitwise_count(self._words[rows] & queries).sum(1, dtype=np.int64)

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
            self._graph.add(self.packed[known:].view(np.uint8))
        finally:
            self._faiss.omp_set_num_threads(threads)
        self._row_of = np.concatenate([self._row_of, np.arange(known, len(self.ids))])


def make_bank(width: int, device: torch.device | str = "cpu", *, approximate: bool = False) -> MaskBank:
    """The bank for masks of `width` bits on a device."""
    if approximate:
        return ApproximateBank(width)
    return MaskBank(width) if torch.device(device).type == "cpu" else DeviceBank(width, device)


def _int64(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.int64))


def pack_bits(masks: Tensor) -> Tensor:
    """Masks (n × D) bool as words (n × ⌈D/64⌉) int64, the first bit of each the lowest: as `kernels.pack` does."""
    bits = nn.functional.pad(masks, (0, -masks.shape[1] % 64)).view(len(masks), -1, 64)
    return (bits << torch.arange(64, device=masks.device)).sum(-1)


def count_bits(words: Tensor) -> Tensor:
    """Ones in each int64 of a tensor, int64 of its shape: sums of neighbouring bits, pairs, nibbles, then bytes."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return (words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56


def distant_bits(stored: Tensor, query: Tensor) -> Tensor:
    """d_H (n,) int64 of packed masks (n × W) int64 from one (W,), in torch."""
    return count_bits(stored ^ query).sum(1)
