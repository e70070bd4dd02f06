"""Seconds, on CPUs and GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch


def clock(device: torch.device) -> float:
    """Seconds, once the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Seconds of each of several calls of work(), after one that warms up."""
    work()
    stamps = [clock(device)]
    for _ in range(rounds):
        work()
        stamps.append(clock(device))
    return np.diff(stamps).tolist()


def within(seconds: float, items: Iterable[Any]) -> Iterator[Any]:
    """The first item, and those after it whose turn comes within so many seconds."""
    began = time.monotonic()
    for i, item in enumerate(items):
        if i and time.monotonic() - began > seconds:
            return
        yield item
