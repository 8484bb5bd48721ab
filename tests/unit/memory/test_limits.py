"""What malloc keeps for later is given back when it is asked for."""

from __future__ import annotations

import ctypes

import psutil
import pytest
import torch

from lorasmith.memory.limits import release_caches, trim_heap


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc is not glibc's")
@pytest.mark.parametrize("give_back", [trim_heap, lambda: release_caches(torch.device("cpu"))])
def test_pages_between_what_is_in_use_go_back_to_the_system(give_back):
    blocks = [torch.zeros(16_000) for _ in range(1_500)]  # 64 kB each: too small for a mapping of their own
    in_use = [blocks[n] for n in range(0, len(blocks), 50)]  # all over the heap, and at its end
    in_use.append(blocks[-1])
    del blocks
    before = resident()
    give_back()
    assert before - resident() > 60e6
