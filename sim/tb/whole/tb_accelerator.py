# SPDX-License-Identifier: Apache-2.0
"""The accelerator runs layers from descriptors, from float32 in memory to float32 in memory, bit for bit."""

from dataclasses import replace

import cocotb
import numpy as np

from hw.spec.control.descriptor import ADDRESS_LIMIT
from hw.spec.control.registers import (
    BY_NAME,
    COMPLETIONS,
    IDENTIFICATION,
    QUEUE_DEPTH,
    REGISTERS,
    VERSION,
    Access,
    config_digest,
    offset,
    registers_of,
)
from hw.spec.memory.geometry import StreamLayout
from hw.spec.ops import Wait
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, fit, pauses
from sim.bench.dut import config, latency
from sim.bench.layers import DATA
from sim.bench.streams import cycle, randomly, read, rng
from sim.harness import settings

LONG = settings().get("long", False)
"""Longer random runs, for the sweeps over parameters."""
SLVERR, DECERR = 2, 3


def _random_works(driver, random, count, max_k=200):
    """Layers of all shapes. One in four uses the activations of the layer before, one in four reads the results of an
    earlier layer of the queue if there is one, some wait without a reason, and some raise interrupts."""
    c, works, sources = config(), [], []
    for _ in range(count):
        options = dict(interrupt=random.random() < 0.3, wait=Wait(random.choice(list(Wait), p=[0.7, 0.2, 0.1])))
        n = int(random.integers(1, 5 * c.tile, endpoint=True))
        size, kind = int(random.choice([32, 64, 128, 4096])), random.random()
        if works and kind < 0.25:
            before = works[-1]
            layer = fit(before.job.layer.k, n, before.job.layer.group_size)
            works.append(driver.place(layer, before.job.tokens, reuse=before, **options))
            continue
        if sources and kind < 0.5:
            source = sources[int(random.integers(len(sources)))]
            options["wait"] = Wait(random.choice([Wait.ACTIVATIONS, Wait.WEIGHTS]))
            layer, tokens = fit(source.job.layer.n, n, 32), source.job.tokens
            works.append(driver.place(layer, tokens, reads=source, **options))
            continue
        wide = random.random() < 0.4
        layer = fit(int(random.choice([32, 64, 96, max_k])), int(random.choice([32, 64])) if wide else n, size)
        tokens = int(random.choice([1, 1, 2, c.max_tokens, random.integers(1, c.max_tokens, endpoint=True)]))
        works.append(driver.place(layer, min(tokens, c.max_tokens), aligned=wide, **options))
        if wide and driver.feeds(works[-1]):
            sources.append(works[-1])
    return works


@cocotb.test()
async def shapes(dut):
    """One layer at a time: K that needs padding, N that is not a multiple of the tile or makes long bursts, every M."""
    driver, c = await AcceleratorDriver.create(dut), config()
    for k, n, size in ((64, c.tile, 32), (100, 3 * c.tile - 1, 32), (32, 1, 32), (64, 300, 64)):
        await driver.run([driver.place(fit(k, n, size), min(2, c.max_tokens))])
    driver.forget()
    for tokens in rng(1).permutation(range(1, c.max_tokens + 1)).tolist()[:6]:
        await driver.run([driver.place(fit(64, c.tile + 1, 32), tokens)])


@cocotb.test()
async def extremes(dut):
    """All-minimum and all-maximum data, zero rows and tokens, and sums at the bound with the longest K."""
    driver, c = await AcceleratorDriver.create(dut), config()
    tokens = min(2, c.max_tokens)
    await driver.run([driver.place(fit(64, c.tile + 1, 32), tokens, kind) for kind in DATA])
    await driver.run([driver.place(fit(c.max_k, c.tile, 128), tokens, kind) for kind in ("bound", "negative_bound")])


@cocotb.test()
async def random_layers(dut):
    """Many layers of different shapes, with the queue as full as possible, at the end of the address space."""
    driver, random = await AcceleratorDriver.create(dut, base=ADDRESS_LIMIT - MEMORY), rng(1)
    for _ in range(10 if LONG else 3):
        await driver.run(_random_works(driver, random, 18), room=QUEUE_DEPTH)
        driver.forget()


@cocotb.test()
@cocotb.parametrize(run=range(16 if LONG else 5))
async def random_pauses(dut, run):
    """The same with pauses on every channel, light and heavy pauses mixed."""
    random = rng(1, run)
    base = MEMORY * int(random.integers(0, ADDRESS_LIMIT // MEMORY))
    driver = await AcceleratorDriver.create(dut, pauses(run), base)
    await driver.run(_random_works(driver, random, 10))


@cocotb.test()
async def reuse(dut):
    """Several layers on the same activations, which are read once, and new activations in between."""
    driver, c, works = await AcceleratorDriver.create(dut), config(), []
    for _ in range(3):
        works.append(driver.place(fit(160, c.tile * 2, 32), min(3, c.max_tokens)))
        size = works[-1].job.layer.group_size
        for n in (1, c.tile * 3 - 1):
            works.append(driver.place(fit(160, n, size), works[-1].job.tokens, reuse=works[-1]))
    await driver.run(works)


@cocotb.test()
async def full_queue(dut):
    """A push into a full queue is lost; nothing else is lost."""
    driver = await AcceleratorDriver.create(dut)
    answering = [False]
    driver.pause("hp0_r", lambda: not answering[0])
    works = [driver.place(fit(32, config().tile, 32), 1) for _ in range(QUEUE_DEPTH + 8)]
    await driver.start([])
    kept = []
    for item in works:
        await cycle(dut.clk, 40)
        if await driver.field("status", "queued") < QUEUE_DEPTH:
            kept.append(item)
        await driver.push(item)
    assert QUEUE_DEPTH < len(kept) < len(works)
    assert await driver.get("status") == BY_NAME["status"].field("running").mask | QUEUE_DEPTH << 8
    answering[0] = True
    await driver.finish(kept)


@cocotb.test()
@cocotb.parametrize(waits=[False, True])
async def most_in_flight(dut, waits):
    """A memory that acknowledges no write: as many descriptors as all FIFOs hold together; then all are completed.

    The table holds several descriptors only if one of them waits, the first that does not reach the FIFO of jobs.
    """
    driver, table = await AcceleratorDriver.create(dut), latency("table_depth")
    first = latency("most_in_flight") - QUEUE_DEPTH - table
    answering = [False]
    driver.pause("hp0_b", lambda: not answering[0])
    # At tile 16, all layers together are larger than the memory.
    works = [driver.place(fit(32, 1, 32), 1) for _ in range(4)]
    await driver.start([])
    kept = []
    for index in range(latency("most_in_flight") + 4):
        item = works[index % len(works)]
        if waits and index == first:
            item = replace(item, descriptor=replace(item.descriptor, wait=Wait.ACTIVATIONS))
        await cycle(dut.clk, 400)
        if await driver.field("status", "queued") < QUEUE_DEPTH:
            kept.append(item)
        await driver.push(item)
    assert len(kept) == latency("most_in_flight") - (0 if waits else table - 1)
    assert await driver.field("status", "running")
    answering[0] = True
    await driver.finish(kept)
    assert await driver.get("completed") == len(kept)
    assert not await driver.field("status", "running")


@cocotb.test()
async def interrupts(dut):
    """Only descriptors with the flag set the pending bit, which raises the interrupt line only while it is enabled."""
    driver, layer = await AcceleratorDriver.create(dut), fit(32, config().tile, 32)
    plain, flagged = driver.place(layer, 1), driver.place(layer, 1, interrupt=True)
    await driver.run([plain])
    assert await driver.get("interrupt_pending") == 0
    await driver.run([flagged])
    assert await driver.get("interrupt_pending") == 1 and read(dut.irq) == 0
    await driver.set("interrupt_enable", "error")
    assert read(dut.irq) == 0
    await driver.set("interrupt_enable", "done")
    await cycle(dut.clk, 2)
    assert read(dut.irq) == 1
    # Bits that are written as 0 do not change.
    await driver.set("interrupt_pending", "error")
    assert await driver.get("interrupt_pending") == 1 and read(dut.irq) == 1
    await driver.set("interrupt_pending", "done")
    assert await driver.get("interrupt_pending") == 0 and read(dut.irq) == 0
    await driver.run([plain, plain])
    assert read(dut.irq) == 0
    # The bit is set with the completion, and stays set when a descriptor without the flag follows.
    await driver.run([plain, flagged, plain])
    assert read(dut.irq) == 1
    await driver.set("interrupt_enable", 0)
    await cycle(dut.clk, 2)
    assert read(dut.irq) == 0 and await driver.get("interrupt_pending") == 1


@cocotb.test()
async def identity(dut):
    """The identity and capability registers have their values, and cannot be written."""
    driver, c = await AcceleratorDriver.create(dut, pauses()), config()
    assert await driver.get("identification") == IDENTIFICATION
    assert await driver.get("version") == VERSION
    assert await driver.get("config_digest") == config_digest(c)
    for field, value in dict(queue_depth=QUEUE_DEPTH, completions=COMPLETIONS, ports=c.ports, outstanding=8).items():
        assert await driver.field("capabilities", field) == value
    registers = registers_of(c)
    for register in registers:
        if register.access is Access.READ:
            for place in range(register.offset, register.end, 4):
                before = await driver.access(place)
                assert before[0] == 0
                assert (await driver.access(place, 0xFFFF_FFFF))[0] == SLVERR
                if register.name != "cycles":
                    assert await driver.access(place) == before
    # Registers of other hardware are not there.
    for name in {item.name for item in REGISTERS} - {item.name for item in registers}:
        assert await driver.access(offset(name)) == (DECERR, 0)
    # Bits outside the fields do nothing, and neither does a 0 in a command's bit.
    (control,) = (item for item in registers if item.name == "control")
    await driver.set("control", 0xFFFF_FFFF & ~sum(field.mask for field in control.fields))
    assert await driver.get("status") == 0 and await driver.get("completed") == 0
    await driver.run([driver.place(fit(32, 1, 32), 1)])


@cocotb.test()
async def counters(dut):
    """Beats are those of the layers. One layer is busy from start to completion. No cycle counts as starved twice."""
    driver, c = await AcceleratorDriver.create(dut), config()
    for index, tokens in enumerate((1, c.max_tokens)):
        work = driver.place(fit(128, 5 * c.tile, 64), tokens)
        await driver.set("control", "clear_counters")
        for name in ("busy", "beats", "starved_weights", "starved_activations", "starved_output"):
            assert await driver.get(name) == 0
        before = await driver.get("cycles")
        await driver.run([work])
        after = await driver.get("cycles")
        started, done = await driver.get("started"), await driver.get("completion_cycles", index)
        busy, beats = await driver.get("busy"), await driver.get("beats")
        assert beats == work.job.layer.beats
        assert before < started < done < after
        # The cycles of the start and of the completion are busy cycles too.
        assert busy == done - started + 1, f"busy for {busy} cycles, from {started} to {done}"
        layer = work.job.layer
        assert busy > max(beats, layer.slices * layer.out_tiles * tokens)
        starved = [await driver.get(f"starved_{cause}") for cause in ("weights", "activations", "output")]
        dut._log.info("M %d: busy %d, beats %d, starved %s", tokens, busy, beats, starved)
        assert sum(starved) <= busy - beats
        assert starved[1] > 0, "it has to wait for activations at first"


def _slow(monitor, regions):
    """Pauses of R in nine of ten cycles, while the memory answers reads of some regions."""
    pause = randomly(0.9, rng(1))

    def stall():
        owed = monitor.reads_under_way
        return bool(owed) and any(monitor.reads[-owed].address in region for region in regions) and pause()

    return stall


def _region(work, operand, port):
    """The addresses of an operand; for weights, those of one port."""
    if operand == "activations":
        return range(work.descriptor.activations, work.descriptor.activations + work.x.nbytes)
    start = work.descriptor.weights + port * work.descriptor.weights_stride
    return range(start, start + work.job.layer.beats * config().port_width // 8)


async def _starved(driver, works):
    """The cause that the core has waited for longest."""
    await driver.set("control", "clear_counters")
    await driver.run(works)
    starved = {name: await driver.get(f"starved_{name}") for name in ("weights", "activations", "output")}
    busy, beats = await driver.get("busy"), await driver.get("beats")
    assert beats == sum(item.job.layer.beats for item in works)
    assert sum(starved.values()) <= busy - beats
    driver.dut._log.info("busy %d, beats %d, starved %s", busy, beats, starved)
    return max(starved, key=lambda name: starved[name])


@cocotb.test()
@cocotb.parametrize(cause=["weights", "activations", "output"])
async def starved_by(dut, cause):
    """The counters show what is slow: weights, activations, or results."""
    driver, c = await AcceleratorDriver.create(dut), config()
    layer = fit(c.max_k // 2, 1, 64) if cause == "activations" else fit(64, 400, 64)
    works = [driver.place(layer, 1 if cause == "weights" else c.max_tokens) for _ in range(2)]
    if cause != "output":
        for port, monitor in enumerate(driver.monitors):
            driver.pause(f"hp{port}_r", _slow(monitor, [_region(item, cause, port) for item in works]))
    else:
        driver.pause("hp0_w", randomly(0.95, rng(2)))
    assert await _starved(driver, works) == cause


@cocotb.test()
async def completions(dut):
    """The cycle of every completion, in order, for more descriptors than entries; clearing does not change them."""
    driver = await AcceleratorDriver.create(dut)
    works = [driver.place(fit(32, 1, 32), 1) for _ in range(4)]
    count = COMPLETIONS + 8
    last = await driver.get("cycles")
    for index in range(0, count, len(works)):
        await driver.run(works)
        await driver.set("control", "clear_counters")
        for number in range(index, index + len(works)):
            now = await driver.get("completion_cycles", number % COMPLETIONS)
            assert now > last, f"descriptor {number} was complete at {now}, the previous one at {last}"
            last = now
        assert await driver.get("completed") == index + len(works)
    assert await driver.get("cycles") > last


@cocotb.test()
async def gathered(dut):
    """Aligned results whose columns are a multiple of 256 are written in bursts of 1 KiB only."""
    driver, c = await AcceleratorDriver.create(dut), config()
    await driver.run([driver.place(fit(32, 512, 32), min(3, c.max_tokens), aligned=True) for _ in range(2)])
    lengths = {burst.beats * c.port_width // 8 for burst in driver.monitors[0].writes}
    assert lengths == {min(1024, 256 * c.port_width // 8)}, lengths


@cocotb.test(skip=StreamLayout(config()).array_factor > 1)
async def back_to_back(dut):
    """At M = 1, if the array is fast enough, layers follow each other without an idle cycle on the busiest port."""
    driver, c = await AcceleratorDriver.create(dut), config()
    idle = []
    for count in (1, 6):
        works = [driver.place(fit(c.max_k // 2, 8 * c.tile, 128), 1) for _ in range(count)]
        before = [monitor.beats for monitor in driver.monitors]
        await driver.set("control", "clear_counters")
        await driver.run(works)
        moved = max(monitor.beats - beats for monitor, beats in zip(driver.monitors, before))
        idle.append(await driver.get("busy") - moved)
        driver.forget()
    # Idle from the push to the first beat and from the last beat to the completion: once for any number of layers.
    dut._log.info("%s cycles in which the busiest port did not move", idle)
    assert idle[1] <= idle[0] + 4


@cocotb.test()
async def loads_ahead(dut):
    """A layer's activations are loaded while the previous layer computes: the core waits only for the first ones."""
    driver, c = await AcceleratorDriver.create(dut), config()
    waited = []
    for count in (1, 4):
        works = [driver.place(fit(512, 20 * c.tile, 64), c.max_tokens) for _ in range(count)]
        await driver.set("control", "clear_counters")
        await driver.run(works)
        waited.append(await driver.get("starved_activations"))
    dut._log.info("waited %s cycles for activations", waited)
    assert 0 < waited[1] <= waited[0] + 16


def _chain(driver, wait, count=3):
    """Layers of one token and some bursts of weights, each of which reads the results of the one before."""
    k = next(k for k in range(128, config().max_k, 128) if fit(k, k, 64).beats > 1000)
    works = [driver.place(fit(k, k, 64), 1, x=rng(5).standard_normal((1, k)).astype(np.float32))]
    while len(works) < count:
        assert driver.feeds(works[-1])
        works.append(driver.place(fit(k, k, 64), 1, reads=works[-1], wait=wait))
    return works


@cocotb.test()
async def weights_ahead(dut):
    """While a layer waits for the results of the one before, its weights are read, unless they wait, too. If memory is
    slower than the core, this takes no more time."""
    driver, busy, bursts = await AcceleratorDriver.create(dut), {}, {}
    hp0 = driver.monitors[0]
    for port in range(config().ports):
        driver.pause(f"hp{port}_r", randomly(0.5, rng(1, port)))
    for wait in (Wait.ACTIVATIONS, Wait.WEIGHTS):
        works = _chain(driver, wait)
        await driver.set("control", "clear_counters")
        await driver.start(works)
        mark = hp0.acknowledged + len(works[0].writes)
        await driver.until(lambda mark=mark: hp0.acknowledged >= mark, "the first layer")
        regions = [_region(item, "weights", 0) for item in works[1:]]
        bursts[wait] = [sum(burst.address in region for burst in hp0.reads) for region in regions]
        assert not any(burst.address in _region(works[1], "activations", 0) for burst in hp0.reads)
        await driver.finish(works)
        busy[wait] = await driver.get("busy")
    dut._log.info("bursts of weights before the wait's end: %s; busy: %s", bursts, busy)
    assert bursts[Wait.ACTIVATIONS][0] > 0 and not any(bursts[Wait.WEIGHTS])
    # The activations come behind the bursts of weights that are under way, which takes some of the time that is saved.
    assert busy[Wait.ACTIVATIONS] < 1.02 * busy[Wait.WEIGHTS]


@cocotb.test()
async def untouched_window(dut):
    """Software may write the window again as soon as the push is answered. The window keeps its values."""
    driver = await AcceleratorDriver.create(dut)
    works = [driver.place(fit(32, config().tile, 32), 1) for _ in range(2)]
    await driver.start([])
    await driver.push(works[0])
    for index in range(BY_NAME["descriptor"].words):
        await driver.access(offset("descriptor", index), 0xDEAD_BEEF)
        assert await driver.get("descriptor", index) == 0xDEAD_BEEF
    driver._window = [None] * len(driver._window)
    await driver.push(works[1])
    await driver.finish(works)
