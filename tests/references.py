"""The rules once more, in plain NumPy and straight from their descriptions: from probes to what is reused.

Each returns one bool a step, true where the step is reused. ``margin`` collects how near a comparison came to its
threshold, so that a test can leave out what rounding decides.
"""

import math

import numpy as np
from numpy.polynomial.hermite import hermval

FLUX_POLYNOMIAL = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def d(old, new, reduction="mean"):
    """mean|old - new| / mean|old|; with "max" the worst sample's."""
    with np.errstate(all="ignore"):
        old, new = old.astype(np.float64), new.astype(np.float64)
        if reduction == "max":
            return np.max([d(a, b) for a, b in zip(old, new)])
        return np.abs(old - new).mean() / np.abs(old).mean()


def below(value, threshold, margin):
    with np.errstate(invalid="ignore"):
        margin.append(abs(value - threshold) / max(threshold, 1e-9))
    return value < threshold


def dbcache(
    probes, threshold, margin, warmup=0, interval=1, mask=None, static=False, M=-1, MC=-1, limit=0, reduction="mean"
):
    """cache-dit's DBCache; with W alone ParaAttention's First-Block Cache."""
    reused, stored, total = [], None, 0.0
    for step, probe in enumerate(probes):
        row = len(reused) - max((i for i, hit in enumerate(reused) if not hit), default=-1) - 1
        if stored is None or step in range(0, warmup, interval) or (mask is not None and mask[step] == 1):
            hit = False
        elif mask is not None and static:
            hit = True
        elif 0 <= M <= sum(reused) or 0 <= MC <= row or 0 < limit <= total or threshold <= 0:
            hit = False
        else:
            if limit > 0:
                margin.append(abs(total - limit))
            difference = d(stored, probe, reduction)
            total += difference if np.isfinite(difference) else 0
            hit = bool(below(difference, np.inf if threshold >= 1 else threshold, margin))
        if not hit:
            stored = probe
        reused.append(hit)
    return reused


def flux_shift(mu, t):
    """Flux's shift of a noise level t in (0, 1] for larger pictures."""
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1) if t > 0 else 0.0


def comfyui(probes, sigmas, mu, threshold, margin, start, end, max_consecutive):
    """Apply First Block Cache: reuse only where sigma(end) <= sigma <= sigma(start), and at most so many in a row.

    sigma(p) is the shifted noise level once the share p of the sampling is done.
    """
    low, high = flux_shift(mu, 1 - end), flux_shift(mu, 1 - start)
    mask = [0 if low <= sigma <= high else 1 for sigma in sigmas]
    margin += [abs(sigma - bound) * 1e3 for sigma in sigmas for bound in (low, high)]
    return dbcache(probes, threshold, margin, mask=mask, MC=max_consecutive)


def magcache(ratios, steps, threshold, most, retention):
    """Skips while the errors |1 - product of the ratios since the last computed step| sum up to no more."""
    computed = []
    for step in range(steps):
        run = ratios[computed[-1] + 1 : step + 1] if computed else []
        errors = np.abs(1 - np.cumprod(run))
        late = step >= int(retention * steps + 0.5)
        near = round(step * 27 / (steps - 1)) == 11
        if not (late and computed and errors.sum() <= threshold and len(run) <= most and not near):
            computed.append(step)
    return computed


def teacache(modulated, threshold, margin, polynomial=FLUX_POLYNOMIAL):
    reused, total = [], 0.0
    for step, m in enumerate(modulated):
        if step in (0, len(modulated) - 1):
            hit = False
        else:
            total += np.polyval(polynomial, d(modulated[step - 1], m))
            hit = bool(below(total, threshold, margin))
        if not hit:
            total = 0.0
        reused.append(hit)
    return reused


def speca(inputs, outputs, last, order, threshold, decay, floor, most, at_the_next, margin):
    """SpeCa: ``inputs`` and ``outputs`` of the last block where all blocks run, and ``last`` what it adds."""
    reused, computed, steps, failed = [], [], len(inputs), False
    for step in range(steps):
        row = len(reused) - max((i for i, hit in enumerate(reused) if not hit), default=-1) - 1
        hit, fails = False, False
        if computed and row < most:
            expected_input, expected = (taylor([(s, x[k]) for s, x in computed], step, order) for k in (0, 1))
            verified = expected_input + last[step]
            error = (np.abs(expected - verified) / (np.abs(verified) + 1e-10)).mean()
            fails = row >= 2 and not below(error, max(floor, threshold * decay ** (step / steps)), margin)
            hit = not (failed if at_the_next else fails)
        failed = hit and fails
        if not hit:
            computed.append((step, (inputs[step], outputs[step])))
        reused.append(bool(hit))
    return reused


def cg_taylor(probes, threshold, order, margin):
    reused, computed = [], []
    for step, probe in enumerate(probes):
        expected = taylor(computed, step, order) if computed else None
        hit = expected is not None and bool(below(d(expected, probe), threshold, margin))
        if not hit:
            computed.append((step, probe))
        reused.append(hit)
    return reused


def dicache(probes, threshold, margin, warmup=0):
    reused, total = [], 0.0
    for step, probe in enumerate(probes):
        hit = False
        if step >= max(warmup, 1):
            total += d(probes[step - 1], probe)
            hit = bool(below(total, threshold, margin))
        if not hit:
            total = 0.0
        reused.append(hit)
    return reused


def easycache(latents, velocities, threshold, margin, warmup=0):
    """EasyCache: what is reused, and the velocity of every step, from those that the whole model gives."""
    reused, computed, total, drawn = [], [], 0.0, []
    for step, x in enumerate(latents):
        hit = False
        if len(computed) > 1 and warmup <= step < len(latents) - 1:
            (older, v_older), (newest, v_newest) = computed[-2:]
            with np.errstate(all="ignore"):
                slope = np.abs(v_newest - v_older).mean() / np.abs(newest - older).mean()
                total += slope * np.abs(x - latents[step - 1]).mean() / np.abs(v_newest).mean()
            hit = bool(below(total, threshold, margin))
        if not hit:
            computed, total = [*computed, (x, velocities[step])], 0.0
        reused.append(hit)
        last, v_last = computed[-1]
        drawn.append(x + (v_last - last))
    return reused, drawn


def both(probes, modulated, threshold, tea_threshold, margin):
    """Reuse where First-Block Cache and TeaCache agree."""
    reused, stored, total = [], None, 0.0
    for step, (probe, m) in enumerate(zip(probes, modulated)):
        hit = False
        if step not in (0, len(probes) - 1):
            total += np.polyval(FLUX_POLYNOMIAL, d(modulated[step - 1], m))
            agree = below(total, tea_threshold, margin), below(d(stored, probe), threshold, margin)
            hit = bool(all(agree))
        if not hit:
            stored, total = probe, 0.0
        reused.append(hit)
    return reused


def either(probes, modulated, threshold, tea_threshold, margin):
    """Reuse where TeaCache does, and else where First-Block Cache does; TeaCache's sum begins anew in either case."""
    tea, fb, stored, total = [], [], None, 0.0
    for step, (probe, m) in enumerate(zip(probes, modulated)):
        first = second = False
        if step > 0:
            total += np.polyval(FLUX_POLYNOMIAL, d(modulated[step - 1], m))
            first = step < len(probes) - 1 and bool(below(total, tea_threshold, margin))
            second = not first and bool(below(d(stored, probe), threshold, margin))
        if not first:
            total = 0.0
            stored = stored if second else probe
        tea.append(first)
        fb.append(None if first else second)
    return tea, fb


def differences(computed, order):
    """TaylorSeer's, where every order divides by the newest gap. ``computed`` is a list of (x, value)."""
    newest = []
    for index, (node, value) in enumerate(computed):
        new = [value.astype(np.float64)]
        for old in newest[:order]:
            new.append((new[-1] - old) / (node - computed[index - 1][0]))
        newest = new
    return newest


def taylor(computed, x, order):
    """TaylorSeer: k^i / i! times the differences."""
    k = x - computed[-1][0]
    return sum(k**i / math.factorial(i) * value for i, value in enumerate(differences(computed, order)))


def hicache(computed, x, order, sigma):
    """TaylorSeer's differences, weighted with s^i H_i(s k) / i!."""
    k = x - computed[-1][0]
    weights = [sigma**i * hermval(sigma * k, [0] * i + [1]) / math.factorial(i) for i in range(order + 1)]
    return sum(weight * value for weight, value in zip(weights, differences(computed, order)))


def table(computed, order, row):
    """TaylorSeer's differences, weighted with a row of numbers."""
    return sum(weight * value for weight, value in zip(row, differences(computed, order)))


def spectrum(computed, step, steps, order, penalty):
    """The sum of Chebyshev polynomials nearest to the computed values, with a penalty on its coefficients."""
    x = np.array([node for node, _ in computed]) * 2 / steps - 1
    values = np.array([value.astype(np.float64).ravel() for _, value in computed])
    # The penalty as further equations.
    points = np.concatenate([np.cos(np.arccos(x)[:, None] * np.arange(order + 1)), penalty**0.5 * np.eye(order + 1)])
    values = np.concatenate([values, np.zeros((order + 1, values.shape[1]))])
    coefficients = np.linalg.lstsq(points, values, rcond=None)[0]
    here = np.cos(np.arccos(step * 2 / steps - 1) * np.arange(order + 1))
    return (here @ coefficients).reshape(computed[0][1].shape)


def meancache(velocities, mask, sigmas, spans):
    """Each step's velocity: where it is reused the last one, less JVP_K times the stride; K is that of its run."""
    latents, used, run = [0 * velocities[0].astype(np.float64)], [], -1
    for step, computed in enumerate(mask):
        run += not computed and mask[step - 1]
        if computed:
            used.append(velocities[step])
        else:
            before = max(step - spans[min(run, len(spans) - 1)], 0)
            way = sigmas[step] - sigmas[before]
            jvp = (used[before] - (latents[step] - latents[before]) / way) / way
            used.append(used[-1] - jvp * (sigmas[step + 1] - sigmas[step]))
        latents.append(latents[-1] + (sigmas[step + 1] - sigmas[step]) * used[-1])
    return np.array(used)


def newton(computed, x, order):
    """The polynomial through the last order + 1 computed values, in Lagrange's form."""
    points = computed[-order - 1 :]
    total = 0
    for node, value in points:
        others = [other for other, _ in points if other != node]
        total = total + value.astype(np.float64) * np.prod([(x - other) / (node - other) for other in others])
    return total


def dicache_alignment(computed, probes, probe):
    """The older residual plus g times the newest change; ``computed`` and ``probes`` are of the same steps."""
    if len(computed) < 2:
        return computed[-1][1]
    (_, older), (_, newer) = computed[-2:]
    p2, p1 = probes[-2:]
    g = np.clip(np.abs(probe - p2).mean() / np.abs(p1 - p2).mean(), 1, 1.5)
    return older + g * (newer - older)
