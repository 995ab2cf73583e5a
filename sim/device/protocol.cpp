// SPDX-License-Identifier: Apache-2.0
#include "protocol.h"

#include <cstdarg>
#include <cstdio>

namespace gristmill {
namespace {

constexpr uint8_t INCR = 1;

std::string text(const Address& address) {
    char buffer[120];
    std::snprintf(buffer, sizeof buffer, "{addr 0x%llx, len %u, size %u, burst %u, cache %u, prot %u, id %u}",
                  static_cast<unsigned long long>(address.address), address.length, address.size, address.burst,
                  address.cache, address.prot, address.id);
    return buffer;
}

}  // namespace

void Protocol::reset() {
    problem_.clear();
    for (auto& channel : read_address_) channel.waiting = false;
    write_address_.waiting = write_data_.waiting = false;
    promised_.clear();
    for (auto& wait : read_wait_) wait = 0;
    acknowledge_wait_ = 0;
}

void Protocol::report(const char* format, ...) {
    if (broken()) return;
    char buffer[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    problem_ = "cycle " + std::to_string(cycle_) + ": " + buffer;
}

void Protocol::check(const char* name, uint32_t port, AddressChannel& channel, bool valid, bool ready,
                     const Address& address) {
    if (!valid) {
        if (!channel.waiting) return;
        report("port %u: %sVALID fell before %s was taken", port, name, text(channel.shown).c_str());
    } else if (!channel.waiting) {
        check_burst(name, port, address);
    } else if (!(address == channel.shown)) {
        report("port %u: %s changed from %s to %s before it was taken", port, name, text(channel.shown).c_str(),
               text(address).c_str());
    }
    channel.waiting = valid && !ready;
    if (channel.waiting) channel.shown = address;
}

void Protocol::check_burst(const char* name, uint32_t port, const Address& address) {
    const uint64_t bytes = uint64_t{address.beats()} * port_bytes_;
    const char* rule = nullptr;
    if (address.burst != INCR) {
        rule = "is not an INCR burst";
    } else if (uint32_t{1} << address.size != port_bytes_) {
        rule = "has beats of another size than the port's";
    } else if (address.id) {
        rule = "has another ID than 0";
    } else if (address.address % port_bytes_) {
        rule = "is not aligned to its beats";
    } else if (address.beats() > 256) {
        rule = "has more than 256 beats";
    } else if (address.address % BURST_BOUNDARY + bytes > BURST_BOUNDARY) {
        rule = "crosses a 4 KiB boundary";
    } else if (address.address + bytes > ADDRESS_END) {
        rule = "ends beyond 40 bits of address";
    }
    if (rule) report("port %u: %s %s %s", port, name, text(address).c_str(), rule);
}

void Protocol::write_address(bool valid, bool ready, const Address& address) {
    check("AW", 0, write_address_, valid, ready, address);
    // The memory does not take more bursts than the ring holds.
    if (valid && ready) promised_.push(address.beats());
}

void Protocol::write_data(bool valid, bool ready, const uint8_t* bytes, uint32_t strobes, bool last) {
    DataChannel& shown = write_data_;
    if (!valid) {
        if (shown.waiting) report("port 0: WVALID fell before its beat was taken");
        shown.waiting = false;
        return;
    }
    // A beat may have any strobes: appends to a KV cache write single bytes.
    if (shown.waiting && (strobes != shown.strobes || last != shown.last || std::memcmp(bytes, shown.bytes, port_bytes_))) {
        report("port 0: W changed before it was taken (strobes 0x%x to 0x%x, last %u to %u)", shown.strobes, strobes,
               shown.last, last);
    }
    // An address that is valid but not yet taken counts: it cannot be withdrawn any more.
    if (promised_.empty() && !write_address_.waiting) {
        report("port 0: W without its AW (strobes 0x%x, last %u)", strobes, last);
    }
    shown.waiting = !ready;
    if (shown.waiting) {
        shown.strobes = strobes;
        shown.last = last;
        std::memcpy(shown.bytes, bytes, port_bytes_);
        return;
    }
    if (promised_.empty()) return;
    uint32_t& left = promised_.front();
    if (last != (left == 1)) report("port 0: WLAST is %u with %u beats of the burst to come", last, left);
    if (!--left) promised_.pop();
}

}  // namespace gristmill
