# SPDX-License-Identifier: Apache-2.0
"""The core: whole layers through its streams, bit-identical to :func:`hw.spec.numerics.linear`."""

import cocotb

from hw.spec.config import ConfigError
from hw.spec.memory.geometry import fit_layer
from hw.spec.memory.kv_cache import value_chunk
from hw.spec.numerics.block_float import BLOCK
from sim.bench.core_driver import CoreDriver
from sim.bench.dut import config
from sim.bench.layers import DATA, job
from sim.bench.streams import bursty, cycle, randomly, rng
from sim.harness import settings

LONG = settings().get("long", False)
"""Longer random runs, for the sweeps over parameters."""


def _job(random, k, n, group_size, tokens, kind="random", reuse=None):
    """A job, or the nearest one that fits the parameters: group_size is rounded up to a multiple of the tile."""
    c = config()
    k, tokens = min(k, c.max_k), min(tokens, c.max_tokens)
    for size in (group_size, 2 * group_size, 4 * group_size, k):
        try:
            fit_layer(c, k, n, size)
        except ConfigError:
            continue
        return job(c, random, k, n, size, tokens, kind, reuse)
    raise AssertionError(f"no layer of K {k} and groups of {group_size} or more fits")


def _random_jobs(random, count):
    """Layers of all shapes. One in four uses the activations of the layer before."""
    c, jobs = config(), []
    for _ in range(count):
        k = int(random.choice([32, 64, 96, 128, 200, 320]))
        n = int(random.integers(1, 5 * c.tile, endpoint=True))
        size = int(random.choice([32, 64, 128, 4096]))
        before = jobs[-1] if jobs and random.random() < 0.25 else None
        if before is not None:
            k, size = before.layer.k, before.layer.group_size
        tokens = int(random.choice([1, 1, 2, 3, c.max_tokens, random.integers(1, c.max_tokens, endpoint=True)]))
        jobs.append(_job(random, k, n, size, tokens, "random", before))
    return jobs


def _attention_jobs(random, count):
    """Layers whose rows are in pairs, chunks of values that are not full, and others between them."""
    c, whole, jobs = config(), value_chunk(config()), []
    for index in range(count):
        tokens = int(random.integers(1, c.max_tokens, endpoint=True))
        if index % 3 == 0:
            jobs.append(_job(random, int(random.choice([64, 128])), int(random.integers(1, 3 * c.tile)), BLOCK, tokens))
            jobs[-1] = jobs[-1]._replace(paired=True)
        elif index % 3 == 1:
            groups = int(random.integers(1, whole.groups, endpoint=True))
            jobs.append(_job(random, groups * whole.group_size, c.tile, whole.group_size, tokens)._replace(whole=whole))
        elif index % 2:
            jobs += _random_jobs(random, 1)
    return jobs


@cocotb.test(skip=not config().has_attention)
@cocotb.parametrize(stalls=[False, True])
async def test_attention(dut, stalls):
    """Rows in pairs, and headers with records that the layer does not have."""
    random = rng(7)
    names = ("command", "weights", "activations", "results") if stalls else ()
    core = await CoreDriver.create(dut, **{name: randomly(0.4, rng(8, len(name))) for name in names})
    await core.check(_attention_jobs(random, 60 if LONG else 24))


@cocotb.test()
async def test_group_sizes(dut):
    """Groups of 32, 64, 128 and all of K; K that needs padding, and N that is not a multiple of the tile."""
    core, random = await CoreDriver.create(dut), rng()
    n = 3 * config().tile - 1
    await core.check([_job(random, 320, n, size, 2) for size in (32, 64, 128, 320)])
    await core.check([_job(random, 300, n, size, 1) for size in (32, 64, 300)])


@cocotb.test()
async def test_token_counts(dut):
    """Every M from 1 to ``max_tokens``, in odd order."""
    core, random = await CoreDriver.create(dut), rng()
    counts = random.permutation(range(1, config().max_tokens + 1)).tolist()
    await core.check([_job(random, 64, config().tile + 1, 32, tokens) for tokens in counts])


@cocotb.test()
async def test_extremes(dut):
    """All-minimum, all-maximum, zero rows and tokens, and sums at the bound of the accumulators with K = max_k."""
    core, random = await CoreDriver.create(dut), rng()
    n = config().tile
    await core.check([_job(random, 64, n + 1, 32, 2, kind) for kind in DATA])
    await core.check([_job(random, config().max_k, n, 128, 2, kind) for kind in ("bound", "negative_bound")])


@cocotb.test()
async def test_random_layers(dut):
    """Back-to-back commands of different shapes, without stalls."""
    core, random = await CoreDriver.create(dut), rng()
    await core.check(_random_jobs(random, 100 if LONG else 24))


@cocotb.test()
@cocotb.parametrize(run=range(6 if LONG else 3))
async def test_random_stalls(dut, run):
    """The same with stalls on every stream, light and heavy stalls mixed."""
    random = rng()
    stalls = {
        name: bursty(rng(run, index), run=20, pause=40)
        if random.random() < 0.3
        else randomly(float(random.choice([0.0, 0.2, 0.5, 0.9])), rng(run, index))
        for index, name in enumerate(("command", "weights", "activations", "results"))
    }
    core = await CoreDriver.create(dut, **stalls)
    await core.check(_random_jobs(random, 12))


@cocotb.test()
async def test_reuse(dut):
    """Several layers on the same activations, and new activations in between."""
    core, random, c = await CoreDriver.create(dut), rng(), config()
    jobs = []
    for _ in range(3):
        jobs.append(_job(random, 160, c.tile * 2, 32, 3))
        for n in (1, c.tile * 3 - 1):
            jobs.append(_job(random, 160, n, 32, 3, "random", jobs[-1]))
    await core.check(jobs)


@cocotb.test()
async def test_reset_in_between(dut):
    """A reset in the middle of a layer, at any point, leaves no trace."""
    core, random = await CoreDriver.create(dut), rng()
    for cycles in random.integers(10, 400, 6).tolist():
        core.send(_random_jobs(random, 6))
        await cycle(dut.clk, cycles)
        await core.restart()
    await core.check(_random_jobs(random, 6))
