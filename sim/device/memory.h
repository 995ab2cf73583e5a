// SPDX-License-Identifier: Apache-2.0
// The memory behind the accelerator's AXI ports: the caller's buffers at physical addresses, answered when a timing
// model says so, and made to fail on request.
//
// In each fabric cycle: ask what is offered, take what moves, then step(). Addresses and beats must keep to AXI's
// rules, which protocol.h checks.

#ifndef GRISTMILL_MEMORY_H
#define GRISTMILL_MEMORY_H

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "memory_timing.h"

namespace gristmill {

constexpr uint32_t MAX_PORT_BYTES = 16;
// Of hw.spec: sim.device.build passes them on.
constexpr uint64_t ADDRESS_END = uint64_t{1} << GM_ADDRESS_BITS;
constexpr uint32_t BURST_BOUNDARY = GM_BURST_BOUNDARY;  // bytes; no burst crosses a multiple of it
constexpr uint32_t MAX_BURST_BEATS = GM_MAX_BURST_BEATS;

enum Response : uint8_t { OKAY = 0, SLVERR = 2, DECERR = 3 };

// hw.spec.memory.faults says what each one is.
enum FaultKind {
    NO_FAULT = GM_FAULT_NONE,
    READ_ERROR = GM_FAULT_READ_ERROR,
    WRITE_ERROR = GM_FAULT_WRITE_ERROR,
    READ_SILENT = GM_FAULT_READ_SILENT,
    WRITE_SILENT = GM_FAULT_WRITE_SILENT,
    READ_BLOCKED = GM_FAULT_READ_BLOCKED,
    WRITE_BLOCKED = GM_FAULT_WRITE_BLOCKED,
};

struct Statistics {
    uint64_t read_bytes, write_bytes;    // written are those with their strobe set
    uint64_t read_bursts, write_bursts;  // addresses taken
    uint64_t refreshes, row_misses;
    uint64_t port_read_beats[MAX_PORTS];
    uint64_t shortest_write_burst, longest_write_burst;  // bytes; 0 while there was none
};

// Which of the caller's bytes are at a physical address.
class AddressSpace {
  public:
    bool map(uint64_t address, uint64_t size, void* bytes);  // false: overlaps, empty, or ends beyond 2^40
    bool unmap(uint64_t address);                            // false: no mapping starts there

    // The caller's memory for a range, or null if it is not all in one mapping. Each reader (port) and the writer
    // nearly always want the mapping that they had before, so it is kept for each of them.
    uint8_t* find(uint32_t user, uint64_t address, uint64_t size) {
        const Mapping& last = last_[user];
        const uint64_t offset = address - last.address;
        if (offset < last.size && size <= last.size - offset) return last.bytes + offset;
        return search(user, address, size);
    }

  private:
    struct Mapping {
        uint64_t address, size;
        uint8_t* bytes;
    };
    uint8_t* search(uint32_t user, uint64_t address, uint64_t size);

    std::vector<Mapping> mappings_;  // by address
    Mapping last_[MAX_PORTS + 1] = {};
};

struct ReadBeat {
    const uint8_t* bytes;  // of the port's width; they live until the next beat is asked for
    Response response;
    bool last;
};

class Memory {
  public:
    Memory(std::unique_ptr<Timing> timing, uint32_t ports, uint32_t port_bytes)
        : timing_(std::move(timing)), ports_(ports), port_bytes_(port_bytes) {}

    AddressSpace space;

    void reset();  // everything but the mappings: bursts, faults and statistics
    void fault(int kind, uint64_t address, uint64_t size);
    Statistics statistics() const;

    // What is offered in this cycle.
    bool read_ready(uint32_t port) const {
        return timing_->offers.read_ready[port] && !reads_[port].full() && !reads_refused_;
    }
    bool read_valid(uint32_t port) const { return timing_->offers.read_valid[port] && !reads_[port].front().silent; }
    ReadBeat read_beat(uint32_t port) {
        const Burst& burst = reads_[port].front();
        const uint8_t* bytes = space.find(port, burst.address, port_bytes_);
        return bytes ? ReadBeat{bytes, burst.response, burst.beats == 1} : piece(port);
    }
    bool write_ready() const {
        return timing_->offers.write_ready && writes_.size() + answers_.size() < MAX_BURSTS && !writes_refused_;
    }
    // W is only taken once its AW has been, be it in the same cycle.
    bool data_ready() const { return timing_->offers.data_ready && !writes_.empty() && !writes_refused_; }
    bool acknowledge_valid() const { return timing_->offers.acknowledge_valid && !answers_.front().silent; }
    Response acknowledge_response() const { return answers_.front().response; }

    // What moves in this cycle. Addresses are taken before beats.
    void take_read_address(uint32_t port, uint64_t address, uint32_t beats);
    void take_read_beat(uint32_t port) {
        Burst& burst = reads_[port].front();
        burst.address += port_bytes_;
        if (!--burst.beats) reads_[port].pop();
        timing_->read_beat(port);
        ++statistics_.port_read_beats[port];
    }
    void take_write_address(uint64_t address, uint32_t beats);
    void take_write_beat(const uint8_t* bytes, uint32_t strobes);
    void take_acknowledge();

    void step() { timing_->step(); }

  private:
    struct Burst {
        uint64_t address;  // of the next beat
        uint32_t beats;    // still to come
        uint32_t bytes;    // written so far
        Response response;
        bool silent;
    };
    struct Fault {
        FaultKind kind;
        uint64_t address, size;
    };
    Burst burst(uint64_t address, uint32_t beats, FaultKind error, FaultKind silence) const;
    bool faulty(FaultKind kind, uint64_t address, uint64_t bytes) const;
    ReadBeat piece(uint32_t port);
    bool copy(uint64_t address, const uint8_t* bytes, uint32_t strobes);

    std::unique_ptr<Timing> timing_;
    const uint32_t ports_, port_bytes_;
    Ring<Burst, MAX_BURSTS> reads_[MAX_PORTS], writes_, answers_;
    std::vector<Fault> faults_;
    bool reads_refused_ = false, writes_refused_ = false;
    uint8_t pieces_[MAX_PORTS][MAX_PORT_BYTES] = {};  // beats that are not in one mapping
    Statistics statistics_ = {};
};

// Bytes per cycle that a preset gives to `ports` endless contiguous read streams; negative if the arguments are wrong.
double stream_limit(const char* preset, uint32_t ports, uint32_t port_bytes, uint64_t cycles, uint64_t seed);

}  // namespace gristmill

#endif
