"""Each Triton twin against its reference, through the ops that send tensors to it. Run by test_twins.py, in a
process of its own: triton reads TRITON_INTERPRET when it is imported, and the ops when they first choose.

Its interpreter cuts fp32 to bf16 where a GPU rounds: bf16 is given a unit more, rounding is seen in fp16.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorasmith.attention.rotary import reference_rotary, rotary
from lorasmith.kernels.twins import triton_twin
from lorasmith.ops.cross_entropy import cross_entropy_sum, linear_cross_entropy
from lorasmith.ops.dropout import DropoutMask, MaskRows, dropout_key, keep_mask, mask_hashes, token_hashes
from lorasmith.ops.fp8 import quantise_rows
from lorasmith.ops.lora_linear import lora_linear, lora_linear_reference
from lorasmith.ops.rms_norm import reference_rms_norm, rms_norm
from lorasmith.ops.swiglu import reference_swiglu, swiglu

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 2, 33)], ids=str)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def compare(ours: Function, reference: Function, inputs: list[Tensor], slack: float = 1) -> None:
    """Outputs and gradients against the reference in float64, relative to the largest or to 1."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    mine, other = (_values_and_gradients(f, xs) for f, xs in ((ours, inputs), (reference, wide)))
    tolerance = slack * max(TOLERANCES[x.dtype] for x in inputs)
    for got, true in zip(mine, other, strict=True):
        assert got.shape == true.shape
        assert (got.double() - true).abs().max() <= tolerance * max(true.abs().max(), 1)


def _values_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.manual_seed(1)
    cotangents = [torch.randn(y.shape, dtype=torch.float64).to(inputs[0].dtype).to(y.dtype) for y in outs]
    trained = [x for x in inputs if x.requires_grad]
    return outs + list(torch.autograd.grad(outs, trained, cotangents))


def randn(*shape: int, dtype: torch.dtype, trained: bool = True) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(trained)


def test_these_tensors_do_go_through_the_twins() -> None:
    for dtype in TOLERANCES:
        assert triton_twin("rms_norm", torch.empty(1, dtype=dtype)) is not None
    assert triton_twin("rms_norm", torch.empty(1), torch.empty(1, dtype=torch.float64)) is None


@DTYPES
@SHAPES
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)]
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: reference_rms_norm(x, w, 1e-5), inputs)


def test_rms_norm_rounds_as_its_reference_does() -> None:
    """To the last digit of fp16, but for sums of another order: what is normalised is rounded on the way."""
    x, weight = randn(4, 256, dtype=torch.float16), randn(256, dtype=torch.float16, trained=False)
    same = rms_norm(x, weight, 1e-5) == reference_rms_norm(x, weight, 1e-5)
    assert same.float().mean() > 0.99
    wide = randn(256, dtype=torch.float32)
    assert rms_norm(x, wide, 1e-5).dtype == torch.float32
    assert torch.autograd.grad(rms_norm(x, wide, 1e-5).sum(), (x, wide))[1].dtype == torch.float32


def test_rms_norm_of_strided_rows() -> None:
    """Rows with gaps, and columns with gaps."""
    x, weight = randn(3, 66, dtype=torch.float32), randn(33, dtype=torch.float32)
    for cut in (lambda x: x[:, :33], lambda x: x[:, ::2]):
        compare(
            lambda x, w, cut=cut: rms_norm(cut(x), w, 1e-6),
            lambda x, w, cut=cut: reference_rms_norm(cut(x), w, 1e-6),
            [x, weight],
        )


def test_rms_norm_s_weight_gradient_over_many_rows() -> None:
    """Two programs sum each column, and two each row."""
    grad, x, rstd = torch.randn(260, 140), torch.randn(260, 140), torch.rand(260)
    twin = triton_twin("rms_norm", x)
    assert twin is not None
    got = twin.weight_gradient(grad, x, rstd)
    true = (grad.double() * x.double() * rstd.double()[:, None]).sum(0)
    assert (got - true).abs().max() <= 2e-6 * true.abs().max()


@DTYPES
@SHAPES
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(swiglu, reference_swiglu, [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)])


def test_swiglu_of_the_halves_of_a_wide_projection() -> None:
    """More than one block in a row; and the far ends of silu."""
    x = torch.cat([torch.tensor([[-200.0, 200.0, -20.0, 0.0]]), torch.randn(1, 4300)], 1).requires_grad_()
    both = [lambda x, f=f: f(*x.chunk(2, -1)) for f in (swiglu, reference_swiglu)]
    compare(*both, [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("turning", "heads"), [(6, (9, 1)), (10, (1, 1))])
def test_rotary(interleaved: bool, turning: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Heads of size 10; angles of the two features of a plane need not be equal."""
    q, k = (randn(2, 2, h, 10, dtype=dtype) for h in heads)
    cos, sin = (randn(1, 2, turning, dtype=dtype, trained=False) for _ in range(2))

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=interleaved)
        assert all(x.transpose(1, 2).is_contiguous() for x in turned)
        return turned

    def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference_rotary(x.transpose(1, 2), cos, sin, interleaved=interleaved) for x in (q, k))

    compare(ours, reference, [q, k, cos, sin])


def test_rotary_of_several_rows_with_their_own_angles() -> None:
    q, k = randn(2, 3, 4, 8, dtype=torch.float32), randn(2, 1, 4, 16, dtype=torch.float32)
    cos, sin = (randn(2, 4, 8, dtype=torch.float32, trained=False) for _ in range(2))
    compare(
        lambda q, k: rotary(q, k[..., ::2], cos, sin),
        lambda q, k: tuple(reference_rotary(x, cos.double(), sin.double()) for x in (q, k[..., ::2])),
        [q, k],
    )


def mask(p: float, tokens: int) -> DropoutMask:
    key = dropout_key(3, 7, "layers.0.q_proj")
    return DropoutMask(p, key, token_hashes(numbers(tokens), key))


def numbers(tokens: int) -> Tensor:
    return torch.arange(tokens) * 977


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-17])
@pytest.mark.parametrize("width", [1, 2, 7, 2049])
def test_masks_are_those_of_torch_bit_by_bit(p: float, width: int) -> None:
    """`MaskRows` is torch's form on every device; `keep_mask` draws by the twin."""
    drawn = MaskRows(mask(p, 6), width, torch.float32, block=6).draw(0, 6)
    assert torch.equal(keep_mask(numbers(6), width, p, mask(p, 6).key), drawn.bool())


@DTYPES
def test_dropped_and_added_are_torch_s_to_the_digit(dtype: torch.dtype) -> None:
    x, total = torch.randn(6, 77).to(dtype), torch.randn(6, 77).to(dtype)
    factor = MaskRows(mask(0.3, 6), 77, dtype, block=6).draw(0, 6)
    twin = triton_twin("dropout", x)
    assert twin is not None
    hashes = mask_hashes(mask(0.3, 6), 77)
    assert torch.equal(twin.drop(x, *hashes), factor * x)
    wide = torch.randn(6, 154).to(dtype)[:, ::2]
    assert torch.equal(twin.drop(wide, *hashes), factor * wide)
    added = total.clone()
    twin.add_dropped(added, x, *hashes)
    unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(added, torch.addcmul(total, x, factor), rtol=unit, atol=0)


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_lora_linear(p: float, dtype: torch.dtype) -> None:
    x, w = randn(2, 3, 14, dtype=dtype), randn(9, 14, dtype=dtype, trained=False)
    a, b = randn(4, 14, dtype=torch.float32), randn(9, 4, dtype=torch.float32)
    dropped = mask(p, 6) if p else None
    compare(
        lambda x, w, a, b: lora_linear(x, w, None, a, b, 2.0, dropped),
        lambda x, w, a, b: lora_linear_reference(x, w, None, a, b, 2.0, dropped),
        [x, w, a, b],
    )


@DTYPES
@pytest.mark.parametrize(
    ("rows", "scaled", "biased", "chunk_bytes"),
    [(1, False, False, None), (5, True, False, 400), (5, False, True, 400), (5, True, True, None)],
)
def test_linear_cross_entropy(
    rows: int, scaled: bool, biased: bool, chunk_bytes: int | None, dtype: torch.dtype
) -> None:
    """In one tile, and in tiles narrower than the vocabulary."""
    vocabulary, size = 53, 12
    hidden, head = randn(rows, size, dtype=dtype), randn(vocabulary, size, dtype=dtype, trained=False)
    labels, weights = torch.randint(vocabulary, (rows,)), torch.rand(rows) + 0.5
    scale = torch.rand(vocabulary).add(0.5).to(dtype) if scaled else None
    bias = torch.randn(vocabulary).to(dtype) if biased else None

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy(
            *(hidden, head, labels, weights), bias=bias, weight_scale=scale, chunk_bytes=chunk_bytes
        )

    def reference(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ head.T * (1 if scale is None else scale.double())
        return cross_entropy_sum(logits + (0 if bias is None else bias.double()), labels, weights)

    compare(ours, reference, [hidden, head])


def test_linear_cross_entropy_of_a_wide_tile_of_a_sure_model() -> None:
    """More than one block in a row; labels far above and far below all else."""
    hidden, head = randn(3, 4, dtype=torch.float32), randn(5000, 4, dtype=torch.float32)
    with torch.no_grad():
        head[17] = hidden[0] * 30
        head[4900] = -hidden[1] * 30
    labels, weights = torch.tensor([17, 4900, 4999]), torch.ones(3)
    compare(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels, weights),
        lambda hidden, head: cross_entropy_sum(hidden @ head.T, labels, weights),
        [hidden, head],
        slack=20,  # logits of some hundreds, which fp32 products leave rounded
    )
    with torch.no_grad():
        lost = linear_cross_entropy(hidden, head, torch.tensor([17, 4900, 5000]), weights)
    assert lost.isinf(), "a label outside of the vocabulary"


@DTYPES
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 5001)], ids=str)
def test_codes_of_fp8_are_those_of_torch(shape: tuple[int, int], factored: bool, dtype: torch.dtype) -> None:
    """As near to the value, where triton's interpreter can round: it loses the carry of a mantissa that is
    rounded up to a power of two, cuts off subnormal ones, and takes halves upwards."""
    wide = torch.randn(shape[0], 2 * shape[1]).to(dtype)
    factor = torch.rand(shape[1]) if factored else None
    for x in (wide[:, : shape[1]], wide[:, ::2]):
        codes, scales = quantise_rows(x, factor)
        values = x.float() if factor is None else x.float() * factor
        true_scales = values.abs().amax(1, keepdim=True) / 448
        values = (values / true_scales).clamp(-448, 448)
        true = values.to(torch.float8_e4m3fn)
        can_round = (true.view(torch.uint8) & 7 != 0) & (values.abs() >= 2**-6)
        error, least = ((c.float() - values).abs()[can_round] for c in (codes, true))
        assert torch.equal(scales, true_scales)
        assert torch.equal(error, least)


def test_rows_that_are_not_finite_stay_so_in_fp8() -> None:
    _, scales = quantise_rows(torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert scales[0].isnan()
    assert scales[1].isinf()
    assert scales[2] > 0
