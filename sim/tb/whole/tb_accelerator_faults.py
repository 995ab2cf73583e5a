# SPDX-License-Identifier: Apache-2.0
"""The accelerator's faults: what stops it, what it then reports and still completes, and how it recovers by a reset.

After every fault the bus rules still hold (the monitors check it), and the next layers are exact.
"""

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiResp

from hw.spec.control.descriptor import ADDRESS_LIMIT, DESCRIPTOR_WORDS, Opcode
from hw.spec.control.refusal import refusal
from hw.spec.control.registers import BY_NAME, DEFAULT_TIMEOUT, ErrorCode
from hw.spec.ops import LINEAR, Wait
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, fit, pauses
from sim.bench.dut import config
from sim.bench.streams import cycle, randomly, read, rng, until
from sim.harness import settings

LONG = settings().get("long", False)
"""Longer random runs."""
PORTS = config().ports
TIMEOUT = 300
BASE = ADDRESS_LIMIT - MEMORY
"""The address of the layers: it uses all bits of an address."""


def _works(driver, count, **options):
    """Some layers with a few output tiles."""
    c = config()
    return [driver.place(fit(64, 3 * c.tile - 1, 32), 1 + i % min(3, c.max_tokens), **options) for i in range(count)]


async def _recovers(driver):
    """Resets, and runs two layers."""
    await driver.reset()
    for faults in (*driver.read_faults, driver.write_faults):
        faults.clear()
    driver.forget()
    await driver.run(_works(driver, 2))


async def _stops(driver):
    """Waits for the interrupt, and then checks that nothing more is requested and nothing more enters the core."""
    await RisingEdge(driver.dut.irq)
    offered, beats = driver.offered, await driver.get("beats")
    await driver.calm()
    assert driver.offered == offered, f"after the fault {driver.offered} bursts were offered instead of {offered}"
    assert await driver.get("beats") == beats, "beats entered the core after the fault"


def _words(descriptor, **fields):
    """A descriptor's words with some fields replaced."""
    whole = sum(word << 32 * index for index, word in enumerate(descriptor.to_words()))
    for field in LINEAR.fields:
        if field.name in fields:
            whole ^= field.put(field.get(whole)) ^ field.put(fields[field.name])
    return [whole >> 32 * index & 0xFFFF_FFFF for index in range(DESCRIPTOR_WORDS)]


_REFUSED = {
    "opcode": (dict(opcode=255), ErrorCode.OPCODE),
    # This hardware has no vector unit.
    "vector": (dict(opcode=Opcode.VECTOR), ErrorCode.OPCODE),
    "epilogue": (dict(eps=1), ErrorCode.OPCODE),
    "tokens": (dict(tokens=0), ErrorCode.SHAPE),
    "body": (dict(body_words=0x7FFF), ErrorCode.SHAPE),
    "reuse": (dict(reuse=1), ErrorCode.SHAPE),
    "stride": (dict(weights_stride=0), ErrorCode.SHAPE),
    "wait": (dict(wait=3), ErrorCode.SHAPE),
}


def _refused(driver, name, before):
    """A descriptor that is refused, and the reason; its shape differs from that of the other layers here."""
    fields, code = _REFUSED[name]
    words = _words(driver.place(fit(32, config().tile, 32), 1).descriptor, **fields)
    assert refusal(config(), words, before.descriptor.to_words()) == code
    return words, code


@cocotb.test()
@cocotb.parametrize(name=list(_REFUSED))
async def refused(dut, name):
    """A refused descriptor: the descriptors before it are completed; it and the descriptors after it are not."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    before, after = (_works(driver, 2) for _ in range(2))
    words, code = _refused(driver, name, before[-1])
    await driver.start(before)
    await driver.push(words)
    for item in after:
        await driver.push(item)
    await driver.failed(code, 0)
    await driver.finish(before, status=_status(queued=len(after)))
    await cycle(dut.clk, 300)
    driver.check(before)
    await _recovers(driver)


def _status(queued):
    """The status after a stop by an error, with descriptors in the queue."""
    status = BY_NAME["status"]
    return status.field("running").mask | status.field("error").mask | queued << 8


def _spoiled(kind, tokens, k):
    """Activations that are refused, and the reason."""
    x = rng(3).standard_normal((tokens, k)).astype(np.float32)
    token, place = tokens - 1, int(rng(4).integers(0, k))
    match kind:
        case "tiny":
            x[token] *= np.float32(2.0**-125)
        case "subnormal":
            x[token] = 0
            x[token, place] = 2.0**-140
        case _:
            x[token, place] = {"infinite": -np.inf, "nan": np.nan}[kind]
    return x, ErrorCode.EXPONENT if kind in ("tiny", "subnormal") else ErrorCode.NON_FINITE


@cocotb.test()
@cocotb.parametrize(kind=["infinite", "nan", "tiny", "subnormal"])
async def activations(dut, kind):
    """Activations that are not finite or out of range: their address is reported, earlier layers are completed."""
    driver, c = await AcceleratorDriver.create(dut, base=BASE), config()
    layer, tokens = fit(64, 3 * c.tile, 32), min(3, c.max_tokens)
    x, code = _spoiled(kind, tokens, layer.k)
    before, bad, after = _works(driver, 2), driver.place(layer, tokens, x=x), _works(driver, 2)
    await driver.start(before)
    for item in (bad, *after):
        await driver.push(item)
    await driver.failed(code, bad.descriptor.activations)
    hp0, bursts = driver.monitors[0], sum(len(item.writes) for item in before)
    await driver.until(lambda: hp0.acknowledged == bursts, "the layers before")
    await driver.calm()
    assert await driver.completed() == len(before)
    driver.check(before)
    await _recovers(driver)


@cocotb.test()
@cocotb.parametrize(port=range(PORTS), what=["weights", "activations"], response=[AxiResp.SLVERR, AxiResp.DECERR])
async def read_errors(dut, port, what, response):
    """A bad answer to a read, on every port: the burst's address is reported; nothing after it is completed."""
    driver, c = await AcceleratorDriver.create(dut, pauses(port), BASE), config()
    works = _works(driver, 1) + [driver.place(fit(c.max_k, 2 * c.tile, 128), c.max_tokens)] + _works(driver, 1)
    bad, size = works[1].descriptor, c.port_width // 8
    if what == "weights":
        place = bad.weights + port * bad.weights_stride + size * (works[1].job.layer.beats * 2 // 3)
    else:
        # The test does not assume which port reads which part.
        place = bad.activations + size * int(rng(5).integers(0, works[1].x.nbytes // size))
    for faults in driver.read_faults:
        faults[place] = response
    await driver.set("interrupt_enable", "error")
    stops = cocotb.start_soon(_stops(driver))
    await driver.start(works)
    await driver.failed(ErrorCode.READ_BUS)
    bursts = [burst for monitor in driver.monitors for burst in monitor.reads]
    holding = {burst.address for burst in bursts if burst.address <= place < burst.address + burst.beats * size}
    assert holding == {await driver.get("error_address")}
    completed = await driver.completed()
    assert completed <= 1
    await stops
    assert await driver.completed() == completed
    driver.check(works[:completed], works[completed:2])
    await _recovers(driver)


@cocotb.test()
async def read_errors_of_all_ports(dut):
    """All ports' memories fail in the same beat of their regions: one burst is reported, nothing is completed."""
    driver, c = await AcceleratorDriver.create(dut, base=BASE), config()
    work = driver.place(fit(c.max_k, 2 * c.tile, 128), c.max_tokens)
    size, descriptor, middle = c.port_width // 8, work.descriptor, work.job.layer.beats // 2
    places = [descriptor.weights + port * descriptor.weights_stride + middle * size for port in range(PORTS)]
    for faults, place in zip(driver.read_faults, places, strict=True):
        faults[place] = AxiResp.SLVERR
    await driver.start([work])
    await driver.failed(ErrorCode.READ_BUS)
    bursts = {burst.address: burst for monitor in driver.monitors for burst in monitor.reads}
    found = bursts[await driver.get("error_address")]
    assert any(found.address <= place < found.address + found.beats * size for place in places)
    await driver.calm()
    assert await driver.completed() == 0
    await _recovers(driver)


@cocotb.test()
@cocotb.parametrize(response=[AxiResp.SLVERR, AxiResp.DECERR], pausing=[False, True])
async def write_errors(dut, response, pausing):
    """A bad answer to a write: the burst's address is reported; its layer and the layers after it are not completed."""
    driver = await AcceleratorDriver.create(dut, pauses() if pausing else {}, BASE)
    works = _works(driver, 6)
    number = int(rng(6).integers(1, 5))
    address, _ = works[number].writes[-1][0]
    driver.write_faults[address] = response
    await driver.set("interrupt_enable", "error")
    stops = cocotb.start_soon(_stops(driver))
    await driver.start(works)
    await driver.failed(ErrorCode.WRITE_BUS, address)
    await stops
    completed = await driver.completed()
    assert completed == number
    driver.check(works[:completed], works[completed:])
    await _recovers(driver)


@cocotb.test()
async def waits_for_ever(dut):
    """A layer that waits for one whose write fails reads nothing but weights, and the reset ends the wait."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    first, second = _works(driver, 1) + _works(driver, 1, wait=Wait.ACTIVATIONS)
    address, _ = first.writes[-1][0]
    driver.write_faults[address] = AxiResp.SLVERR
    await driver.start([first, second])
    await driver.failed(ErrorCode.WRITE_BUS, address)
    await driver.calm()
    place = second.descriptor.activations
    read_from = {burst.address for monitor in driver.monitors for burst in monitor.reads}
    assert not read_from & set(range(place, place + second.x.nbytes))
    assert await driver.completed() == 0
    driver.check([], [first])
    await _recovers(driver)


@cocotb.test()
async def nothing_completes_after(dut):
    """A layer is not completed if its results are acknowledged after a fault in the next layer."""
    driver = await AcceleratorDriver.create(dut)
    works = _works(driver, 2)
    driver.pause("hp0_b", lambda: True)
    driver.read_faults[0][works[1].descriptor.weights] = AxiResp.SLVERR
    await driver.start(works[:1])
    await driver.until(lambda: len(driver.monitors[0].written) == len(works[0].writes), "the results")
    await driver.push(works[1])
    await driver.failed(ErrorCode.READ_BUS, works[1].descriptor.weights)
    driver.pause("hp0_b", None)
    await driver.calm()
    assert driver.monitors[0].quiet and await driver.completed() == 0
    driver.check(works[:1])
    await _recovers(driver)


async def _owed(driver, channel):
    """Blocks a channel in the middle of some layers; returns the addresses that wait for an answer then."""
    works = _works(driver, 8)
    await driver.start(works[:2])
    await driver.until(lambda: driver.monitors[0].writes_under_way > 0, "the first write")
    driver.pause(channel, lambda: True)
    for item in works[2:]:
        await driver.push(item)
    return works


@cocotb.test()
@cocotb.parametrize(
    channel=[f"hp{port}_{name}" for port in range(PORTS) for name in ("ar", "r")] + ["hp0_aw", "hp0_w", "hp0_b"]
)
async def timeouts(dut, channel):
    """A memory that stops answering is detected within one to two timeouts; the reset ends when it answers again."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    assert await driver.get("timeout") == DEFAULT_TIMEOUT
    await driver.set("timeout", TIMEOUT)
    port, name = int(channel[2]), channel[4:]
    monitor, writes = driver.monitors[port], name in ("aw", "w", "b")
    works = await _owed(driver, channel)
    await driver.set("interrupt_enable", "error")
    await until(dut.clk, lambda: read(dut.irq) == 1, "the timeout", 50 * TIMEOUT)
    silent = driver.now - (monitor.wrote_at if writes else monitor.read_at)
    assert TIMEOUT <= silent <= 2 * TIMEOUT + 10, f"found out after {silent} cycles"
    bursts, owed = (monitor.writes, monitor.writes_under_way) if writes else (monitor.reads, monitor.reads_under_way)
    code = ErrorCode.WRITE_TIMEOUT if writes else ErrorCode.READ_TIMEOUT
    await driver.failed(code, bursts[len(bursts) - owed].address)
    assert owed == (await driver.get("writes_under_way") if writes else await _reads(driver, port))
    # The reset waits for the memory, however long it takes, and pushes are ignored meanwhile.
    await driver.set("control", "reset")
    offered = driver.offered
    await cycle(dut.clk, 5 * TIMEOUT)
    assert driver.offered == offered
    queued = await driver.field("status", "queued")
    for _ in range(3):
        await driver.push(works[0])
    assert await driver.field("status", "resetting") == 1
    assert await driver.field("status", "queued") <= queued
    completed = await driver.completed()
    driver.pause(channel, None)
    await driver.has_reset()
    driver.check(works[:completed], works[completed:])
    await cycle(dut.clk, 200)
    assert driver.offered == offered, "something was pushed during the reset"
    assert await driver.get("timeout") == TIMEOUT
    await _recovers(driver)


async def _reads(driver, port):
    return await driver.field("reads_under_way", f"port_{port}")


@cocotb.test()
async def patience(dut):
    """The accelerator waits for a slow memory that moves, and, with a timeout of 0, for one that does not move."""
    driver = await AcceleratorDriver.create(dut)
    await driver.set("timeout", 64)
    for port in range(PORTS):
        driver.pause(f"hp{port}_r", randomly(0.8, rng(1, port)))
    driver.pause("hp0_w", randomly(0.8, rng(2)))
    await driver.run(_works(driver, 3))
    await driver.set("timeout", 0)
    stopped = [True]
    driver.pause("hp0_r", lambda: stopped[0])
    works = _works(driver, 2)
    await driver.start(works)
    await cycle(dut.clk, 3000)
    assert not await driver.field("status", "error")
    stopped[0] = False
    await driver.finish(works)


@cocotb.test()
@cocotb.parametrize(run=range(4 if LONG else 2))
async def resets(dut, run):
    """A reset at any moment, with pauses: outstanding transfers are finished, and the next layers are exact."""
    random = rng(7, run)
    driver = await AcceleratorDriver.create(dut, pauses(run), BASE)
    for _ in range(24 if LONG else 8):
        works = [
            driver.place(
                fit(int(random.choice([32, 64, 160])), int(random.integers(1, 6 * config().tile)), 32),
                int(random.integers(1, config().max_tokens, endpoint=True)),
                interrupt=bool(random.integers(0, 2)),
                wait=Wait(random.integers(len(Wait))),
            )
            for _ in range(int(random.integers(1, 5)))
        ]
        await driver.start(works)
        # Half of the resets come while the first layers begin, the others at any time.
        await cycle(dut.clk, int(random.integers(1, random.choice([60, 3000]))))
        completed = await driver.completed()
        await driver.reset()
        driver.check(works[:completed], works[completed:])
        driver.forget()
        await driver.run(_works(driver, int(random.integers(1, 3))))
        driver.forget()


@cocotb.test()
@cocotb.parametrize(run=range(4 if LONG else 2))
async def rst_pin(dut, run):
    """The rst pin of accelerator and memory at any moment: all registers have their reset values, layers are exact."""
    random = rng(10, run)
    driver = await AcceleratorDriver.create(dut, pauses(run), BASE)
    for _ in range(12 if LONG else 4):
        await driver.set("timeout", 54321)
        await driver.set("interrupt_enable", "done")
        works = _works(driver, 4, interrupt=True)
        await driver.start(works)
        await cycle(dut.clk, int(random.integers(1, random.choice([60, 3000]))))
        dut.rst.value = 1
        await cycle(dut.clk, int(random.integers(2, 6)))
        dut.rst.value = 0
        await cycle(dut.clk)
        driver.check([], works)
        assert read(dut.irq) == 0
        for name in ("status", "completed", "interrupt_enable", "interrupt_pending", "busy", "beats", "error_code"):
            assert await driver.get(name) == 0, f"{name} is not 0 after rst"
        assert await driver.get("timeout") == DEFAULT_TIMEOUT
        driver.forget(window=True)
        await driver.run(_works(driver, 2))
        driver.forget()


@cocotb.test()
async def forgets_activations(dut):
    """A reset in the middle of large activations: the small ones that follow contain no values of them."""
    driver, c, random = await AcceleratorDriver.create(dut), config(), rng(9)
    layer = fit(c.max_k, 1, 128)
    for _ in range(8):
        x = random.standard_normal((c.max_tokens, layer.k)).astype(np.float32)
        large = driver.place(layer, c.max_tokens, x=x * np.float32(2.0**60))
        await driver.start([large])
        beats = int(random.integers(1, large.x.nbytes * 8 // (c.port_width * PORTS)))
        await driver.until(lambda beats=beats: driver.monitors[0].beats >= beats, "the first activations")
        await driver.reset()
        driver.check([], [large])
        await driver.run([driver.place(layer, 1, x=x[:1])])
        driver.monitors[0].beats = 0
        driver.forget()


@cocotb.test()
async def idle_reset(dut):
    """Two resets while the accelerator is idle keep the values that software wrote, and the counts."""
    driver = await AcceleratorDriver.create(dut)
    work = _works(driver, 1, interrupt=True)
    await driver.run(work)
    await driver.set("interrupt_enable", 3)
    await driver.set("timeout", 12345)
    kept = ("interrupt_enable", "timeout", "busy", "beats", "started", "starved_activations")
    before = [await driver.get(name) for name in kept]
    window = [await driver.get("descriptor", index) for index in range(16)]
    assert read(dut.irq) == 1
    cycles = await driver.get("cycles")
    await driver.reset()
    await driver.reset()
    assert read(dut.irq) == 0
    assert [await driver.get(name) for name in kept] == before
    assert [await driver.get("descriptor", index) for index in range(16)] == window
    assert await driver.get("cycles") > cycles
    # There is no earlier descriptor whose activations could be reused.
    await driver.push(_words(work[0].descriptor, reuse=1))
    await driver.failed(ErrorCode.SHAPE, 0)
    await _recovers(driver)


@cocotb.test()
async def interrupt(dut):
    """The error interrupt: it is set once per error, raised only while it is enabled, and ends when it is cleared."""
    driver = await AcceleratorDriver.create(dut)
    for _ in range(2):
        await driver.set("interrupt_enable", 0)
        await driver.push(_words(_works(driver, 1)[0].descriptor, opcode=0))
        await cycle(dut.clk, 50)
        assert read(dut.irq) == 0 and await driver.get("interrupt_pending") == 2
        await driver.set("interrupt_enable", "error")
        await cycle(dut.clk, 2)
        assert read(dut.irq) == 1
        # Clearing the other cause changes nothing.
        await driver.set("interrupt_pending", "done")
        assert read(dut.irq) == 1
        await driver.set("interrupt_pending", "error")
        await cycle(dut.clk, 50)
        assert read(dut.irq) == 0 and await driver.get("interrupt_pending") == 0
        assert await driver.field("status", "error") == 1 and await driver.get("error_code") == ErrorCode.OPCODE
        await driver.reset()
        assert read(dut.irq) == 0
    await _recovers(driver)


@cocotb.test()
async def first_one_counts(dut):
    """The first of several faults is kept. If there are resets between many faults, each fault is detected."""
    driver = await AcceleratorDriver.create(dut, pauses(), BASE)
    for name in rng(8).permutation(list(_REFUSED)).tolist():
        layer = fit(64, config().tile, 32)
        x, second = _spoiled("nan", 1, layer.k)
        works = _works(driver, 1)
        words, code = _refused(driver, name, works[0])
        await driver.start(works)
        await driver.push(words)
        await driver.push(driver.place(layer, 1, x=x))
        await driver.failed(code, 0)
        # A bus error in an outstanding transfer changes nothing.
        place = works[0].writes[-1][0].address
        driver.write_faults[place] = AxiResp.SLVERR
        await driver.calm()
        assert await driver.get("error_code") == code != second
        driver.check([], works)
        driver.write_faults.clear()
        await driver.reset()
        driver.forget()
    await driver.run(_works(driver, 2))
