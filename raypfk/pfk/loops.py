"""The inner loops of exact scoring on a CPU, compiled by Numba: one pass where torch would make ten.

Beside int8 matrix products, every further pass over their results costs as much as a tenth of them.
Each function here does what a few lines of torch say elsewhere, named in its docstring; the tests hold them together.
Loops run over contiguous slices, and sums may be reordered: both let the compiler use vector instructions.

Shapes: T matrices (of each scale the features and, but for `pcc`, the Fisher scores), l = L_j numbers of one, M
centers, B pool images, Q pairs, S terms; m and b as many of them as a tile holds.
"""

import numpy as np
from numba import njit

MAX_LENGTH = 1.001  # of a standardised scale, also where it was stored as float16
FAST = {"reassoc", "contract", "arcp", "nsz"}  # sums in any order; NaN and infinity stay what they are
ONE, HALF, OFFSET = np.float32(1), np.float32(128.5), np.int32(128)
FULL, TOO_MANY = -1, -2
ONE_AT_MOST = np.float32(MAX_LENGTH**2)
SMALLEST_STEP = np.float32(1e-12)  # so that nothing in units of two of them overflows
LARGEST, SIGN_OFF = np.float32(127), np.int32(0x7FFFFFFF)
SLACK, LEAST = np.float32(1.0001), np.float32(1e-6)  # of an error that is itself computed in float32


def _compiled(function):
    try:
        return njit(function, fastmath=FAST, nogil=True, cache=True)
    except RuntimeError:  # no folder to keep compiled code in: each process compiles its own
        return njit(function, fastmath=FAST, nogil=True)


@_compiled
def lengths(x_NL, start, stop, lengths_N):
    """Length of one scale of each vector: `x[:, start:stop].norm(dim=1)`."""
    for n in range(len(x_NL)):
        lengths_N[n] = np.sqrt(_square(x_NL[n, start:stop]))


@_compiled
def _square(x_l):
    total = np.float32(0)
    for i in range(len(x_l)):
        total += x_l[i] * x_l[i]
    return total


@_compiled
def round_to_int8(x_NL, start, codes_Nl, steps_N, errors_N, lengths_N):
    """Codes, step, error bound and length of one scale of each vector, as `scan._round_rows`."""
    bits_NL, stop, largest = x_NL.view(np.int32), start + codes_Nl.shape[1], np.empty(1, np.int32)
    for n in range(len(codes_Nl)):
        x_l = x_NL[n, start:stop]
        lengths_N[n], largest[0] = np.sqrt(_square(x_l)), _largest(bits_NL[n, start:stop])
        step = max(largest.view(np.float32)[0] / LARGEST, SMALLEST_STEP)
        steps_N[n], errors_N[n] = step, SLACK * np.sqrt(_round_row(x_l, codes_Nl[n], step)) + LEAST


@_compiled
def _largest(bits_l):
    # Without their sign, floats are in the order of their bits; and integers vectorise, where a NaN could be a float.
    largest = np.int32(0)
    for i in range(len(bits_l)):
        largest = max(largest, bits_l[i] & SIGN_OFF)
    return largest


@_compiled
def _round_row(x_l, codes_l, step):
    inverse, square = ONE / step, np.float32(0)
    for i in range(len(x_l)):
        code = np.int32(x_l[i] * inverse + HALF) - OFFSET
        codes_l[i] = code
        rest = x_l[i] - np.float32(code) * step
        square += rest * rest
    return square


@_compiled
def survivors(products_Tbm, images, paired, bounds, row, col, pairs_2C, found):
    """Appends the pairs of a tile whose bound reaches the limit, as `scan._upper_bounds` has it; returns their number.

    products_Tbm: int32 or float32, of which `images` rows count; row, col: the tile's first center and image;
    pairs_2C: int32, `found` of them taken. Returns `FULL` when they do not fit.
    """
    weights_S, factor_B, limit_m = bounds[0], bounds[5], bounds[6][row : row + products_Tbm.shape[2]]
    high_m = np.empty_like(limit_m)
    for b in range(images):
        n = col + b
        high_m[:] = 0
        for j in range(len(weights_S)):
            if paired:
                z = _correlations(products_Tbm, bounds, row, b, n, 2 * j)
                g = _correlations(products_Tbm, bounds, row, b, n, 2 * j + 1)
                _add_product(high_m, weights_S[j], z, g)
            else:
                _add_correlation(high_m, weights_S[j], _correlations(products_Tbm, bounds, row, b, n, j))
        i = _next(high_m, factor_B[n], limit_m, 0)
        while i < len(high_m):
            high = _product_bound(products_Tbm, bounds, row, b, n, i) if paired else high_m[i]
            if high * factor_B[n] >= limit_m[i]:
                found = _append(pairs_2C, found, row + i, n)
                if found == FULL:
                    return FULL
            i = _next(high_m, factor_B[n], limit_m, i + 1)
    return found


@_compiled
def survivors_by_one(products_Tbm, images, given, codes_M, codes_B, bounds, row, col, pairs_2C, found, most):
    """As `survivors` for `pfk`, where of each scale only one product, z or g (`given` 0 or 1), is in products_Tbm.

    The other correlation is at most 1; for the pairs that could be in by that, it is computed here, from codes (N, l).
    Returns `TOO_MANY` where these are more than `most`.
    """
    weights_S, factor_B, limit_m = bounds[0], bounds[5], bounds[6][row : row + products_Tbm.shape[2]]
    high_m = np.empty_like(limit_m)
    for b in range(images):
        n = col + b
        high_m[:] = 0
        for j in range(len(weights_S)):
            _add_size(high_m, weights_S[j], _correlations(products_Tbm, bounds, row, b, n, 2 * j + given))
        i = _next(high_m, factor_B[n], limit_m, 0)
        while i < len(high_m):
            most -= 1
            if most < 0:
                return TOO_MANY
            high = np.float32(0)
            for j in range(len(weights_S)):
                t, other = 2 * j + given, 2 * j + 1 - given
                r = _correlation(products_Tbm[t, b, i], bounds, t, row + i, n)
                s = _correlation(_code_product(codes_M[other][row + i], codes_B[other][n]), bounds, other, row + i, n)
                high += weights_S[j] * _largest_product(r, s)
            if high * factor_B[n] >= limit_m[i]:
                found = _append(pairs_2C, found, row + i, n)
                if found == FULL:
                    return FULL
            i = _next(high_m, factor_B[n], limit_m, i + 1)
    return found


@_compiled
def _append(pairs_2C, found, m, n):
    if found == pairs_2C.shape[1]:
        return FULL
    pairs_2C[0, found], pairs_2C[1, found] = m, n
    return found + 1


@_compiled
def _correlations(products_Tbm, bounds, row, b, n, t):
    # Of an image and a tile's centers: products (m,), the centers' steps and errors (m,), the image's step and error.
    _, steps_TM, errors_TM, pool_steps_TB, pool_errors_TB = bounds[:5]
    r_m, some = products_Tbm[t, b], slice(row, row + products_Tbm.shape[2])
    return r_m, steps_TM[t, some], errors_TM[t, some], pool_steps_TB[t, n], pool_errors_TB[t, n]


@_compiled
def _add_product(high_m, weight, z, g):
    # weight (|r| + a) (|s| + e), the signs of r and s taken for equal: half the operations of `_product_bound`.
    # Products, and errors, are in units of the image's steps u and v.
    (z_m, u_m, a_m, u, a), (g_m, v_m, e_m, v, e) = z, g
    weight, a, e, per_u, per_v = weight * u * v, a / u, e / v, ONE / u, ONE / v
    for i in range(len(high_m)):
        r = abs(np.float32(z_m[i])) * u_m[i] + (a_m[i] * per_u + a)
        s = abs(np.float32(g_m[i])) * v_m[i] + (e_m[i] * per_v + e)
        high_m[i] += weight * r * s


@_compiled
def _add_correlation(high_m, weight, r):
    r_m, u_m, a_m, u, a = r
    for i in range(len(high_m)):
        high_m[i] += weight * (np.float32(r_m[i]) * u_m[i] * u + (a_m[i] + a))


@_compiled
def _add_size(high_m, weight, r):
    r_m, u_m, a_m, u, a = r
    weight *= ONE_AT_MOST
    for i in range(len(high_m)):
        high_m[i] += weight * (abs(np.float32(r_m[i])) * u_m[i] * u + (a_m[i] + a))


@_compiled
def _next(high_m, factor, limit_m, i):
    # The first, from i on, that reaches its limit, or m. Two passes with vector instructions beat one without.
    high_k, limit_k, count = high_m[i:], limit_m[i:], np.int32(0)
    for k in range(len(high_k)):
        count += np.int32(high_k[k] * factor >= limit_k[k])
    first = np.int32(len(high_k))
    if count:
        for k in range(len(high_k)):
            first = min(first, np.int32(k) if high_k[k] * factor >= limit_k[k] else np.int32(len(high_k)))
    return i + first


@_compiled
def _product_bound(products_Tbm, bounds, row, b, n, i):
    weights_S, high = bounds[0], np.float32(0)
    for j in range(len(weights_S)):
        r = _correlation(products_Tbm[2 * j, b, i], bounds, 2 * j, row + i, n)
        s = _correlation(products_Tbm[2 * j + 1, b, i], bounds, 2 * j + 1, row + i, n)
        high += weights_S[j] * _largest_product(r, s)
    return high


@_compiled
def _correlation(product, bounds, t, m, n):
    # Of one pair, and how far it may be off.
    _, steps_TM, errors_TM, pool_steps_TB, pool_errors_TB = bounds[:5]
    return np.float32(product) * steps_TM[t, m] * pool_steps_TB[t, n], errors_TM[t, m] + pool_errors_TB[t, n]


@_compiled
def _largest_product(first, second):
    (r, a), (s, e) = first, second
    return r * s + abs(s) * a + (abs(r) + a) * e


@_compiled
def _code_product(x_l, y_l):
    total = np.int32(0)
    for i in range(len(x_l)):
        total = np.int32(total + np.int32(np.int32(x_l[i]) * np.int32(y_l[i])))  # not int64, slow to multiply
    return total


@_compiled
def pair_products(a_ML, b_BL, starts, rows_Q, cols_Q, out_SQ):
    """Of each scale, in float64, the products a[rows[q]] · b[cols[q]]. starts: of the scales, and L."""
    for q in range(len(rows_Q)):
        for j in range(len(out_SQ)):
            scale = slice(starts[j], starts[j + 1])
            out_SQ[j, q] = _dot(a_ML[rows_Q[q], scale], b_BL[cols_Q[q], scale])


@_compiled
def _dot(x_l, y_l):
    total = 0.0
    for i in range(len(x_l)):
        total += np.float64(x_l[i]) * np.float64(y_l[i])
    return total
