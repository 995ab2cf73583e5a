// SPDX-License-Identifier: Apache-2.0
// Drives the verilated core: feeds its input streams from memory, collects its results, counts cycles.
//
// One call runs a whole batch of layers, so that the caller's language costs nothing per cycle. Every stream is an
// array of transfers, each a whole number of 32-bit words, lowest first, as Verilator keeps wide ports.

#include <cstdint>
#include <cstring>

#include "Vgristmill_core.h"
#include "Vgristmill_core___024root.h"
#include "verilated.h"

namespace {

constexpr int STREAMS = 4;
enum Stream { COMMAND, WEIGHTS, ACTIVATIONS, RESULTS };

// Set and get ports of any width by 32-bit words.
template <typename T>
void set_port(T& port, const uint32_t* words) {
    if (sizeof(T) > 4) {
        port = static_cast<T>(words[0] | (static_cast<uint64_t>(words[1]) << 32));
    } else {
        port = static_cast<T>(words[0]);
    }
}
template <std::size_t N>
void set_port(VlWide<N>& port, const uint32_t* words) {
    std::memcpy(port.data(), words, 4 * N);
}
template <typename T>
void get_port(const T& port, uint32_t* words) {
    words[0] = static_cast<uint32_t>(port);
    if (sizeof(T) > 4) words[1] = static_cast<uint32_t>(static_cast<uint64_t>(port) >> 32);
}
template <std::size_t N>
void get_port(const VlWide<N>& port, uint32_t* words) {
    std::memcpy(words, port.data(), 4 * N);
}

}  // namespace

extern "C" {

// A run of transfers. Input streams read `data`; results are written to it.
struct gm_segment {
    uint32_t* data;
    uint64_t transfers;
};

struct gm_batch {
    const gm_segment* segments[STREAMS];  // by stream: command, weights, activations, results
    uint64_t segment_count[STREAMS];
    uint32_t words[STREAMS];   // 32-bit words per transfer
    uint32_t stall[STREAMS];   // of 65,536 cycles, how many at random the stream pauses for
    uint64_t seed;
    uint64_t patience;         // cycles without any transfer after which the batch is given up
    uint64_t* finished;        // per result segment: cycles from the start of the batch to its last transfer
    // Filled in:
    uint64_t cycles;
    uint64_t transfers[STREAMS];
    uint64_t waited[STREAMS];  // cycles: input offered and not taken; for results: ready and nothing there
    uint32_t underrun;
};

struct gm_device {
    VerilatedContext context;
    Vgristmill_core model{&context};
    uint64_t random = 0;
};

// One rising edge. Nothing in the design happens at a falling one, so instead of evaluating it, which would compute
// everything that hangs on the inputs a second time, Verilator's memory of the clock is set to low.
static void clock_cycle(gm_device* device) {
    device->model.clk = 1;
    device->model.eval();
    device->model.rootp->__Vtrigprevexpr___TOP__clk__0 = 0;
}

void gm_reset(gm_device* device) {
    auto& model = device->model;
    model.command_valid = model.weights_valid = model.activations_valid = model.results_ready = 0;
    model.rst = 1;
    for (int i = 0; i < 4; ++i) clock_cycle(device);
    model.rst = 0;
}

gm_device* gm_open() {
    auto* device = new gm_device;
    device->model.clk = 0;
    gm_reset(device);
    return device;
}

void gm_close(gm_device* device) {
    device->model.final();
    delete device;
}

}  // extern "C"

namespace {

// Where a stream stands in its segments.
struct Cursor {
    const gm_segment* segment;
    const gm_segment* end;
    uint64_t place = 0;
    uint32_t words;
    uint32_t stall;
    bool offered = false;

    Cursor(const gm_batch& batch, int stream)
        : segment(batch.segments[stream]),
          end(segment + batch.segment_count[stream]),
          words(batch.words[stream]),
          stall(batch.stall[stream]) {
        skip_empty();
    }
    void skip_empty() {
        while (segment != end && place == segment->transfers) ++segment, place = 0;
    }
    bool done() const { return segment == end; }
    uint32_t* data() const { return segment->data + place * words; }
    void advance() { ++place, skip_empty(); }
};

uint32_t next_random(uint64_t& state) {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545F4914F6CDD1DULL) >> 48);
}

bool wants(Cursor& cursor, uint64_t& random) {
    if (cursor.done()) return false;
    return !cursor.stall || next_random(random) >= cursor.stall;
}

// Offers the next transfer of an input stream. What is offered stays until it is taken, as the protocol demands.
template <typename Payload>
void offer(Cursor& cursor, uint64_t& random, Payload& payload, CData& valid) {
    if (cursor.offered) return;
    cursor.offered = wants(cursor, random);
    valid = cursor.offered;
    if (cursor.offered) set_port(payload, cursor.data());
}

bool take(Cursor& cursor, gm_batch* batch, int stream, bool ready) {
    if (!cursor.offered) return false;
    if (!ready) {
        ++batch->waited[stream];
        return false;
    }
    ++batch->transfers[stream];
    cursor.offered = false;
    cursor.advance();
    return true;
}

}  // namespace

extern "C" {

// Runs a batch to its last result. Returns 0, or 1 if nothing moved for `patience` cycles.
int gm_run(gm_device* device, gm_batch* batch) {
    auto& model = device->model;
    auto& random = device->random;
    random = batch->seed * 0x9E3779B97F4A7C15ULL + 0x2545F4914F6CDD1DULL;
    if (!random) random = 1;
    Cursor command(*batch, COMMAND), weights(*batch, WEIGHTS), activations(*batch, ACTIVATIONS), results(*batch, RESULTS);
    uint64_t quiet = 0, finished = 0;
    batch->cycles = 0;
    std::memset(batch->transfers, 0, sizeof batch->transfers);
    std::memset(batch->waited, 0, sizeof batch->waited);

    while (!results.done()) {
        offer(command, random, model.command_payload, model.command_valid);
        offer(weights, random, model.weights_payload, model.weights_valid);
        offer(activations, random, model.activations_payload, model.activations_valid);
        model.results_ready = wants(results, random);
        // The core's outputs depend on its registers alone, so they need no evaluation between input and clock edge.
        const bool took_result = model.results_ready && model.results_valid;
        if (took_result) {
            get_port(model.results_payload, results.data());
            ++batch->transfers[RESULTS];
        } else if (model.results_ready) {
            ++batch->waited[RESULTS];
        }
        bool moved = took_result;
        moved |= take(command, batch, COMMAND, model.command_ready);
        moved |= take(weights, batch, WEIGHTS, model.weights_ready);
        moved |= take(activations, batch, ACTIVATIONS, model.activations_ready);

        clock_cycle(device);
        ++batch->cycles;
        if (took_result) {
            const gm_segment* before = results.segment;
            results.advance();
            if (results.segment != before) batch->finished[finished++] = batch->cycles;
        }
        quiet = moved ? 0 : quiet + 1;
        if (quiet > batch->patience) return 1;
    }
    model.command_valid = model.weights_valid = model.activations_valid = model.results_ready = 0;
    batch->underrun = model.underrun;
    return 0;
}

// Clocks the core without input or output, to time the simulation alone.
void gm_idle(gm_device* device, uint64_t cycles) {
    for (uint64_t i = 0; i < cycles; ++i) clock_cycle(device);
}

}  // extern "C"
