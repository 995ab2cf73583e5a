# SPDX-License-Identifier: Apache-2.0
"""The accelerator runs programs from memory: exact results, exact counts, and every fault in the middle of a program.

The whole memory is compared after each program, and after each fault: only descriptors that are counted as complete, or
were in flight when the accelerator stopped, may have written anything.
"""

from dataclasses import replace

import cocotb
import numpy as np
from cocotbext.axi import AxiResp

from hw.spec.control.descriptor import ADDRESS_LIMIT, Wait
from hw.spec.control.program import DESCRIPTOR_BYTES, PROGRAM_ALIGNMENT
from hw.spec.control.registers import BY_NAME, COMPLETIONS, QUEUE_DEPTH, ErrorCode
from hw.spec.ops.base import Opcode
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, fit, pauses
from sim.bench.dut import config
from sim.bench.programs import Program, random_program
from sim.bench.streams import cycle, read, rng, until
from sim.harness import settings

LONG = settings().get("long", False)
"""More and longer random programs."""
BASE = ADDRESS_LIMIT - MEMORY
"""The address of the programs: it uses all bits of an address."""
TIMEOUT = 300
_RUNNING, _FETCHING = (BY_NAME["status"].field(name).mask for name in ("running", "fetching"))


def _short(driver: AcceleratorDriver, count: int, salt: int = 1, n: int = 20, **fields) -> Program:
    """A program of one token: linear layers and rows from memory in turn.

    After the first ones most are rows from memory, because weights for all ports take much of the memory.
    """
    program = Program(driver, rng(11, salt))
    for index in range(count):
        program.add((), 1, n, vector=index % (2 if index < 12 else 8) != 0, **fields)
    return program


async def _exact(driver: AcceleratorDriver) -> None:
    """A new program directly after a reset is exact."""
    await driver.reset()
    for faults in (*driver.read_faults, driver.write_faults):
        faults.clear()
    driver.forget()
    await _short(driver, 4, salt=2).run()


async def _stopped(driver: AcceleratorDriver, program: Program, complete: int, partly: int = 0) -> None:
    """Exactly the first descriptors are complete; of the next ones some results may be in memory."""
    await driver.calm()
    assert await driver.completed() == complete
    program.expect(complete)
    if partly:
        found, before = np.frombuffer(bytes(driver.memory), np.uint8), driver.image.copy()
        program.expect(complete + partly)
        # Each byte is the old one or the new one.
        driver.image[:] = np.where(found == driver.image, driver.image, before)
    program.compare()


@cocotb.test()
@cocotb.parametrize(stalls=[False, True])
async def programs(dut, stalls):
    """Programs with all kinds of epilogues and waits, one after another, and descriptors of the window between them.

    A program is started as soon as the one before is fetched, while its descriptors are in flight.
    """
    random = rng(1)
    driver = await AcceleratorDriver.create(dut, pauses(5) if stalls else None, BASE)
    window = [_short(driver, 2, salt=3), _short(driver, 2, salt=4)]
    chosen = [random_program(driver, random, 6 if LONG else 2), *(_short(driver, count) for count in (1, 2, 5))]
    for program in chosen:
        program.store()
    for program in (window[0], *chosen, window[1]):
        program.expect()
    await window[0].push()
    for program in chosen:
        await driver.start_program(program.address, len(program.descriptors))
        while (status := await driver.get("status")) & _FETCHING:
            assert status & _RUNNING
    for made in window[1].descriptors:
        while await driver.field("status", "queued") == QUEUE_DEPTH:
            pass
        await driver.push(made.to_words())
    total = sum(len(program.descriptors) for program in (*chosen, *window))
    for _ in range(20_000):
        if await driver.get("completed") == total:
            break
        await cycle(dut.clk, 20)
    assert await driver.get("status") == 0 and await driver.get("completed") == total
    chosen[0].compare()


@cocotb.test()
async def long_program(dut):
    """More descriptors than queue and completions together: one interrupt, at the end; the count is exact."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    count = QUEUE_DEPTH + COMPLETIONS + 9
    program = _short(driver, count, n=3)
    program.descriptors[-1] = replace(program.descriptors[-1], interrupt=1)
    program.store()
    program.expect()
    await driver.set("interrupt_enable", "done")
    await program.start()
    started, most = await driver.get("started"), 0
    while not read(dut.irq):
        status = await driver.get("status")
        assert status & _RUNNING or read(dut.irq), "a program that is not complete is not running"
        most = max(most, status >> 8 & 0xFF)
        assert await driver.completed() <= count
    assert await driver.completed() == count and 0 < most <= QUEUE_DEPTH
    await program.finish()
    numbers = range(count - COMPLETIONS, count)
    times = [await driver.get("completion_cycles", number % COMPLETIONS) for number in numbers]
    assert started < times[0] and times == sorted(set(times))
    assert await driver.get("failed") == 0


@cocotb.test()
async def order_of_fetching(dut):
    """Each descriptor is read once, in order, by one burst on the first port."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    program = _short(driver, 2 * QUEUE_DEPTH)
    await program.run()
    places = range(program.address, program.address + DESCRIPTOR_BYTES * len(program.descriptors), DESCRIPTOR_BYTES)
    seen = [burst.address for burst in driver.monitors[0].reads]
    assert [address for address in seen if address in places] == list(places)
    assert seen[0] == program.address
    beats = DESCRIPTOR_BYTES * 8 // config().port_width
    assert {burst.beats for burst in driver.monitors[0].reads if burst.address in places} == {beats}


@cocotb.test()
@cocotb.parametrize((("index", "what"), [(0, "shape"), (5, "opcode"), (6, "shape"), (QUEUE_DEPTH + 3, "opcode")]))
async def refused(dut, index, what):
    """A refused descriptor: its index is reported; those before it are completed, it and those after it are not."""
    driver = await AcceleratorDriver.create(dut, pauses(7), BASE)
    program = _short(driver, index + 4)
    good = program.descriptors[index]
    program.descriptors[index] = replace(good, opcode=200) if what == "opcode" else replace(good, tokens=0)
    program.store()
    await program.start()
    await driver.failed(ErrorCode.OPCODE if what == "opcode" else ErrorCode.SHAPE, 0, index)
    await _stopped(driver, program, index)
    await _exact(driver)


@cocotb.test()
async def indices(dut):
    """Indices count from the reset, and from the start of the last program: also those of the window after it."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    for window, fetched, then in ((3, 0, 0), (0, 2, 3), (2, 4, 0), (1, 3, 2)):
        first, program, last = (_short(driver, count, salt=count) for count in (window, fetched, then + 1))
        last.descriptors[-1] = replace(last.descriptors[-1], tokens=0)
        await first.push()
        if fetched:
            program.store()
            await driver.start_program(program.address, fetched)
            while await driver.field("status", "fetching"):
                pass
        for made in last.descriptors:
            await driver.push(made.to_words())
        await driver.failed(ErrorCode.SHAPE, 0, (0 if fetched else window) + fetched + then)
        await driver.calm()
        for part, count in ((first, window), (program, fetched), (last, then)):
            part.expect(count)
        last.compare()
        await _exact(driver)


@cocotb.test()
@cocotb.parametrize((("value", "index"), [(np.nan, 1), (2.0**-140, 4), (np.inf, 7)]))
async def activations(dut, value, index):
    """A layer with activations that are refused: its index and address, whatever follows it in the queue."""
    driver, c = await AcceleratorDriver.create(dut, pauses(9), BASE), config()
    program = _short(driver, 1)
    while len(program.descriptors) < 10:
        if len(program.descriptors) == index:
            x = np.zeros((min(2, c.max_tokens), 64), np.float32)
            x[-1, 5] = value
            program.linear = driver.place(fit(64, 2 * c.tile, 32), len(x), x=x)
            program.append(program.linear.descriptor)
        # A layer that uses activations again does not enter the unit.
        elif len(program.descriptors) % 3 == 2:
            program.add_again()
        else:
            program.add((), 1, 20, vector=len(program.descriptors) % 2 == 1)
    bad = program.descriptors[index]
    program.store()
    await program.start()
    await driver.failed(ErrorCode.EXPONENT if value == 2.0**-140 else ErrorCode.NON_FINITE, bad.activations, index)
    await _stopped(driver, program, index)
    await _exact(driver)


@cocotb.test()
@cocotb.parametrize(index=[0, 6, QUEUE_DEPTH + 2], part=["first", "last"])
async def descriptor_errors(dut, index, part):
    """An error on a beat of a descriptor: its address is reported, and the descriptor is not executed.

    The memory gives zeros with an error. The last words of a descriptor without an epilogue may be zeros, so hardware
    that ignores the error would execute it.
    """
    driver = await AcceleratorDriver.create(dut, base=BASE)
    program = _short(driver, index + 8)
    place = program.store() + DESCRIPTOR_BYTES * index
    beat = config().port_width // 8
    driver.read_faults[0][place + (DESCRIPTOR_BYTES - beat if part == "last" else 0)] = AxiResp.SLVERR
    await driver.set("interrupt_enable", "error")
    await program.start()
    await until(dut.clk, lambda: read(dut.irq) == 1, "the error", 20_000)
    offered = driver.offered
    await driver.failed(ErrorCode.READ_BUS, place)
    complete = await driver.completed()
    assert complete - 1 <= await driver.get("failed") <= index
    await _stopped(driver, program, complete, partly=index - complete)
    assert driver.offered == offered, "after the fault something was requested"
    outputs = {range(made.results, made.results + 128) for made in program.descriptors[index:]}
    assert not any(burst.address in output for burst in driver.monitors[0].writes for output in outputs)
    await _exact(driver)


@cocotb.test()
@cocotb.parametrize(name=["activations", "weights", "results", "second_results", "factor"])
async def data_errors(dut, name):
    """An error on an operand or on results in the middle of a program: nothing completes afterwards."""
    driver, index = await AcceleratorDriver.create(dut, pauses(2), BASE), 5
    program = _short(driver, index)
    program.add(("second",), 1, 40)
    for _ in range(5):
        program.add((), 1, 20)
    place = getattr(program.descriptors[index], name)
    written = name in ("results", "second_results")
    faults = driver.write_faults if written else driver.read_faults[0]
    for other in driver.read_faults:
        if not written:
            other[place] = AxiResp.DECERR
    faults[place] = AxiResp.DECERR
    program.store()
    await program.start()
    await driver.failed(ErrorCode.WRITE_BUS if written else ErrorCode.READ_BUS, place)
    complete, newest = await driver.completed(), await driver.get("failed")
    assert complete <= index <= newest < len(program.descriptors)
    await _stopped(driver, program, complete, partly=newest - complete + 1)
    await _exact(driver)


@cocotb.test()
async def late_descriptors(dut):
    """The watchdog covers the reads of a program: memory that does not answer is reported with the address."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    await driver.set("timeout", TIMEOUT)
    program = _short(driver, 3)
    program.store()
    driver.pause("hp0_r", lambda: True)
    await program.start()
    await driver.failed(ErrorCode.READ_TIMEOUT, program.address, 0)
    assert await driver.field("status", "fetching") and await driver.field("status", "running")
    driver.pause("hp0_r", None)
    await _exact(driver)


@cocotb.test()
async def start_while_resetting(dut):
    """A reset waits for the memory. Meanwhile no program is started, and none is started by the end of the reset."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    program = _short(driver, 3)
    program.store()
    driver.pause("hp0_r", lambda: True)
    await driver.push(program.descriptors[0].to_words())
    await driver.until(lambda: driver.monitors[0].reads_under_way > 0, "the first read")
    await driver.set("control", "reset")
    await cycle(dut.clk, 4)
    offered = driver.offered
    await driver.start_program(program.address, 3)
    await cycle(dut.clk, 100)
    assert driver.offered == offered and not await driver.field("status", "fetching")
    driver.pause("hp0_r", None)
    await driver.has_reset()
    await cycle(dut.clk, 100)
    assert driver.offered == offered
    await _exact(driver)


@cocotb.test()
@cocotb.parametrize(run=range(4 if LONG else 1))
async def resets(dut, run):
    """A reset at any moment leaves nothing of the program behind: the next one, started at once, is exact."""
    random = rng(13, run)
    driver = await AcceleratorDriver.create(dut, pauses(20 + run), BASE)
    for _ in range(20 if LONG else 10):
        count = int(random.integers(1, 40))
        program = _short(driver, count, salt=count, wait=Wait(int(random.integers(3))))
        program.store()
        await program.start()
        # Some resets come while the first descriptors are fetched, the others at any time.
        await cycle(dut.clk, int(random.integers(1, random.choice([60, 4000]))))
        complete = await driver.completed()
        await driver.set("control", "reset")
        await driver.has_reset()
        found, before = np.frombuffer(bytes(driver.memory), np.uint8), driver.image.copy()
        program.expect(complete)
        before, driver.image[:] = driver.image.copy(), before
        program.expect()
        driver.image[:] = np.where(found == driver.image, driver.image, before)
        program.compare()
        driver.forget()
        await _short(driver, int(random.integers(1, 6)), salt=5).run()
        driver.forget()


@cocotb.test()
async def commands_without_effect(dut):
    """While a program is fetched, start and push do nothing; a program of length 0 is none."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    program, other, window = _short(driver, 3 * QUEUE_DEPTH), _short(driver, 3, salt=2), _short(driver, 3, salt=3)
    # Descriptors of the window take and release room in the queue, too.
    window.expect()
    await window.push()
    await window.finish()
    other.store()
    await driver.start_program(other.address, 0)
    await cycle(dut.clk, 200)
    assert await driver.get("status") == 0 and await driver.get("completed") == 3
    program.store()
    program.expect()
    # It stays in the queue until its results are in memory.
    driver.pause("hp0_b", lambda: True)
    await program.start()
    for _ in range(3):
        await driver.start_program(other.address, 3)
        for made in other.descriptors:
            await driver.push(made.to_words())
    assert await driver.field("status", "fetching")
    driver.pause("hp0_b", None)
    await program.finish()
    assert not {burst.address for burst in driver.monitors[0].reads} & set(
        range(other.address, other.address + 3 * DESCRIPTOR_BYTES)
    )
    # Afterwards both have their effect. In the same write the descriptor of the window comes first.
    other.expect()
    await driver.start([])
    for index, word in enumerate(other.descriptors[0].to_words()):
        await driver.set("descriptor", word, index)
    await driver.set("program_address", (other.address + 2 * DESCRIPTOR_BYTES) & 0xFFFF_FFFF)
    await driver.set("program_length", 1)
    driver._window = [None] * len(driver._window)
    await driver.set("control", 0b1001)
    while await driver.field("status", "fetching"):
        pass
    await driver.push(other.descriptors[1].to_words())
    await other.finish()


@cocotb.test()
@cocotb.parametrize(address=[BASE + DESCRIPTOR_BYTES, ADDRESS_LIMIT, 1 << 63, BASE + 4])
async def wrong_address(dut, address):
    """A program at an address that is not aligned, or too high, is refused, and everything that comes after it."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    before, after = _short(driver, 4, salt=3), _short(driver, 4)
    after.store()
    assert address % PROGRAM_ALIGNMENT or address >= ADDRESS_LIMIT
    await before.push()
    await driver.start_program(address, 4)
    for made in after.descriptors:
        await driver.push(made.to_words())
    await driver.start_program(after.address, 4)
    await driver.failed(ErrorCode.PROGRAM, 0)
    await _stopped(driver, before, 4)
    assert not await driver.field("status", "fetching") and not await driver.field("status", "running")
    await _exact(driver)


@cocotb.test()
async def interrupts(dut):
    """An error in a program raises the interrupt once, and the descriptors that request it do so one by one."""
    driver = await AcceleratorDriver.create(dut, base=BASE)
    program = _short(driver, 4, interrupt=1)
    program.descriptors[3] = replace(program.descriptors[3], opcode=Opcode.VECTOR + 1)
    program.store()
    await driver.set("interrupt_enable", 3)
    await program.start()
    await until(dut.clk, lambda: read(dut.irq) == 1, "the interrupt", 20_000)
    await driver.calm()
    assert await driver.get("interrupt_pending") == 3
    await driver.set("interrupt_pending", 3)
    await cycle(dut.clk, 3)
    assert read(dut.irq) == 0
    await _stopped(driver, program, 3)
    await _exact(driver)
