"""The inner loops of exact scoring on a CPU, compiled by Numba: one pass where torch would make ten.

Beside int8 matrix products, every further pass over their results costs as much as a tenth of them.
Each function here does what a few lines of torch say elsewhere, named in its docstring; the tests hold them together.
Loops run over contiguous slices, and sums may be reordered: both let the compiler use vector instructions.

Shapes: N descriptors, each a row of P codes in G groups, made of T vectors (scan.Layout); M centers, B pool images, Q
pairs, S scales; m and b as many of them as a tile holds.
"""

import numpy as np
from numba import njit

MAX_LENGTH = 1.001  # of a standardised scale, also where it was stored as float16
FAST = {"reassoc", "contract", "arcp", "nsz"}  # sums in any order; NaN and infinity stay what they are
ONE, HALF, OFFSET = np.float32(1), np.float32(128.5), np.int32(128)
FULL, TOO_MANY = -1, -2
BOTH = 2
LARGEST, SIGN_OFF = np.float32(127), np.int32(0x7FFFFFFF)


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
def round_to_int8(z_NL, g_NL, places_T4, factors_T, least, codes_NP, steps_N, errors_TN, lengths_TN):
    """Codes, step and errors of each descriptor, as `scan._round_rows`, and the lengths of its vectors.

    places_T4: of each vector whether it is of g, where it starts and stops, and its column among the codes.
    """
    bits, largest = (z_NL.view(np.int32), g_NL.view(np.int32)), np.empty(1, np.int32)
    row_P = np.empty(codes_NP.shape[1], np.float32)
    for n in range(len(codes_NP)):
        most = np.float32(0)
        for t in range(len(places_T4)):
            which, start, stop, column = places_T4[t]
            x_l = g_NL[n, start:stop] if which else z_NL[n, start:stop]
            bits_l = bits[1][n, start:stop] if which else bits[0][n, start:stop]
            lengths_TN[t, n], largest[0] = np.sqrt(_square(x_l)), _largest(bits_l)
            most = max(most, largest.view(np.float32)[0] * factors_T[t])
            _scaled(x_l, factors_T[t], row_P[column : column + stop - start])
        step = max(most / LARGEST, least)
        steps_N[n] = step
        for t in range(len(places_T4)):
            columns = slice(places_T4[t, 3], places_T4[t, 3] + places_T4[t, 2] - places_T4[t, 1])
            errors_TN[t, n] = np.sqrt(_round_row(row_P[columns], codes_NP[n, columns], step))


@_compiled
def _scaled(x_l, factor, out_l):
    for i in range(len(x_l)):
        out_l[i] = x_l[i] * factor


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
def survivors(products_bm, images, bounds, row, col, pairs_2C, found):
    """Appends the pairs of a tile that are not out (scan.Bounds), as `scan._hits` has it; returns their number.

    products_bm: int32 or float32, of which `images` rows count; row, col: the tile's first center and image; pairs_2C:
    int32, `found` of them taken. Returns `FULL` when they do not fit.
    """
    above_m = np.empty(products_bm.shape[1], np.float32)
    for b in range(images):
        for i in range(len(above_m)):
            above_m[i] = np.float32(products_bm[b, i])
        i = _next(above_m, _less_edge(above_m, bounds, row, col + b, False), 0)
        while i < len(above_m):
            found = _append(pairs_2C, found, row + i, col + b)
            if found == FULL:
                return FULL
            i = _next(above_m, 1, i + 1)
    return found


@_compiled
def survivors_of_squares(
    products_Gbm, images, given, roots_G, bounds, parts, columns_G2, codes_MP, codes_BP, row, col, pairs_2C, found, most
):
    """As `survivors` for `pfk`: of each scale the product of z (`given` 0), of g (1) or of `BOTH` together is given.

    Pairs that are not out by that are looked at again, as `scan.Parts` says: the product that is not given, or that of
    z, is computed from the codes in columns_G2. Returns `TOO_MANY` where these are more than `most`. Where columns_G2
    is empty, as of codes that are not int8, they are not looked at again.
    """
    above_m = np.empty(products_Gbm.shape[2], np.float32)
    for b in range(images):
        n = col + b
        if given == BOTH:
            _sum_of_squares(products_Gbm, b, above_m)
        else:
            _sum_of_sizes(products_Gbm, roots_G, b, above_m)
        i = _next(above_m, _less_edge(above_m, bounds, row, n, given == BOTH), 0)
        while i < len(above_m):
            most -= 1
            if most < 0:
                return TOO_MANY
            given_G = products_Gbm[:, b, i]
            if not len(columns_G2) or _reaches(given_G, given, parts, columns_G2, codes_MP, codes_BP, row + i, n):
                found = _append(pairs_2C, found, row + i, n)
                if found == FULL:
                    return FULL
            i = _next(above_m, 1, i + 1)
    return found


@_compiled
def _reaches(given_G, given, parts, columns_G2, codes_MP, codes_BP, m, n):
    lengths_T, reached_T, errors_TM, errors_TB, steps_M, steps_B, factor_B, limit_M = parts
    unit, high = steps_M[m] * steps_B[n], np.float32(0)
    for j in range(len(given_G)):
        columns = slice(columns_G2[j, 0], columns_G2[j, 1])
        one = _code_product(codes_MP[m, columns], codes_BP[n, columns])
        other = given_G[j] - one if given == BOTH else given_G[j]
        r, s, t = np.float32(one) * unit, np.float32(other) * unit, 2 * j + (1 if given == 0 else 0)
        u = 4 * j + 1 - t  # `one` is vector t, `other` vector u
        a = errors_TM[t, m] * lengths_T[t] + errors_TB[t, n] * reached_T[t]
        b = errors_TM[u, m] * lengths_T[u] + errors_TB[u, n] * reached_T[u]
        high += r * s + abs(s) * a + (abs(r) + a) * b
    return not (high * factor_B[n] < limit_M[m])


@_compiled
def _append(pairs_2C, found, m, n):
    if found == pairs_2C.shape[1]:
        return FULL
    pairs_2C[0, found], pairs_2C[1, found] = m, n
    return found + 1


@_compiled
def _sum_of_squares(products_Gbm, b, out_m):
    first_m = products_Gbm[0, b]
    for i in range(len(out_m)):
        r = np.float32(first_m[i])
        out_m[i] = r * r
    for j in range(1, len(products_Gbm)):
        r_m = products_Gbm[j, b]
        for i in range(len(out_m)):
            r = np.float32(r_m[i])
            out_m[i] += r * r


@_compiled
def _sum_of_sizes(products_Gbm, roots_G, b, out_m):
    out_m[:] = 0
    for j in range(len(roots_G)):
        r_m, root = products_Gbm[j, b], roots_G[j]
        for i in range(len(out_m)):
            out_m[i] += root * abs(np.float32(r_m[i]))


@_compiled
def _less_edge(above_m, bounds, row, n, squared):
    # Subtracts alpha_m unit_n - beta_m shift_n, or its square with its sign; the number that are not below 0 then.
    alpha_m, beta_m = bounds[0][row : row + len(above_m)], bounds[1][row : row + len(above_m)]
    unit, shift, count = bounds[2][n], bounds[3][n], np.int32(0)
    for i in range(len(above_m)):
        edge = alpha_m[i] * unit - beta_m[i] * shift
        above_m[i] -= edge * abs(edge) if squared else edge
        count += np.int32(not (above_m[i] < 0))
    return count


@_compiled
def _next(above_m, count, i):
    # The first, from i on, that is not below 0, or m. Passes with vector instructions beat one without.
    if not count:
        return len(above_m)
    above_k = above_m[i:]
    first = np.int32(len(above_k))
    for k in range(len(above_k)):
        first = min(first, np.int32(k) if not (above_k[k] < 0) else np.int32(len(above_k)))
    return i + first


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
