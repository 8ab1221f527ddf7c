import pytest

from FBCache_ms import CacheConfig
from FBCache_ms.cache.gates import plan
from FBCache_ms.cache.stats import CacheStats, GateStats, skipped_share
from FBCache_ms.predict.flops import step_costs
from FBCache_ms.rules.schedules import COMPUTE, REFRESH, step_actions
from FBCache_ms.runtime.checkpoint import FLUX_DEV

COSTS = step_costs(FLUX_DEV, 1, 4096, 512)


def tera(tag, computed, steps):
    """TFLOPs of a generation of so many computed steps under a tag of one gate."""
    (gate,) = plan(CacheConfig.from_tag(tag))
    skipped = COSTS.of_blocks(*gate.span(19, 38))
    return (steps * COSTS.total - (steps - computed) * skipped) / 1e12


@pytest.mark.parametrize(
    "tag, computed, published",
    [
        ("F1B0_W0_R0", 50, 3726.87),
        ("F1B0_W8I2MC8_R0.8", 8, 651.90),
        ("F1B0_W8I2MC10_R0.8", 7, 578.69),
        ("F1B0_W8I4MC10_R0.8", 6, 505.47),
    ],
)
def test_operations_are_those_of_cache_dits_table(tag, computed, published):
    """FLUX.1-dev at 1024 x 1024, 512 text tokens, 50 steps."""
    assert tera(tag, computed, 50) == pytest.approx(published, rel=0.005)


def test_a_refresh_takes_the_chosen_tokens_mlps_and_every_modulation():
    """By hand: 16 D^2 a chosen token in a double block, 18 in a single one; 24 D^2 and 6 D^2 of modulations."""
    doubles = sum(int(0.04 * (1.5 - layer / 27) * tokens) for layer in range(19) for tokens in (4096, 512))
    singles = sum(int(0.16 * (1.5 - layer / 27) * 4608) for layer in range(38))
    assert COSTS.refresh == 3072**2 * (16 * doubles + 18 * singles + 24 * 19 + 6 * 38)
    assert (COSTS.rest + COSTS.refresh) / 1e12 == pytest.approx(4.5113, abs=1e-4)


@pytest.mark.parametrize(
    "tag, ratio", [("F24B24", 1.04), ("F16B16", 1.12), ("F12B12", 1.17), ("F8B8", 1.22), ("F1B0", 1.33)]
)
def test_one_reuse_in_four_steps_saves_this_much(tag, ratio):
    """cache-dit's tags for distilled models, W2 MC1: of four steps the third alone is reused."""
    full = f"{tag}_W2MC1_R0.8"
    assert tera("F1B0_W0_R0", 4, 4) / tera(full, 3, 4) == pytest.approx(ratio, abs=0.01)


def test_the_skipped_share_counts_each_gates_blocks_once():
    """Half of the steps without the doubles 1 to 18, a quarter without the singles 1 to 37."""
    spans = plan(CacheConfig(span="stacks"))
    stats = [
        GateStats("double", (False, True, True, False), (None,) * 4),
        GateStats("single", (False, True, False, False), (None,) * 4),
    ]
    expected = (2 * 18 * COSTS.double + 37 * COSTS.single) / (4 * COSTS.total)
    assert skipped_share(spans, [stats], [COSTS]) == pytest.approx(expected)
    nothing = [GateStats(gate.name, (False,) * 4, (None,) * 4) for gate in stats]
    assert skipped_share(spans, [stats, nothing], [COSTS, COSTS]) == pytest.approx(expected / 2)
    assert CacheStats(tuple(stats)).cached_steps == [1, 2]


@pytest.mark.parametrize(
    "schedule, interval, published",
    [("duca", 5, 978.76), ("duca", 7, 760.14), ("duca", 10, 606.91), ("toca", 8, 784.54), ("toca", 12, 644.70)],
)
def test_refreshes_skip_as_much_as_published(schedule, interval, published):
    """FLUX.1-dev at 1024 x 1024 and 50 steps, from the trace that such a schedule leaves."""
    config = CacheConfig(gate="refresh", schedule=schedule, schedule_interval=interval)
    actions = step_actions(config, 50, ())
    reused, refreshed = tuple((actions != COMPUTE).tolist()), tuple((actions == REFRESH).nonzero()[0].tolist())
    stats = GateStats("refresh", reused, (None,) * 50, refreshed)
    skipped = skipped_share(plan(config), [(stats,)], [COSTS])
    assert (1 - skipped) * 50 * COSTS.total / 1e12 == pytest.approx(published, rel=0.005)
    assert f"{reused.count(True)} ({len(refreshed)} refreshed)" in str(CacheStats((stats,), skipped))
