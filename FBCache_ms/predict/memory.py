"""Bytes that a cache takes, counted from its configuration and the shapes alone."""

from ..cache.gates import LIMITS, check_shape, every_gate, numbers_width, plan, thresholds_width
from ..rules.forecasts import FORECASTS, SUMS
from ..rules.schedules import MAX_STEPS
from ..rules.when import EXPECTED, FORECAST, PROBE, SPAN

SCALAR = 4
"""Bytes of a float32 or an int32; a float32 buffer's element has as many."""


def cache_parts(config, batch_size, seq_len, inner_dim, text_len=0, branches=1, itemsize=2, channels=64, stacks=(0, 0)):
    """Bytes of a CacheContext's buffers by what they hold, {what: bytes}; their sum is its nbytes.

    For every gate, with K = order + 1 and e bytes for each element of the model's dtype:

    - "differences": K B S D e' of the residual, and K B T D e' of the text's where blocks run behind the span
      (Bn_compute_blocks > 0, and the double stack's gate); e' is 4 with derivatives_dtype="float32", else e;
    - "probe differences": K B P e', where the probe is forecast (cg_taylor) or its changes scale one (dicache);
    - "references": B P e for each probe that is compared with an earlier one, B S D e where it is the modulated input;
    - "blocks": 2 B (T + S) D e for each of the transformer's blocks, where chosen tokens are refreshed;
    - "state": 4 bytes for each number that a rule keeps beside, SPAN ones as large as what its span begins with;
    - "trace": 8 bytes a step for 1000 steps, and 4 for each of K coordinates, the sum of each rule and one scalar; and
      4 K^2 for a forecast by regression.

    D is C, the velocity's channels, where a reuse stands for the whole model. P is S ceil(D / downsample_factor), and
    (T + S) ceil(D / downsample_factor) under a gate of the single stack. Gates within each other share three tallies,
    in "trace" like the step and its timestep. All of that is there for each guidance branch. "numbers" is there once: 4
    bytes for each of every gate's three limits and its rules' thresholds at 1000 steps, 1000 coordinates, as many
    numbers for each gate as the one with most has (gates.gate_numbers), the branch, and T + S numbers for each block
    that is refreshed.

    Args:
        config: the CacheConfig.
        batch_size: B, latents per call.
        seq_len: S, image tokens: height / 16 * width / 16 for Flux.
        inner_dim: D, the transformer's width: 3072 for Flux.
        text_len: T, text tokens; only where the text is cached too.
        branches: 1, or 2 for true CFG.
        itemsize: e, bytes: 2 for bfloat16 and float16, 4 for float32.
        channels: C, 64 for Flux.
        stacks: how many double and how many single blocks; only where chosen tokens are refreshed.

    Raises ValueError for shapes that CacheContext refuses.
    """
    check_shape(config, batch_size, seq_len, inner_dim, text_len, branches, channels, stacks)
    outer = plan(config)
    gates = every_gate(outer)
    orders = config.taylorseer_derivative + 1
    kept = 4 if config.derivatives_dtype == "float32" else itemsize
    streams = probes = references = state = scalars = 0
    for gate in gates:
        span = batch_size * seq_len * (channels if gate.whole_model else inner_dim)
        compared = batch_size * (seq_len + text_len * gate.probes_text) * -(-inner_dim // config.downsample_factor)
        streams += span + batch_size * text_len * gate.needs_text * inner_dim
        if gate.forecasts_probe or FORECASTS[config.forecast].takes_ratio:
            probes += compared
        for rule in gate.rules:
            if rule.reference not in (FORECAST, EXPECTED):
                references += compared if rule.looks_at == PROBE else span
            state += sum(span if kind == SPAN else 1 for kind in rule.state.values())
        scalars += 2 * MAX_STEPS + orders + len(gate.rules) + 1
        scalars += orders**2 * (FORECASTS[config.forecast].keeps == SUMS)
    scalars += LIMITS * len(outer) + 2
    rows = max(len(gates), 1)
    refreshed = sum(stacks) * (text_len + seq_len) * config.refreshes
    return {
        "differences": branches * orders * streams * kept,
        "probe differences": branches * orders * probes * kept,
        "references": branches * references * itemsize,
        "blocks": branches * 2 * batch_size * refreshed * inner_dim * itemsize,
        "state": branches * state * SCALAR,
        "trace": branches * scalars * SCALAR,
        "numbers": (
            ((LIMITS + thresholds_width(config)) * rows + 1) * MAX_STEPS + rows * numbers_width(config) + 1 + refreshed
        )
        * SCALAR,
    }


def cache_bytes(*arguments, **named):
    """Bytes that a CacheContext of this shape and this CacheConfig takes; arguments and errors as in cache_parts."""
    return sum(cache_parts(*arguments, **named).values())
