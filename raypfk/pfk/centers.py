"""Centers: the misses that the selection must cover (section 4.4, Algorithm 1 lines 5-7)."""

import torch
from torch import Tensor

from raypfk.pfk.kernel import Descriptors, Kernel


def greedy_k_center(kernel: Kernel, misses: Descriptors, p: int, seed: int) -> Tensor:
    """Indices (min(p, M),) int64 of p of the M misses, in the order chosen.

    The first is drawn with `seed`; then always the miss whose largest similarity to the centers so far is smallest, of
    equals the first. Similarities are rounded from float64 to float32. With p >= M all misses, in index order. A miss
    with a NaN comes last. O(p M L) time and O(M L) memory: one running maximum, no p x M matrix.
    Raises ValueError for p < 0.
    """
    m = len(misses.z)
    if p < 0:
        raise ValueError(f"expected p >= 0 centers, got {p}")
    if p >= m or p == 0:
        return torch.arange(min(p, m), device=misses.z.device)
    misses = misses.to(torch.float64)
    broken_M = ~(misses.z.isfinite().all(1) & misses.g.isfinite().all(1))
    largest = torch.finfo(torch.float32).max
    closest_M = torch.full((m,), -torch.inf, device=misses.z.device).masked_fill(broken_M, largest)
    chosen = [torch.randint(m, (), generator=torch.Generator().manual_seed(seed)).to(misses.z.device)]
    for _ in range(p - 1):
        similar_M = kernel.block(misses.rows(chosen[-1][None]), misses)[0].float()
        closest_M = torch.maximum(closest_M, similar_M.nan_to_num(nan=-torch.inf, posinf=largest))
        closest_M[chosen[-1]] = torch.inf
        chosen.append(closest_M.argmin())
    return torch.stack(chosen)
