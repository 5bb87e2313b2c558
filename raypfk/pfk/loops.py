"""The inner loops of exact scoring on a CPU, compiled by Numba: one pass where torch would make ten.

Beside int8 matrix products, every further pass over their results costs as much as a tenth of them.
Each function here does what a few lines of torch say elsewhere, named in its docstring; the tests hold them together.
Loops run over contiguous slices, and sums may be reordered: both let the compiler use vector instructions. Numba takes
sums and products of small integers for int64, of which few fit a vector: they are cast back.

Shapes: N descriptors, each a row of P codes in G groups, made of T vectors (scan.Layout); M centers, B pool images, Q
pairs, S scales; m and b as many of them as a tile holds.
"""

import numpy as np
from numba import njit

MAX_LENGTH = 1.001  # of a standardised scale, also where it was stored as float16
FAST = {"reassoc", "contract", "arcp", "nsz"}  # sums in any order; NaN and infinity stay what they are
HALF, OFFSET = np.float32(128.5), np.int32(128)
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
    for n in range(len(codes_NP)):
        most = np.float32(0)
        for t in range(len(places_T4)):
            which, start, stop, _ = places_T4[t]
            x_l = g_NL[n, start:stop] if which else z_NL[n, start:stop]
            bits_l = bits[1][n, start:stop] if which else bits[0][n, start:stop]
            lengths_TN[t, n], largest[0] = np.sqrt(_square(x_l)), _largest(bits_l)
            most = max(most, largest.view(np.float32)[0] * factors_T[t])
        step = max(most / LARGEST, least)
        steps_N[n] = step
        for t in range(len(places_T4)):
            which, start, stop, column = places_T4[t]
            x_l = g_NL[n, start:stop] if which else z_NL[n, start:stop]
            codes_l = codes_NP[n, column : column + stop - start]
            errors_TN[t, n] = np.sqrt(_round_row(x_l, factors_T[t], codes_l, step))


@_compiled
def _largest(bits_l):
    # Without their sign, floats are in the order of their bits; and integers vectorise, where a NaN could be a float.
    largest = np.int32(0)
    for i in range(len(bits_l)):
        largest = max(largest, np.int32(bits_l[i] & SIGN_OFF))
    return largest


@_compiled
def _round_row(x_l, factor, codes_l, step):
    inverse, square = factor / step, np.float32(0)
    for i in range(len(x_l)):
        code = np.int32(np.int32(x_l[i] * inverse + HALF) - OFFSET)
        codes_l[i] = code
        rest = x_l[i] * factor - np.float32(code) * step
        square += rest * rest
    return square


@_compiled
def survivors(products_bm, images, bounds, row, col, pairs_2C, found):
    """Appends the pairs of a tile that are not out (scan.Bounds), as `scan._hits` has it; returns their number.

    products_bm: int32 or float32, of which `images` rows count; row, col: the tile's first center and image; pairs_2C:
    int32, `found` of them taken. Returns `FULL` when they do not fit.
    """
    of_tile, memory = _of_tile(bounds, row, products_bm.shape[1]), _memory(products_bm.shape[1])
    above_m, hits_m = memory[0], memory[3]
    for b in range(images):
        for i in range(len(above_m)):
            above_m[i] = np.float32(products_bm[b, i])
        for h in range(_hits(of_tile, col + b, False, memory)):
            found = _append(pairs_2C, found, row + hits_m[h], col + b)
            if found == FULL:
                return FULL
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
    of_tile, memory = _of_tile(bounds, row, products_Gbm.shape[2]), _memory(products_Gbm.shape[2])
    above_m, hits_m, given_G = memory[0], memory[3], np.empty(len(products_Gbm), np.int32)
    for b in range(images):
        n = col + b
        if given == BOTH:
            _sum_of_squares(products_Gbm, b, above_m)
        else:
            _sum_of_sizes(products_Gbm, roots_G, b, above_m)
        hits = _hits(of_tile, n, given == BOTH, memory)
        most -= hits
        if most < 0:
            return TOO_MANY
        for h in range(hits):
            m = row + hits_m[h]
            for j in range(len(given_G)):
                given_G[j] = products_Gbm[j, b, hits_m[h]]
            if not len(columns_G2) or _reaches(given_G, given, parts, columns_G2, codes_MP, codes_BP, m, n):
                found = _append(pairs_2C, found, m, n)
                if found == FULL:
                    return FULL
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
    first_m, first = products_Gbm[0, b], roots_G[0]
    for i in range(len(out_m)):
        out_m[i] = first * abs(np.float32(first_m[i]))
    for j in range(1, len(products_Gbm)):
        r_m, root = products_Gbm[j, b], roots_G[j]
        for i in range(len(out_m)):
            out_m[i] += root * abs(np.float32(r_m[i]))


@_compiled
def _of_tile(bounds, row, m):
    # Slices count references, which costs as much as a hundred sums: they are made once a tile.
    return bounds[0][row : row + m], bounds[1][row : row + m], bounds[2], bounds[3]


@_compiled
def _memory(m):
    # Of a row's sums, of a mark in a byte for each, also as words of eight, and of where the marks are.
    words_w = np.zeros((m + 7) // 8, np.uint64)
    return np.empty(m, np.float32), words_w, words_w.view(np.uint8), np.empty(m, np.int32)


@_compiled
def _hits(bounds, n, squared, memory):
    # Writes which are not below alpha_m unit_n - beta_m shift_n (or its square with its sign); returns their number.
    alpha_m, beta_m, unit_B, shift_B = bounds
    above_m, words_w, marks_m, hits_m = memory
    unit, shift, count, found = unit_B[n], shift_B[n], np.int32(0), 0
    for i in range(len(above_m)):
        edge = alpha_m[i] * unit - beta_m[i] * shift
        above_m[i] -= edge * abs(edge) if squared else edge
        count = np.int32(count + np.int32(not (above_m[i] < 0)))
    if not count:  # as in most rows
        return count
    for i in range(len(above_m)):
        marks_m[i] = not (above_m[i] < 0)
    for w in range(len(words_w)):
        if words_w[w]:
            for i in range(8 * w, min(8 * w + 8, len(above_m))):
                if marks_m[i]:
                    hits_m[found] = i
                    found += 1
    return count


@_compiled
def _code_product(x_l, y_l):
    total = np.int32(0)
    for i in range(len(x_l)):
        total = np.int32(total + np.int32(np.int16(np.int16(x_l[i]) * np.int16(y_l[i]))))
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
