// SPDX-License-Identifier: Apache-2.0
// Drives the verilated accelerator: register accesses drive its control port, the memory model drives its memory ports.
//
// The caller does not call the library in every cycle. It maps its buffers, writes registers and lets the hardware run
// until its interrupt. GM_PORTS is the number of memory ports; their width is that of the verilated ports.

#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <type_traits>

#include "Vgristmill_accelerator.h"
#include "Vgristmill_accelerator___024root.h"
#include "memory.h"
#include "protocol.h"
#include "verilated.h"

void Vgristmill_accelerator___024root___eval_ico(Vgristmill_accelerator___024root*);
void Vgristmill_accelerator___024root___eval_nba(Vgristmill_accelerator___024root*);

#ifndef GM_PORTS
#error "GM_PORTS is the number of memory ports: 1, 2 or 4"
#endif

namespace {

using namespace gristmill;
using Model = Vgristmill_accelerator;

using ReadData = std::remove_reference_t<decltype(Model::m_axi_hp0_rdata)>;  // IData, QData or words of a VlWide

constexpr uint32_t PORT_BYTES = sizeof(ReadData);
constexpr uint32_t WINDOW_BYTES = GM_WINDOW_BYTES;  // size of the control port's address space
constexpr uint32_t CONTROL_PATIENCE = 10000;  // cycles
constexpr int NO_ANSWER = -1, VIOLATION = -2;

// All integers in Verilator are little-endian, and a wide port's lowest word is first. So the bytes have the same order
// as in memory.
static_assert(PORT_BYTES <= MAX_PORT_BYTES && GM_PORTS <= MAX_PORTS, "the memory model is too small for these ports");

struct AddressPins {
    CData *id, *length, *size, *burst, *cache, *prot, *valid, *ready;
    QData* address;

    Address get() const { return {*address, *length, *id, *size, *burst, *cache, *prot}; }
};
#define GM_ADDRESS_PINS(model, prefix)                                                                        \
    AddressPins {                                                                                             \
        &(model).prefix##id, &(model).prefix##len, &(model).prefix##size, &(model).prefix##burst,             \
            &(model).prefix##cache, &(model).prefix##prot, &(model).prefix##valid, &(model).prefix##ready,    \
            &(model).prefix##addr                                                                             \
    }

struct ReadPins {
    AddressPins address;
    CData *id, *response, *last, *valid, *ready;
    ReadData* data;
};
#define GM_READ_PINS(model, port)                                                                             \
    ReadPins {                                                                                                \
        GM_ADDRESS_PINS(model, port##_ar), &(model).port##_rid, &(model).port##_rresp, &(model).port##_rlast, \
            &(model).port##_rvalid, &(model).port##_rready, &(model).port##_rdata                             \
    }

}  // namespace

extern "C" {

struct gm_device {
    gm_device(std::unique_ptr<Timing> timing, bool hostile, uint64_t seed)
        : memory(std::move(timing), GM_PORTS, PORT_BYTES), hostile(hostile), seed(seed) {}

    VerilatedContext context;
    Model model{&context};
    Memory memory;
    Protocol protocol{PORT_BYTES};
    const bool hostile;  // then control accesses are delayed, too
    const uint64_t seed;
    Random random;
    uint64_t cycles = 0;
    const ReadPins reads[GM_PORTS] = {
        GM_READ_PINS(model, m_axi_hp0),
#if GM_PORTS > 1
        GM_READ_PINS(model, m_axi_hp1),
#endif
#if GM_PORTS > 2
        GM_READ_PINS(model, m_axi_hp2),
        GM_READ_PINS(model, m_axi_hp3),
#endif
    };
    const AddressPins write_address = GM_ADDRESS_PINS(model, m_axi_hp0_aw);
};

}  // extern "C"

namespace {

// The outputs depend only on registers, so they show the cycle before the edge. Therefore the inputs that answer them
// can be set now, for the same edge.

void read_channels(gm_device* device, uint32_t port) {
    const ReadPins& pins = device->reads[port];
    Memory& memory = device->memory;
    Protocol& protocol = device->protocol;
    // The beat comes first: a burst is not answered in the cycle of its request.
    const bool valid = memory.read_valid(port);
    *pins.valid = valid;
    protocol.read_data(port, valid, *pins.ready);
    if (valid) {
        const ReadBeat beat = memory.read_beat(port);
        std::memcpy(pins.data, beat.bytes, PORT_BYTES);
        *pins.response = beat.response;
        *pins.last = beat.last;
        if (*pins.ready) memory.take_read_beat(port);
    }
    const bool ready = memory.read_ready(port);
    *pins.address.ready = ready;
    if (protocol.read_address_idle(port, *pins.address.valid)) return;
    const Address address = pins.address.get();
    protocol.read_address(port, *pins.address.valid, ready, address);
    if (*pins.address.valid && ready) memory.take_read_address(port, address.address, address.beats());
}

void write_channels(gm_device* device) {
    Model& model = device->model;
    Memory& memory = device->memory;
    Protocol& protocol = device->protocol;
    const bool acknowledged = memory.acknowledge_valid();
    model.m_axi_hp0_bvalid = acknowledged;
    protocol.acknowledge(acknowledged, model.m_axi_hp0_bready);
    if (acknowledged) {
        model.m_axi_hp0_bresp = memory.acknowledge_response();
        if (model.m_axi_hp0_bready) memory.take_acknowledge();
    }
    const bool ready = memory.write_ready();
    model.m_axi_hp0_awready = ready;
    if (!protocol.write_address_idle(model.m_axi_hp0_awvalid)) {
        const Address address = device->write_address.get();
        protocol.write_address(model.m_axi_hp0_awvalid, ready, address);
        if (model.m_axi_hp0_awvalid && ready) memory.take_write_address(address.address, address.beats());
    }
    const bool data_ready = memory.data_ready();
    model.m_axi_hp0_wready = data_ready;
    const auto* bytes = reinterpret_cast<const uint8_t*>(&model.m_axi_hp0_wdata);
    protocol.write_data(model.m_axi_hp0_wvalid, data_ready, bytes, model.m_axi_hp0_wstrb, model.m_axi_hp0_wlast);
    // A beat that breaks a rule never reaches the memory.
    const bool taken = model.m_axi_hp0_wvalid && data_ready && !protocol.broken();
    if (taken) memory.take_write_beat(bytes, model.m_axi_hp0_wstrb);
}

// The clocks that have an edge, as Verilator's set of triggers: `clk`, and the clocks of the blocks that have work.
uint64_t triggers([[maybe_unused]] const Model& model) {
    uint64_t set = uint64_t(1) << GM_CLOCK_TRIGGER;
#ifdef GM_GATE_TRIGGERS
    constexpr uint32_t gates[] = {GM_GATE_TRIGGERS};
    static_assert(std::size(gates) <= 8 * sizeof(model.clocks_needed), "Verilator holds the port in several words");
    for (uint32_t index = 0; index < std::size(gates); ++index)
        set |= uint64_t(model.clocks_needed >> index & 1) << gates[index];
#endif
    return set;
}

// One rising edge. Verilator's scheduler would look for changes and evaluate the falling edge too. The edges of all
// clocks come together, and no logic is at a falling edge, so we bypass the scheduler and call its two evaluation
// functions directly: one for the logic that depends on the inputs, one for the logic at the clocks' edges.
void clock_edge(gm_device* device) {
    auto* root = device->model.rootp;
    root->__VicoTriggered[0] = 1;
    Vgristmill_accelerator___024root___eval_ico(root);
    root->__VnbaTriggered[0] = triggers(device->model);
    Vgristmill_accelerator___024root___eval_nba(root);
    ++device->cycles;
}

// Runs one cycle. Returns false if a rule is broken, now or in an earlier cycle.
bool cycle(gm_device* device) {
    if (device->protocol.broken()) return false;
    for (uint32_t port = 0; port < GM_PORTS; ++port) read_channels(device, port);
    write_channels(device);
    clock_edge(device);
    device->memory.step();
    device->protocol.step();
    return !device->protocol.broken();
}

// This side of a channel of the control port: valid, or ready, after a delay.
struct ControlChannel {
    uint32_t delay;
    bool done = false;

    explicit ControlChannel(gm_device* device) : delay(device->hostile ? device->random.between(0, 7) : 0) {}
    bool active() { return !done && (!delay || !--delay); }
};

void release_control(Model& model) {
    model.s_axi_ctrl_awvalid = model.s_axi_ctrl_wvalid = model.s_axi_ctrl_bready = 0;
    model.s_axi_ctrl_arvalid = model.s_axi_ctrl_rready = 0;
}

// One control access: runs cycles until its response is taken. `shake` drives the channels for one cycle. It returns
// the response if the response is taken in that cycle, else -1.
template <typename Shake>
int access(gm_device* device, Shake shake) {
    Model& model = device->model;
    for (uint32_t i = 0; i < CONTROL_PATIENCE; ++i) {
        const int response = shake();
        if (!cycle(device)) return release_control(model), VIOLATION;
        if (response >= 0) return release_control(model), response;
    }
    // A withdrawn request breaks the protocol: a device that does not answer needs a gm_reset.
    return release_control(model), NO_ANSWER;
}

}  // namespace

extern "C" {

struct gm_statistics_t {
    uint64_t read_bytes, write_bytes, read_bursts, write_bursts, refreshes, row_misses, port_read_beats[MAX_PORTS];
    uint64_t shortest_write_burst, longest_write_burst;
};

// Power-on reset of the hardware and the memory model, including faults and statistics. The mappings stay.
void gm_reset(gm_device* device) {
    Model& model = device->model;
    device->memory.reset();
    device->protocol.reset();
    device->random = Random(device->seed);
    release_control(model);
    for (const ReadPins& pins : device->reads) *pins.valid = *pins.address.ready = *pins.id = 0;
    model.m_axi_hp0_bvalid = model.m_axi_hp0_awready = model.m_axi_hp0_wready = model.m_axi_hp0_bid = 0;
    model.rst = 1;
    for (int i = 0; i < 4; ++i) clock_edge(device), device->protocol.step();
    model.rst = 0;
}

// Null if there is no such preset.
gm_device* gm_open(const char* preset, uint64_t seed) {
    auto timing = make_timing(preset, GM_PORTS, PORT_BYTES, seed);
    if (!timing) return nullptr;
    auto* device = new gm_device(std::move(timing), !std::strcmp(preset, "hostile"), seed);
    device->model.clk = 0;
    device->model.eval();
    gm_reset(device);
    return device;
}

void gm_close(gm_device* device) {
    device->model.final();
    delete device;
}

// Maps memory of the caller to a physical address. Returns 0, or 1 if it overlaps another mapping or ends beyond 2^40.
int gm_map(gm_device* device, uint64_t address, uint64_t size, void* bytes) {
    return !device->memory.space.map(address, size, bytes);
}

// Returns 0, or 1 if no mapping starts there.
int gm_unmap(gm_device* device, uint64_t address) { return !device->memory.space.unmap(address); }

// Returns BRESP, -1 if there is no answer within 10,000 cycles, or -2 if a rule is broken.
int gm_write_register(gm_device* device, uint32_t offset, uint32_t value) {
    if (offset >= WINDOW_BYTES) return DECERR;  // as an interconnect does
    Model& model = device->model;
    ControlChannel address(device), data(device), response(device);
    model.s_axi_ctrl_awaddr = offset;
    model.s_axi_ctrl_awprot = 0;
    model.s_axi_ctrl_wdata = value;
    model.s_axi_ctrl_wstrb = 15;
    return access(device, [&] {
        model.s_axi_ctrl_awvalid = address.active();
        model.s_axi_ctrl_wvalid = data.active();
        model.s_axi_ctrl_bready = response.active();
        const bool asked = address.done && data.done;
        if (model.s_axi_ctrl_bvalid && !asked) device->protocol.report("control port: B before its AW and W");
        address.done |= model.s_axi_ctrl_awvalid && model.s_axi_ctrl_awready;
        data.done |= model.s_axi_ctrl_wvalid && model.s_axi_ctrl_wready;
        return model.s_axi_ctrl_bready && model.s_axi_ctrl_bvalid ? model.s_axi_ctrl_bresp : -1;
    });
}

// Writes `offsets_and_values`, pair by pair, until a write fails. `index` becomes the index of the pair that failed, or
// `count`. Returns the result of the last gm_write_register.
int gm_write_registers(gm_device* device, const uint32_t* offsets_and_values, uint32_t count, uint32_t* index) {
    int status = 0;
    for (*index = 0; *index < count; ++*index) {
        status = gm_write_register(device, offsets_and_values[2 * *index], offsets_and_values[2 * *index + 1]);
        if (status) break;
    }
    return status;
}

// Returns RRESP, or -1 or -2 like gm_write_register.
int gm_read_register(gm_device* device, uint32_t offset, uint32_t* value) {
    if (offset >= WINDOW_BYTES) return DECERR;
    Model& model = device->model;
    ControlChannel address(device), response(device);
    model.s_axi_ctrl_araddr = offset;
    model.s_axi_ctrl_arprot = 0;
    return access(device, [&] {
        model.s_axi_ctrl_arvalid = address.active();
        model.s_axi_ctrl_rready = response.active();
        if (model.s_axi_ctrl_rvalid && !address.done) device->protocol.report("control port: R before its AR");
        address.done |= model.s_axi_ctrl_arvalid && model.s_axi_ctrl_arready;
        if (!model.s_axi_ctrl_rready || !model.s_axi_ctrl_rvalid) return -1;
        *value = model.s_axi_ctrl_rdata;
        return static_cast<int>(model.s_axi_ctrl_rresp);
    });
}

// Runs until the interrupt is high. Returns 1 if it is, 0 after `cycles` cycles, -2 if a rule is broken.
int gm_run(gm_device* device, uint64_t cycles) {
    if (device->protocol.broken()) return VIOLATION;
    for (uint64_t i = 0; i < cycles && !device->model.irq; ++i) {
        if (!cycle(device)) return VIOLATION;
    }
    return device->model.irq;
}

// The first rule that the hardware broke, in one line, or "". Only gm_reset clears it.
const char* gm_problem(gm_device* device) { return device->protocol.problem().c_str(); }

// Cycles since gm_open, including resets.
uint64_t gm_cycles(gm_device* device) { return device->cycles; }

// Makes the memory fail: see FaultKind in memory.h.
void gm_fault(gm_device* device, int kind, uint64_t address, uint64_t size) {
    device->memory.fault(kind, address, size);
}

// Statistics since the last reset.
void gm_statistics(gm_device* device, gm_statistics_t* statistics) {
    static_assert(sizeof(gm_statistics_t) == sizeof(Statistics), "the same fields in the same order");
    const Statistics now = device->memory.statistics();
    std::memcpy(statistics, &now, sizeof now);
}

}  // extern "C"
