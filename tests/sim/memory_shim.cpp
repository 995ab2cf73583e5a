// SPDX-License-Identifier: Apache-2.0
// A C interface for ctypes to the memory model and the protocol checks: a manager that runs a list of bursts.

#include <deque>
#include <vector>

#include "protocol.h"

using namespace gristmill;

extern "C" {

enum Event { AR, R, AW, W, B };

struct event {
    uint64_t cycle;
    uint32_t kind, port, response, last;
};

struct job {
    uint64_t address;
    uint32_t beats, strobes;  // of the last beat; all strobes are set in the others
    const uint8_t* bytes;
};

struct shim {
    shim(std::unique_ptr<Timing> timing, uint32_t ports, uint32_t port_bytes)
        : memory(std::move(timing), ports, port_bytes), ports(ports), port_bytes(port_bytes) {}
    Memory memory;
    const uint32_t ports, port_bytes;
    uint64_t cycle = 0;
    std::deque<job> reads[MAX_PORTS], addresses, data;
    uint32_t written = 0;                 // beats of the first entry of data
    uint32_t under_way[MAX_PORTS] = {};   // read bursts
    std::vector<uint8_t> got[MAX_PORTS];  // bytes read
    std::vector<event> events;
};

shim* shim_open(const char* preset, uint64_t seed, uint32_t ports, uint32_t port_bytes) {
    auto timing = make_timing(preset, ports, port_bytes, seed);
    return timing ? new shim(std::move(timing), ports, port_bytes) : nullptr;
}
void shim_close(shim* s) { delete s; }
int shim_map(shim* s, uint64_t address, uint64_t size, void* bytes) {
    return !s->memory.space.map(address, size, bytes);
}
int shim_unmap(shim* s, uint64_t address) { return !s->memory.space.unmap(address); }
void shim_fault(shim* s, int kind, uint64_t address, uint64_t size) { s->memory.fault(kind, address, size); }
void shim_statistics(shim* s, Statistics* statistics) { *statistics = s->memory.statistics(); }
void shim_read(shim* s, uint32_t port, uint64_t address, uint32_t beats) {
    s->reads[port].push_back({address, beats, 0, nullptr});
}
void shim_write(shim* s, uint64_t address, uint32_t beats, const uint8_t* bytes, uint32_t strobes) {
    s->addresses.push_back({address, beats, strobes, bytes});
    s->data.push_back(s->addresses.back());
}

// Ready on R and B in all cycles; offers everything that is queued, with up to 8 outstanding read bursts per port.
void shim_run(shim* s, uint64_t cycles) {
    Memory& memory = s->memory;
    const auto log = [s](Event kind, uint32_t port, uint32_t response, bool last) {
        s->events.push_back({s->cycle, kind, port, response, last});
    };
    for (uint64_t end = s->cycle + cycles; s->cycle < end; ++s->cycle) {
        for (uint32_t port = 0; port < s->ports; ++port) {
            if (memory.read_valid(port)) {
                const ReadBeat beat = memory.read_beat(port);
                s->got[port].insert(s->got[port].end(), beat.bytes, beat.bytes + s->port_bytes);
                log(R, port, beat.response, beat.last);
                s->under_way[port] -= beat.last;
                memory.take_read_beat(port);
            }
            if (!s->reads[port].empty() && s->under_way[port] < 8 && memory.read_ready(port)) {
                memory.take_read_address(port, s->reads[port].front().address, s->reads[port].front().beats);
                s->reads[port].pop_front();
                ++s->under_way[port];
                log(AR, port, 0, false);
            }
        }
        if (memory.acknowledge_valid()) {
            log(B, 0, memory.acknowledge_response(), true);
            memory.take_acknowledge();
        }
        if (!s->addresses.empty() && memory.write_ready()) {
            memory.take_write_address(s->addresses.front().address, s->addresses.front().beats);
            s->addresses.pop_front();
            log(AW, 0, 0, false);
        }
        if (!s->data.empty() && memory.data_ready()) {
            const job& job = s->data.front();
            const bool last = s->written + 1 == job.beats;
            const uint32_t strobes = last ? job.strobes : (1u << s->port_bytes) - 1;
            memory.take_write_beat(job.bytes + s->written * s->port_bytes, strobes);
            log(W, 0, 0, last);
            if (++s->written == job.beats) s->written = 0, s->data.pop_front();
        }
        memory.step();
    }
}

uint64_t shim_events(shim* s, const event** events) { return *events = s->events.data(), s->events.size(); }
uint64_t shim_got(shim* s, uint32_t port, const uint8_t** bytes) {
    return *bytes = s->got[port].data(), s->got[port].size();
}

Protocol* protocol_open(uint32_t port_bytes) { return new Protocol(port_bytes); }
void protocol_close(Protocol* protocol) { delete protocol; }
void protocol_ar(Protocol* protocol, bool valid, bool ready, uint64_t address, uint32_t length, uint32_t size,
                 uint32_t burst, uint32_t id) {
    protocol->read_address(0, valid, ready, {address, length, uint8_t(id), uint8_t(size), uint8_t(burst), 3, 0});
}
void protocol_aw(Protocol* protocol, bool valid, bool ready, uint64_t address, uint32_t length, uint32_t size,
                 uint32_t burst, uint32_t id) {
    protocol->write_address(valid, ready, {address, length, uint8_t(id), uint8_t(size), uint8_t(burst), 3, 0});
}
void protocol_w(Protocol* protocol, bool valid, bool ready, uint32_t byte, uint32_t strobes, bool last) {
    const std::vector<uint8_t> bytes(MAX_PORT_BYTES, uint8_t(byte));
    protocol->write_data(valid, ready, bytes.data(), strobes, last);
}
void protocol_r(Protocol* protocol, bool valid, bool ready) { protocol->read_data(0, valid, ready); }
void protocol_b(Protocol* protocol, bool valid, bool ready) { protocol->acknowledge(valid, ready); }
void protocol_step(Protocol* protocol) { protocol->step(); }
const char* protocol_problem(Protocol* protocol) { return protocol->problem().c_str(); }

}  // extern "C"
