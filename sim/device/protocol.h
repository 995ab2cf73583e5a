// SPDX-License-Identifier: Apache-2.0
// Checks in every cycle that AXI4 ports follow the rules. The rules are those of AXI4 (Arm IHI 0022), and what our
// managers promise in addition: bursts of the port's width, ID 0, no W before its AW.
//
// The checks are inline and cost almost nothing while the rules hold. The first broken rule is reported, with port,
// cycle and values; later ones are ignored.

#ifndef GRISTMILL_PROTOCOL_H
#define GRISTMILL_PROTOCOL_H

#include <cstdint>
#include <cstring>
#include <string>

#include "memory.h"

namespace gristmill {

// Payload of AR and AW.
struct Address {
    uint64_t address;
    uint32_t length;  // AxLEN: beats - 1
    uint8_t id, size, burst, cache, prot;

    uint32_t beats() const { return length + 1; }
    bool operator==(const Address& other) const {
        return address == other.address && length == other.length && id == other.id && size == other.size &&
               burst == other.burst && cache == other.cache && prot == other.prot;
    }
};

class Protocol {
  public:
    explicit Protocol(uint32_t port_bytes) : port_bytes_(port_bytes) {}

    // One call per channel and cycle, with the channel's values before the clock edge; AW before W. The caller need not
    // build the payload of a channel that is not valid and was not valid: see the `idle` functions.
    bool read_address_idle(uint32_t port, bool valid) const { return !valid && !read_address_[port].waiting; }
    bool write_address_idle(bool valid) const { return !valid && !write_address_.waiting; }
    void read_address(uint32_t port, bool valid, bool ready, const Address& address) {
        check("AR", port, read_address_[port], valid, ready, address);
    }
    void write_address(bool valid, bool ready, const Address& address);
    void write_data(bool valid, bool ready, const uint8_t* bytes, uint32_t strobes, bool last);

    // R and B must be taken at some point.
    void read_data(uint32_t port, bool valid, bool ready) { patience("R", port, read_wait_[port], valid, ready); }
    void acknowledge(bool valid, bool ready) { patience("B", 0, acknowledge_wait_, valid, ready); }

    // Steps to the next cycle.
    void step() { ++cycle_; }
    void reset();

    void report(const char* format, ...) __attribute__((format(printf, 2, 3)));
    bool broken() const { return !problem_.empty(); }
    const std::string& problem() const { return problem_; }

  private:
    struct AddressChannel {
        bool waiting = false;  // valid in the cycle before, and not taken
        Address shown = {};
    };
    struct DataChannel {
        bool waiting = false, last = false;
        uint32_t strobes = 0;
        uint8_t bytes[MAX_PORT_BYTES] = {};
    };
    void check(const char* name, uint32_t port, AddressChannel& channel, bool valid, bool ready,
               const Address& address);
    void check_burst(const char* name, uint32_t port, const Address& address);
    void patience(const char* name, uint32_t port, uint32_t& wait, bool valid, bool ready) {
        wait = valid && !ready ? wait + 1 : 0;
        if (wait == PATIENCE) report("port %u: %s was not taken for %u cycles", port, name, PATIENCE);
    }

    static constexpr uint32_t PATIENCE = 100000;  // cycles; no path of the design waits longer than a layer takes

    const uint32_t port_bytes_;
    uint64_t cycle_ = 0;
    std::string problem_;
    AddressChannel read_address_[MAX_PORTS], write_address_;
    DataChannel write_data_;
    Ring<uint32_t, MAX_BURSTS> promised_;  // remaining beats of the write bursts whose address has been taken
    uint32_t read_wait_[MAX_PORTS] = {}, acknowledge_wait_ = 0;
};

}  // namespace gristmill

#endif
