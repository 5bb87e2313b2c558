"""The kernel itself runs here under Triton's interpreter, in a process of its own: what is interpreted is decided when
triton is imported. It is compiled for a GPU as well, and run where there is one."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, fused

from .strategies import NAMES, WEIGHTS, descriptors, quick, seeds

SMALL = fused.Tile(16, 16, 16)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(fused.triton is None, reason="needs triton")
few = settings(quick, max_examples=12)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)
kernels = st.builds(Kernel, st.sampled_from(NAMES), lengths, st.sampled_from(WEIGHTS))
types = st.sampled_from(TYPES)


@pytest.fixture(scope="module")
def interpreted():
    """`fused.survivors` in a process where Triton interprets."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        executor.submit(int).result()
        patch.undo()
        yield lambda *arguments: executor.submit(fused.survivors, *arguments).result()


def exact_scores(kernel: Kernel, centers: Descriptors, pool: Descriptors) -> torch.Tensor:
    """(M, B) float64, of the numbers as stored."""
    m, n = len(centers.z), len(pool.z)
    rows, cols = torch.arange(m).repeat_interleave(n), torch.arange(n).repeat(m)
    return kernel.pairs(centers.to(torch.float32), pool.to(torch.float32), rows, cols).reshape(m, n)


def floors(exact_MB: torch.Tensor, seed: int) -> torch.Tensor:
    """Of each center one of: the score of an image, a number, -inf, +inf."""
    generator = torch.Generator().manual_seed(seed)
    m, n = exact_MB.shape
    images = [exact_MB[:, i] for i in torch.randint(n, (3,), generator=generator)] if n else []
    numbers = torch.tensor([0.3, -torch.inf, torch.inf], dtype=torch.float64)[:, None].expand(3, m)
    choices = torch.stack([*numbers, *images])
    return choices[torch.randint(len(choices), (m,), generator=generator), torch.arange(m)].float()


def assert_survivors(got, exact_MB: torch.Tensor, floor_M: torch.Tensor, capacity: int, bound: float) -> None:
    """Every pair above its floor by the bound, none below it by the bound; counts go on beyond the capacity."""
    count_M, cols_MC = got
    assert count_M.dtype == cols_MC.dtype == torch.int32 and cols_MC.shape == (len(exact_MB), capacity)
    must_MB, may_MB = ~(exact_MB < floor_M[:, None] + bound), ~(exact_MB < floor_M[:, None] - bound)
    for count, cols, must, may in zip(count_M.tolist(), cols_MC.tolist(), must_MB, may_MB, strict=True):
        listed = cols[: min(count, capacity)]
        assert must.sum() <= count <= may.sum()
        assert len(set(listed)) == len(listed) and all(0 <= col < len(may) and may[col] for col in listed)
        assert cols[count:] == [-1] * (capacity - len(listed))
        assert count > capacity or set(must.nonzero().flatten().tolist()) <= set(listed)


@needs_triton
@few
@given(kernels, st.integers(0, 20), st.integers(0, 40), types, st.sampled_from([1, 4, 64]), seeds)
def test_the_kernel_finds_what_is_above_the_floors(interpreted, kernel, m, n, dtype, capacity, seed):
    """All kernels, weights and dtypes, scales of any length, tiles not full, ties, lists too short: the exact set, but
    for scores at the floor to within the error bound."""
    centers, pool = (descriptors(k, kernel.lengths, seed + k).to(dtype) for k in (m, n))
    exact_MB = exact_scores(kernel, centers, pool)
    floor_M = floors(exact_MB, seed)
    got = interpreted(kernel, centers, pool, floor_M, capacity, SMALL)
    assert_survivors(got, exact_MB, floor_M, capacity, fused.error_bound(kernel))


@quick
@given(kernels, st.integers(0, 20), st.integers(0, 40), types, st.sampled_from([1, 4, 64]), seeds)
def test_the_torch_path_finds_the_same(kernel, m, n, dtype, capacity, seed):
    """`survivors_torch`, in small tiles, keeps the same contract."""
    centers, pool = (descriptors(k, kernel.lengths, seed + k).to(dtype) for k in (m, n))
    exact_MB = exact_scores(kernel, centers, pool)
    floor_M = floors(exact_MB, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "TORCH_TILE", (7, 9))
        got = fused.survivors_torch(kernel, centers, pool, floor_M, capacity)
    assert_survivors(got, exact_MB, floor_M, capacity, kernel.error_bound())


@needs_triton
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_is_not_below_a_floor(interpreted, name, dtype):
    """A NaN in the first or last scale of an image or a center survives every floor, and disturbs no other pair."""
    kernel = Kernel(name, (20, 1, 3))
    centers, pool = descriptors(5, kernel.lengths, 1).to(dtype), descriptors(21, kernel.lengths, 2).to(dtype)
    pool.z[3, 2], pool.z[20, 23], centers.z[4, 20] = torch.nan, torch.nan, torch.nan
    exact_MB, floor_M = exact_scores(kernel, centers, pool), torch.tensor([torch.inf, 0.0, 0.5, 1e9, torch.inf])
    assert exact_MB[:, [3, 20]].isnan().all() and exact_MB[4].isnan().all()
    for got in (
        interpreted(kernel, centers, pool, floor_M, 30, SMALL),
        fused.survivors_torch(kernel, centers, pool, floor_M, 30),
    ):
        assert_survivors(got, exact_MB, floor_M, 30, fused.error_bound(kernel))
        assert got[0][[0, 3, 4]].tolist() == [2, 2, 21]


@needs_triton
def test_ties_at_the_floor_survive_in_every_tile(interpreted):
    """300 x 40 zero scores, floors 0 and the next number above: all of a center's or none, each once, in programs that
    go through the pool in more than one group of centers."""
    zero = Descriptors(torch.zeros(300, 2), torch.zeros(300, 2))
    floor_M = torch.zeros(300)
    floor_M[::2] = 2.0**-149
    assert fused.GROUP * SMALL.m < 300
    count_M, cols_MC = interpreted(Kernel("pfk", (2,)), zero, zero.rows(slice(0, 40)), floor_M, 40, SMALL)
    assert (count_M[::2] == 0).all() and (cols_MC[::2] == -1).all() and (count_M[1::2] == 40).all()
    assert torch.equal(cols_MC[1::2].sort(dim=1).values, torch.arange(40, dtype=torch.int32).expand(150, 40))


@needs_triton
def test_no_center_or_no_image_is_an_empty_answer():
    """M = 0 or B = 0 starts no kernel."""
    kernel, part = Kernel("pfk", (3,)), descriptors(4, (3,), 0)
    none = part.rows(slice(0, 0))
    for function in (fused.survivors, fused.survivors_torch):
        count_M, cols_MC = function(kernel, part, none, torch.zeros(4), 2)
        assert count_M.tolist() == [0] * 4 and (cols_MC == -1).all()
        assert [x.shape for x in function(kernel, none, part, torch.zeros(0), 2)] == [(0,), (0, 2)]


def test_what_does_not_fit_is_refused():
    """Shapes, dtypes and capacities are errors, not wrong candidates; `pcc` does not look at g."""
    kernel, part, floor_M = Kernel("pfk", (3,)), descriptors(4, (3,), 0), torch.zeros(4)
    wrong = [
        (part, part, floor_M[:3], 2),
        (part, part, floor_M.double(), 2),
        (part, part, floor_M, 0),
        (part, part.to(torch.bfloat16), floor_M, 2),
        (part.to(torch.float64), part.to(torch.float64), floor_M, 2),
        (part, descriptors(4, (4,), 0), floor_M, 2),
        (part, Descriptors(part.z, part.g[:2]), floor_M, 2),
    ]
    for function in (fused.survivors, fused.survivors_torch):
        for arguments in wrong:
            with pytest.raises(ValueError, match="expected"):
                function(kernel, *arguments)
    fused.survivors_torch(Kernel("pcc", (3,)), part, Descriptors(part.z, part.g[:2]), floor_M, 2)
    with pytest.raises(ValueError, match="too long"):
        fused.error_bound(Kernel("pcc", (1 << 21,)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_error_bound_is_of_use(name, kind):
    """Wider than the torch path's, yet a thousandth of the largest score at 256 + 512 numbers."""
    kernel = Kernel(name, (256, 512), kind)
    largest = sum(kernel.weights) * (2 if name == "pfk-sum" else 1)
    assert kernel.error_bound() < fused.error_bound(kernel) < 1e-3 * largest


@needs_triton
def test_the_fastest_tile_is_the_one_measured_fastest(monkeypatch):
    """Every tile is run on the block itself, with floors that nothing passes."""
    from triton import testing

    runs, times, part = [], [3.0, 1.0, 2.0], descriptors(4, (3,), 0).to(torch.bfloat16)
    monkeypatch.setattr(fused, "survivors", lambda *arguments: runs.append(arguments))
    monkeypatch.setattr(testing, "do_bench", lambda run: (run(), times[len(runs) - 1])[1])
    assert fused.fastest_tile(Kernel("pfk", (3,)), part, part) == fused.TILES["pfk"][1]
    assert [run[-1] for run in runs] == list(fused.TILES["pfk"]) and all((run[3] == torch.inf).all() for run in runs)


@needs_triton
def test_pcc_on_whole_chunks_copies_nothing():
    """Scales that are whole chunks in ascending order are scanned where they lie."""
    z = torch.zeros(3, 192)
    assert fused._packed(Kernel("pcc", (64, 128)), Descriptors(z, z), 64) is z
    assert fused._packed(Kernel("pcc", (128, 64)), Descriptors(z, z), 64) is not z
    assert fused._packed(Kernel("pfk", (65, 127)), Descriptors(z, z), 64).shape == (3, 4 * 128)


def test_without_triton_the_torch_path_remains(monkeypatch):
    """The module is imported, says that the kernel is not available, and refuses to run it; the torch path works."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    spec = importlib.util.spec_from_file_location("fused_without_triton", fused.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel, part, floor_M = Kernel("pcc", (3,)), descriptors(4, (3,), 0), torch.full((4,), -torch.inf)
    assert not module.available("cuda") and not fused.available("cpu")
    assert module.survivors_torch(kernel, part, part, floor_M, 9)[0].tolist() == [4] * 4
    with pytest.raises(RuntimeError, match="needs the package triton"):
        module.survivors(kernel, part, part, floor_M, 9)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux", reason="needs a compiler")
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_for_hopper_as_the_design_says(name, tmp_path, monkeypatch):
    """Without a GPU: warp-group products, one group of them in flight while the next is issued, no spilled register, no
    complaint of the assembler that they are serialised, shared memory within a multiprocessor's."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    try:
        ptxas = knobs.nvidia.ptxas.path
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no assembler for NVIDIA GPUs: {error}")
    kernel = Kernel(name, (256, 512))
    tile = fused._tiles(kernel, torch.bfloat16)[0]
    constants = fused._constants(kernel, tile)
    kinds = (
        [f"tensordesc<bf16[{rows},{tile.k}]>" for rows in (tile.m, tile.n)] + ["*fp32", "*i32", "*i32"] + 3 * ["i32"]
    )
    names = fused._scan.arg_names
    signature = dict(zip(names, kinds + ["constexpr"] * (len(names) - len(kinds)), strict=True))
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(fused._scan, signature, constants)
    compiled = fused.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [ptxas, "-v", "--gpu-name=sm_90a", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "wgmma.mma_async" in compiled.asm["ptx"] and "wgmma.wait_group.sync.aligned 1" in compiled.asm["ptx"]
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", said) and "serialized" not in said, said
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.skipif(not fused.available("cuda"), reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_every_tile_finds_the_same(name):
    """Compiled and run: the interpreter's contract at the real tile sizes, also for a single center or image."""
    for dtype, lengths, m, n in itertools.product(TYPES, [(256, 512), (33, 200, 1, 64)], [1, 300], [1, 1500]):
        kernel = Kernel(name, lengths)
        centers, pool = descriptors(m, lengths, 1).to(dtype), descriptors(n, lengths, 2).to(dtype)
        exact_MB = exact_scores(kernel, centers, pool)
        floor_M = floors(exact_MB, 3)
        on_gpu = [Descriptors(*(x.cuda() for x in part)) for part in (centers, pool)]
        for tile in fused._tiles(kernel, dtype):
            got = fused.survivors(kernel, *on_gpu, floor_M.cuda(), 700, tile)
            assert_survivors([x.cpu() for x in got], exact_MB, floor_M, 700, fused.error_bound(kernel))
