"""`linear` is F.linear, whichever library computes it, for every layout of its inputs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lorasmith.ops import gemm
from lorasmith.ops.gemm import linear

BIG = 600, 256
"""Rows and features that are enough for the fast road, where this machine has one."""


@pytest.fixture(params=["this machine's choice", "oneDNN", "torch"])
def choice(request, monkeypatch):
    """Each road on every machine: what a machine chooses by itself depends on its maker and its threads."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    if request.param != "this machine's choice":
        monkeypatch.setattr(gemm, "_mkl_is_slow", lambda: request.param == "oneDNN")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("outputs", [8, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_product(outputs, biased):
    torch.manual_seed(0)
    x, w, bias = torch.randn(BIG), torch.randn(outputs, BIG[1]), torch.randn(outputs) if biased else None
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x, w, bias).double(), exact, atol=2e-4, rtol=0)
    assert torch.equal(linear(x[None], w, bias)[0], linear(x, w, bias)), "the same call gives the same bits"


@pytest.mark.usefixtures("choice")
def test_transposed_strided_and_spread_inputs():
    torch.manual_seed(0)
    wide, w = torch.randn(BIG[0], 2 * BIG[1]), torch.randn(BIG[1], 8)
    for x in (wide[:, : BIG[1]], wide[:, ::2], torch.randn(BIG[::-1]).t(), torch.randn(BIG[1]).expand(BIG)):
        for weight in (w.t(), w.t().contiguous(), torch.randn(16, BIG[1])[::2]):
            exact = (x.double() @ weight.double().t()).float()
            torch.testing.assert_close(linear(x, weight), exact, atol=2e-4, rtol=0)


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 600])
def test_every_dtype_and_no_rows(dtype, rows):
    x, w = torch.randn(rows, 256).to(dtype), torch.randn(8, 256).to(dtype)
    found = linear(x, w)
    assert (found.dtype, found.shape) == (dtype, (rows, 8))
    tolerance = 0.5 if dtype == torch.bfloat16 else 2e-4
    torch.testing.assert_close(found, F.linear(x, w), atol=tolerance, rtol=0)


def test_the_rule_is_the_same_each_time_and_small_products_stay_with_torch(monkeypatch):
    monkeypatch.setattr(gemm, "_mkl_is_slow", lambda: True)
    chooses = gemm._onednn_is_faster
    x, w, rank = torch.empty(BIG), torch.empty(300, BIG[1]), torch.empty(8, BIG[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [chooses(x, w), chooses(x, rank), chooses(x[:4], w), chooses(x.double(), w.double())] == [
        True,
        True,
        False,
        False,
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [chooses(x, w), chooses(x, rank), chooses(x, rank.t().contiguous().t())] == [False, True, True]


GROWTH = """
import os, psutil, torch
from lorasmith.ops.gemm import bound_product_stores
assert "LRU_CACHE_CAPACITY" not in os.environ, "importing has an effect"
{call}
product, memory, w = torch.ops.mkldnn._linear_pointwise, psutil.Process().memory_info, torch.randn(8, 64)
for rows in range(1, 400):
    product(torch.randn(rows, 64), w, None, "none", [], "")
    if rows == 100:
        warm = memory().rss
print((memory().rss - warm) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_new_shapes_do_not_fill_the_memory():
    """And they would: the negative control leaves the stores as torch has them."""
    environment = {name: value for name, value in os.environ.items() if name not in gemm._STORES}

    def growth_mb(call):
        command = [sys.executable, "-c", GROWTH.format(call=call)]
        return float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    unbound = growth_mb("")
    assert unbound > 40, "each of 300 shapes should have cost some 0.3 MB or more"
    assert growth_mb("bound_product_stores()") < unbound / 4


def test_what_the_environment_says_about_the_stores_wins(monkeypatch):
    kept, ours = gemm._STORES
    monkeypatch.setattr(os, "environ", {kept: "7"})
    gemm.bound_product_stores()
    assert os.environ == {kept: "7", ours: str(gemm._KEPT)}


NO_ROOM = """
import resource, torch
from lorasmith.ops import gemm
gemm._mkl_is_slow = lambda: True
torch.set_num_threads(1)
x, w = torch.randn(600, 256), torch.randn(8, 256)
known = gemm.linear(x, w)
assert torch.allclose(torch.nn.functional.linear(x[:577], w), known[:577], atol=1e-4)
freed = [torch.empty(16_000) for _ in range(200)]  # small ones, which malloc keeps for later
last = torch.empty(16_000)
del freed
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    torch.ops.mkldnn._linear_pointwise(x[:577], w, None, "none", [], "")
except RuntimeError as error:
    print(error)
print(torch.allclose(gemm.linear(x[:577], w), known[:577], atol=1e-4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_without_memory_for_code_the_other_library_multiplies():
    done = subprocess.run([sys.executable, "-c", NO_ROOM], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == [gemm.NO_PRIMITIVE, "True", ""], done.stderr[-2000:]
