"""Metasmoothness, seed agreement and one-step gain: the formulas, on plain arrays.

Let `A(z)` be the parameters after training on `z`, `f(z) = φ(A(z))` the loss on held-out data, and
`v` a direction in which training pixels move. A metagradient is the exact derivative of `f`, but a
derivative is of use only as far as `f` stays near its tangent. Three points of a line say how far:

    Definition 1    S  = |f(z + 2hv) - 2 f(z + hv) + f(z)| / h²
    Definition 2    Ŝ  = Σᵢ wᵢ · sign(θ_h - θ_0)ᵢ · sign(θ_2h - θ_h)ᵢ,
                    w  = |θ_2h - θ_0| / ‖θ_2h - θ_0‖₁

where `θ_t = A(z + tv)`. The first is the change of the finite-difference derivative over a step `h`,
per `h`: the curvature of the loss along the line, lower is smoother. The second asks of every
parameter whether the second half of the line moves it the same way as the first, weighted by how
far it went: 1 where training answers monotonically, about 0 where the answer is noise, -1 where
every parameter turns back. It needs no gradient and no scale, so it compares recipes whose losses
are of different size.

Smoothness is about one seed. An attack needs more: that the gradients `g_s` of victims with
different randomness point the same way,

    agreement    cos(g_s, g_o),    s ≠ o,

and that a sign step `z' = clip(z + η sign(g_s))` raises the loss of victims it was not made for:

    predicted    g_s · (z' - z)
    realised     f_o(z') - f_o(z),    o = s: same seed,    o ≠ s: other seeds.

When not to trust them: Definition 2 can be near 1 for a routine whose metagradient is not finite,
Definition 1 of two recipes compares only losses of the same scale, and both hold for the `h` that
they were measured at and no other.

Reference:
    Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
    https://arxiv.org/abs/2503.13751 (both definitions; the agreement and the gains are ours).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def line(
    z: Float[np.ndarray, "*shape"], v: Float[np.ndarray, "*shape"], h: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three points `z`, `z + hv`, `z + 2hv` that both definitions look at."""
    return z, (z + h * v).astype(z.dtype), (z + 2 * h * v).astype(z.dtype)


def definition1(
    at_0: Float[np.ndarray, "*any"], at_h: Float[np.ndarray, "*any"], at_2h: Float[np.ndarray, "*any"],
    h: float,
) -> Float[np.ndarray, "*any"]:  # fmt: skip
    """`|f(z + 2hv) - 2 f(z + hv) + f(z)| / h²` of values of `f`, entry by entry."""
    if not h > 0:
        raise ValueError(f"h must be above 0, not {h}")
    first, second = (at_h - at_0) / h, (at_2h - at_h) / h
    return np.asarray(np.abs(second - first) / h)


def definition2(
    theta_0: Float[np.ndarray, " p"], theta_h: Float[np.ndarray, " p"], theta_2h: Float[np.ndarray, " p"]
) -> float:
    """`Ŝ` of the parameters after three trainings; NaN where the ends of the line agree exactly."""
    moved = np.abs(theta_2h - theta_0).astype(np.float64)
    total = moved.sum()
    if not total > 0:  # nothing moved, or something is NaN: there is no direction to agree with
        return float("nan")
    same_way = np.sign(theta_h - theta_0) * np.sign(theta_2h - theta_h)
    return float((moved / total) @ same_way)


def cosines(gradients: Float[np.ndarray, "seeds p"]) -> Float[np.ndarray, "seeds seeds"]:
    """Cosine of every pair of rows; NaN where a row is zero or not finite."""
    rows = gradients.astype(np.float64)
    # By the largest entry first, since squares of exploding gradients overflow.
    largest = np.abs(rows).max(1, keepdims=True)
    usable = (largest > 0) & np.isfinite(largest)
    scaled = np.where(usable, rows / np.where(usable, largest, 1), np.nan)
    unit = scaled / np.sqrt((scaled**2).sum(1, keepdims=True))
    return np.asarray(unit @ unit.T)


def sign_step(
    z: Float[np.ndarray, "*shape"],
    gradient: Float[np.ndarray, "*shape"],
    size: float,
    low: Float[np.ndarray, "*shape"],
    high: Float[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]:
    """`clip(z + size · sign(gradient))` to the allowed pixels."""
    return np.clip(z + size * np.sign(gradient), low, high).astype(z.dtype)


def predicted_gain(
    gradient: Float[np.ndarray, "*shape"],
    before: Float[np.ndarray, "*shape"],
    after: Float[np.ndarray, "*shape"],
) -> float:
    """What the gradient promises for the move, after clipping: `g · (after - before)`."""
    return float((gradient.astype(np.float64) * (after - before)).sum())


def inward(
    positive: Bool[np.ndarray, "*shape"], z: Float[np.ndarray, "*shape"], reach: float
) -> Float[np.ndarray, "*shape"]:
    """Random signs made a direction along which pixels stay in [0, 1] up to `reach`.

    A sign that would lead out is turned round. For a `reach` of at most one half one of the two
    always leads in, so no point of the line needs clipping, which would put a kink into it.

    Args:
        positive: fair coins.
        z: pixels in [0, 1].
        reach: how far along the direction one will go.
    """
    if not 0 < reach <= 0.5:
        raise ValueError(f"reach must lie in (0, 0.5], not {reach}")
    up = np.where(positive, z + reach <= 1, z - reach < 0)
    return np.where(up, 1, -1).astype(z.dtype)
