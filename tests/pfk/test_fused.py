"""The kernels themselves run here under Triton's interpreter, in a process of its own: what is interpreted is decided
when triton is imported. The scan is compiled for a GPU as well, and both are run where there is one."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, TopK, fused, scan, standardise

from .strategies import NAMES, WEIGHTS, descriptors, quick, seeds, vectors

SMALL = fused.Tile(32, 32)
needs_triton = pytest.mark.skipif(fused.triton is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not fused.available("cuda"), reason="needs a Hopper GPU")
few = settings(quick, max_examples=12)
lengths = st.lists(st.integers(1, 80), min_size=1, max_size=4).map(tuple)
kernels = st.builds(Kernel, st.sampled_from(NAMES), lengths, st.sampled_from(WEIGHTS))


@pytest.fixture(scope="module")
def interpreted():
    """A function of `fused` in a process where Triton interprets."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        executor.submit(int).result()
        patch.undo()
        yield lambda name, *arguments: executor.submit(_call, name, *arguments).result()


def _call(name: str, *arguments):
    return getattr(fused, name)(*arguments)


def case(dtype: torch.dtype, widths: list[int], squared: bool, m: int, n: int, seed: int) -> tuple:
    """Arguments of `survivors` in which about half of the pairs are out; some edges are 0, or below."""
    generator = torch.Generator().manual_seed(seed)
    ends = tuple(fused.CHUNK * end for end in accumulate(widths if squared else [sum(widths)]))
    codes = [torch.randint(-127, 128, (x, ends[-1]), generator=generator) for x in (m, n)]
    codes = [x.to(dtype) if dtype == torch.int8 else (x / 127).to(dtype) for x in codes]
    edge = sums(codes, ends, squared).abs().median() if m and n else torch.tensor(1.0)
    alpha = torch.rand(m, generator=generator) * 2 * float(edge)
    alpha[::5], unit = 0, torch.rand(n, generator=generator) + 0.5
    return *codes, ends, squared, alpha, alpha * 0.1 * (torch.arange(m) % 3 - 1), unit


def sums(codes: list[torch.Tensor], ends: tuple[int, ...], squared: bool) -> torch.Tensor:
    """(M, B) float64."""
    groups = [slice(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]
    products = [codes[0][:, x].double() @ codes[1][:, x].double().T for x in groups]
    return torch.stack(products).norm(dim=0) if squared else products[0]


def assert_bits(words: torch.Tensor, given: tuple) -> None:
    """Every pair at its edge or above it is in, none that is below it by more than rounding; nothing past the pool."""
    codes, (ends, squared, alpha, shift, unit) = list(given[:2]), given[2:]
    sum_MB = sums(codes, ends, squared)
    edge_MB = alpha[:, None].double() * unit - shift[:, None]
    got = torch.zeros(sum_MB.shape, dtype=torch.bool)
    rows, cols = fused.pairs_of(words, words.numel() * 32)
    got[rows, cols] = True  # IndexError past the pool
    size = 1e-5 * (edge_MB.abs() + sum_MB.abs() + 1e-3)
    assert got[sum_MB >= edge_MB + size].all()
    assert (sum_MB[got] >= (edge_MB * (1 - 3 * fused.HELD_ERROR * len(ends)) - size)[got]).all()


@needs_triton
@few
@given(
    st.sampled_from(fused.DTYPES), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans(),
    st.integers(0, 70), st.integers(0, 70), seeds,
)  # fmt: skip
def test_a_pair_has_its_bit_unless_it_is_out(interpreted, dtype, widths, squared, m, n, seed):
    """Both dtypes, one group or several, tiles that are not full, more than one group of tiles, ties, edges below 0."""
    arguments = case(dtype, widths, squared, m, n, seed)
    assert_bits(interpreted("survivors", *arguments, SMALL), arguments)


@needs_triton
@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_edges_that_are_not_finite(interpreted, dtype):
    """alpha infinite: nobody, whatever the unit; minus infinity: everybody; a NaN in codes or edges is not out."""
    codes_MP, codes_BP, ends, squared, alpha, shift, unit = case(dtype, [1, 2], True, 5, 40, 0)
    alpha = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e9, torch.inf])
    unit[3] = torch.inf
    if dtype == torch.bfloat16:
        codes_BP[7, 300], codes_MP[4] = torch.nan, torch.nan
    words = interpreted("survivors", codes_MP, codes_BP, ends, squared, alpha, shift * 0, unit, SMALL)
    rows, _ = fused.pairs_of(words, 200)
    expected = [0, 40, 40, 0, 0] if dtype == torch.int8 else [1, 40, 40, 1, 40]
    assert torch.bincount(rows, minlength=5).tolist() == expected


@needs_triton
@few
@given(kernels, st.sampled_from(["int8", "bfloat16"]), st.integers(1, 20), st.integers(1, 40), st.floats(0, 1), seeds)
def test_no_pair_that_reaches_its_floor_is_missed(interpreted, kernel, precision, m, n, high, seed):
    """From descriptors to pairs as on a GPU: layout, rounding, bounds, kernel and bits together."""
    of, parts = scan.layout(kernel, True), [descriptors(x, kernel.lengths, seed + x) for x in (m, n)]
    centers, pool = (rounded_as_on_a_gpu(of, precision, part) for part in parts)
    scores = kernel.block(*(part.to(torch.float64) for part in parts))
    factor = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    floor_M = (scores * factor).quantile(high, dim=1).float()
    bounds = scan._bounds(kernel, centers, pool, floor_M, factor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan.fused, "survivors", lambda *arguments: interpreted("survivors", *arguments, SMALL))
        rows, cols = scan._by_fused_kernel(of, centers, pool, bounds, m * n)
        assert len(rows) == 0 or scan._by_fused_kernel(of, centers, pool, bounds, len(rows) - 1) is None
    got = set(zip(rows.tolist(), cols.tolist(), strict=True))
    assert {tuple(pair) for pair in (scores * factor >= floor_M[:, None]).nonzero().tolist()} <= got
    by_torch = zip(*(x.tolist() for x in scan._by_torch(of, centers, pool, bounds, m * n)), strict=True)
    assert precision == "bfloat16" or set(by_torch) <= got  # one shift for all images lets more in


def rounded_as_on_a_gpu(of: scan.Layout, precision: str, part: Descriptors) -> scan.Rounded:
    n = len(part.z)
    codes = torch.empty(n, of.groups[-1].stop, dtype=getattr(torch, precision))
    steps, errors = torch.ones(n), torch.empty(len(of.vectors), n)
    scan._round_rows(of, part, codes, steps, errors)
    return scan.Rounded(precision, codes, steps, errors + 2.0**-18 * max(of.lengths_G))


@needs_triton
@few
@given(st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple), st.integers(0, 30), seeds)
def test_pair_products_are_those_of_the_matrices(interpreted, lengths, q, seed):
    """In float64, of scales of any length, and of any number of pairs."""
    generator, spans = torch.Generator().manual_seed(seed), Kernel("pcc", lengths).spans
    a, b = vectors(6, lengths, seed), vectors(9, lengths, seed + 1)
    rows, cols = (torch.randint(x, (q,), generator=generator) for x in (6, 9))
    expected = torch.stack([(a[:, s].double() @ b[:, s].double().T)[rows, cols] for s in spans])
    got = interpreted("pair_products", a, b, spans, rows, cols)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@needs_triton
def test_many_groups_let_all_in_rather_than_miss_one(interpreted):
    """So many roundings of the sums that they say nothing any more."""
    codes = torch.ones(2, 300 * fused.CHUNK, dtype=torch.int8)
    ends = tuple(fused.CHUNK * (i + 1) for i in range(300))
    for alpha in (-1e5, 1.0):
        bounds = torch.full((2,), alpha), torch.zeros(2), torch.ones(2)
        words = interpreted("survivors", codes, codes, ends, True, *bounds, SMALL)
        assert words[:, 0].tolist() == [3, 3]


def test_bits_become_pairs_in_order():
    """Also the 32nd bit, the sign; and no more than asked for."""
    words = torch.tensor([[0, 1 << 5, -(1 << 31)], [0, 0, 0], [3, 0, 0]], dtype=torch.int32)
    rows, cols = fused.pairs_of(words, 4)
    assert rows.tolist() == [0, 0, 2, 2] and cols.tolist() == [37, 95, 0, 1]
    assert fused.pairs_of(words, 3) is None and fused.pairs_of(words, 2) is None
    assert [len(x) for x in fused.pairs_of(words[1:2], 0)] == [0, 0]


def test_what_does_not_fit_is_refused():
    """Shapes, dtypes and groups are errors, not wrong candidates."""
    codes, bounds = torch.zeros(4, 256, dtype=torch.int8), [torch.zeros(4)] * 3
    wrong = [
        (codes, codes, (256,), True, torch.zeros(3), *bounds[:2]),
        (codes, codes, (256,), True, *bounds[:2], torch.zeros(4).double()),
        (codes, codes.to(torch.bfloat16), (256,), True, *bounds),
        (codes.float(), codes.float(), (256,), True, *bounds),
        (codes, codes[:, :128], (256,), True, *bounds),
        (codes, codes, (100, 256), True, *bounds),
        (codes, codes, (128, 256), False, *bounds),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected"):
            fused.survivors(*arguments)


def test_without_triton_the_torch_path_remains(monkeypatch):
    """The module is imported, says that the kernel is not available, and refuses to run it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    spec = importlib.util.spec_from_file_location("fused_without_triton", fused.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.available("cuda") and not fused.available("cpu")
    with pytest.raises(RuntimeError, match="needs the package triton"):
        module.survivors(*case(torch.int8, [1], True, 4, 4, 0))


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux", reason="needs a compiler")
@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize("ends", [(512, 1536), (1536,)])
def test_it_compiles_for_hopper_as_the_design_says(ends, dtype, tmp_path, monkeypatch):
    """Without a GPU: warp-group products, no spilled register, and both registers and shared memory for two programs on
    a multiprocessor, so that one multiplies while the other compares."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    try:
        ptxas = knobs.nvidia.ptxas.path
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no assembler for NVIDIA GPUs: {error}")
    tile = fused.Tile()
    constants = fused._constants(ends, len(ends) > 1, dtype, tile)
    name = {torch.int8: "i8", torch.bfloat16: "bf16"}[dtype]
    blocks = [f"tensordesc<{name}[{rows},{constants['TILE_K']}]>" for rows in (tile.m, tile.n)]
    kinds, names = blocks + ["*fp32"] * 3 + ["*i32"] + ["i32"] * 3, fused._scan.arg_names
    signature = dict(zip(names, kinds + ["constexpr"] * (len(names) - len(kinds)), strict=True))
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(fused._scan, signature, constants)
    compiled = fused.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [ptxas, "-v", "--gpu-name=sm_90a", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", said) and "serialized" not in said, said
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    assert registers * 32 * tile.warps * 2 <= 65536 and compiled.metadata.shared * 2 <= 227 * 1024


@needs_gpu
@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_on_a_gpu_bits_are_the_same(dtype):
    """Compiled and run at the real tile size: the interpreter's contract, also for a single center or image."""
    for widths, squared in (([4, 8], True), ([12], False), ([1, 2, 1, 3], True)):
        for m, n in ((1, 1), (300, 1), (1, 1500), (300, 1500)):
            arguments = case(dtype, widths, squared, m, n, 3)
            on_gpu = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
            assert_bits(fused.survivors(*on_gpu).cpu(), arguments)


@needs_gpu
def test_on_a_gpu_pair_products_are_those_of_the_matrices():
    """Compiled, beside torch's sparse product."""
    lengths = (256, 1, 511)
    a, b, spans = vectors(300, lengths, 0), vectors(900, lengths, 1), Kernel("pcc", lengths).spans
    for q in (1, 2, 10_001):  # Triton compiles another kernel where a number is 1
        rows, cols = (torch.randint(x, (q,), generator=torch.Generator().manual_seed(x)) for x in (300, 900))
        expected = torch.stack([(a[:, s].double() @ b[:, s].double().T)[rows, cols] for s in spans])
        got = fused.pair_products(a.cuda(), b.cuda(), spans, rows.cuda(), cols.cuda()).cpu()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@needs_gpu
@pytest.mark.parametrize("precision", ["auto", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_top_k_is_the_cpus(name, precision):
    """To the bit, with ties and zero vectors, in any precision and in several blocks."""
    kernel, generator, n = Kernel(name, (70, 129)), torch.Generator().manual_seed(0), 30_000
    noise = [standardise(torch.randn(n + 200, 199, generator=generator), kernel.lengths) for _ in range(2)]
    for x, few in zip(noise, descriptors(300, kernel.lengths, 2), strict=True):
        x[::101], x[-2:] = few[: len(x[::101])], few[-2:]
    pool, centers, keys = Descriptors(*(x[:n] for x in noise)), Descriptors(*(x[n:] for x in noise)), torch.arange(n)
    here, there = TopK(200, 20), TopK(200, 20, device="cuda", precision=precision)
    here.add(kernel, centers, pool, keys)
    there.add(kernel, *(Descriptors(*(x.cuda() for x in part)) for part in (centers, pool)), keys.cuda())
    assert all(torch.equal(x, y.cpu()) for x, y in zip(here.result(), there.result(), strict=True))
    assert precision == "float32" or there.counts["int8"] + there.counts["bfloat16"] > 0
