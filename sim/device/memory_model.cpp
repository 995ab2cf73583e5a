// SPDX-License-Identifier: Apache-2.0
// The memory behind the accelerator: what it answers. When, is up to the timing models.

#include "memory.h"

#include <algorithm>
#include <cstring>

namespace gristmill {

constexpr uint32_t WRITER = MAX_PORTS;  // of the address space, behind the ports' reads

bool AddressSpace::map(uint64_t address, uint64_t size, void* bytes) {
    if (!size || address >= ADDRESS_END || size > ADDRESS_END - address) return false;
    const auto next = std::find_if(mappings_.begin(), mappings_.end(), [&](auto& m) { return m.address >= address; });
    if (next != mappings_.end() && next->address - address < size) return false;
    if (next != mappings_.begin() && address - next[-1].address < next[-1].size) return false;
    mappings_.insert(next, {address, size, static_cast<uint8_t*>(bytes)});
    return true;
}

bool AddressSpace::unmap(uint64_t address) {
    const auto found = std::find_if(mappings_.begin(), mappings_.end(), [&](auto& m) { return m.address == address; });
    if (found == mappings_.end()) return false;
    mappings_.erase(found);
    for (auto& last : last_) last = {};
    return true;
}

uint8_t* AddressSpace::search(uint32_t user, uint64_t address, uint64_t size) {
    auto next = std::upper_bound(mappings_.begin(), mappings_.end(), address,
                                 [](uint64_t a, const Mapping& m) { return a < m.address; });
    if (next == mappings_.begin()) return nullptr;
    const Mapping& mapping = next[-1];
    const uint64_t offset = address - mapping.address;
    if (offset >= mapping.size || size > mapping.size - offset) return nullptr;
    last_[user] = mapping;
    return mapping.bytes + offset;
}

void Memory::reset() {
    timing_->reset();
    for (auto& reads : reads_) reads.clear();
    writes_.clear();
    answers_.clear();
    fault(NO_FAULT, 0, 0);
    statistics_ = {};
}

void Memory::fault(int kind, uint64_t address, uint64_t size) {
    switch (kind) {
        case NO_FAULT:
            faults_.clear();
            reads_refused_ = writes_refused_ = false;
            for (auto& reads : reads_) {
                for (uint32_t i = 0; i < reads.size(); ++i) reads[i].silent = false;
            }
            for (uint32_t i = 0; i < writes_.size(); ++i) writes_[i].silent = false;
            for (uint32_t i = 0; i < answers_.size(); ++i) answers_[i].silent = false;
            break;
        case READ_BLOCKED:
            reads_refused_ = true;
            break;
        case WRITE_BLOCKED:
            writes_refused_ = true;
            break;
        default:
            faults_.push_back({static_cast<FaultKind>(kind), address, size});
    }
}

bool Memory::faulty(FaultKind kind, uint64_t address, uint64_t bytes) const {
    return std::any_of(faults_.begin(), faults_.end(), [&](const Fault& fault) {
        // Two ranges meet if either starts within the other.
        return fault.kind == kind && (address - fault.address < fault.size || fault.address - address < bytes);
    });
}

// A burst's faults are those of the moment when its address is taken.
Memory::Burst Memory::burst(uint64_t address, uint32_t beats, FaultKind error, FaultKind silence) const {
    const uint64_t bytes = beats * port_bytes_;
    const Response response = faulty(error, address, bytes) ? SLVERR : OKAY;
    return {address, beats, 0, response, faulty(silence, address, bytes)};
}

void Memory::take_read_address(uint32_t port, uint64_t address, uint32_t beats) {
    reads_[port].push(burst(address, beats, READ_ERROR, READ_SILENT));
    timing_->read_burst(port, address, beats);
    ++statistics_.read_bursts;
}

// A beat that is not in one mapping: mappings may meet within it, and what none of them holds reads as 0.
ReadBeat Memory::piece(uint32_t port) {
    const Burst& burst = reads_[port].front();
    bool whole = true;
    for (uint32_t i = 0; i < port_bytes_; ++i) {
        const uint8_t* byte = space.find(port, burst.address + i, 1);
        pieces_[port][i] = byte ? *byte : 0;
        whole &= byte != nullptr;
    }
    return {pieces_[port], whole ? burst.response : DECERR, burst.beats == 1};
}

void Memory::take_write_address(uint64_t address, uint32_t beats) {
    writes_.push(burst(address, beats, WRITE_ERROR, WRITE_SILENT));
    timing_->write_burst(address, beats);
    ++statistics_.write_bursts;
}

// Writes the bytes whose strobes are set. Whether all of them are mapped.
bool Memory::copy(uint64_t address, const uint8_t* bytes, uint32_t strobes) {
    uint8_t* whole = space.find(WRITER, address, port_bytes_);
    if (whole && strobes == (uint32_t{1} << port_bytes_) - 1) {
        std::memcpy(whole, bytes, port_bytes_);
        return true;
    }
    bool mapped = true;
    for (uint32_t i = 0; i < port_bytes_; ++i) {
        if (!(strobes >> i & 1)) continue;
        uint8_t* byte = space.find(WRITER, address + i, 1);
        if (byte) *byte = bytes[i];
        mapped &= byte != nullptr;
    }
    return mapped;
}

void Memory::take_write_beat(const uint8_t* bytes, uint32_t strobes) {
    Burst& burst = writes_.front();
    if (burst.response != SLVERR && !copy(burst.address, bytes, strobes)) burst.response = DECERR;
    burst.address += port_bytes_;
    burst.bytes += static_cast<uint32_t>(__builtin_popcount(strobes));
    timing_->write_beat();
    if (--burst.beats) return;
    statistics_.write_bytes += burst.bytes;
    auto& shortest = statistics_.shortest_write_burst;
    shortest = shortest ? std::min<uint64_t>(shortest, burst.bytes) : burst.bytes;
    statistics_.longest_write_burst = std::max<uint64_t>(statistics_.longest_write_burst, burst.bytes);
    answers_.push(burst);
    writes_.pop();
}

void Memory::take_acknowledge() {
    answers_.pop();
    timing_->acknowledge();
}

Statistics Memory::statistics() const {
    Statistics result = statistics_;
    for (uint32_t port = 0; port < ports_; ++port) result.read_bytes += result.port_read_beats[port] * port_bytes_;
    result.refreshes = timing_->refreshes;
    result.row_misses = timing_->row_misses;
    return result;
}

std::unique_ptr<Timing> make_timing(const char* preset, uint32_t ports, uint32_t port_bytes, uint64_t seed) {
    if (!preset) return nullptr;
    if (!std::strcmp(preset, "ideal")) return make_ideal_timing(ports);
    if (!std::strcmp(preset, "kv260-2400")) return make_dram_timing(ports, port_bytes, 2400);
    if (!std::strcmp(preset, "kv260-2133")) return make_dram_timing(ports, port_bytes, 2133);
    if (!std::strcmp(preset, "hostile")) return make_hostile_timing(ports, seed);
    return nullptr;
}

double stream_limit(const char* preset, uint32_t ports, uint32_t port_bytes, uint64_t cycles, uint64_t seed) {
    constexpr uint32_t OUTSTANDING = GM_OUTSTANDING;
    if (ports < 1 || ports > MAX_PORTS || port_bytes < 4 || port_bytes > MAX_PORT_BYTES || !cycles) return -1;
    const auto timing = make_timing(preset, ports, port_bytes, seed);
    if (!timing) return -1;
    const uint32_t beats = std::min(MAX_BURST_BEATS, BURST_BOUNDARY / port_bytes);
    Random random(seed);
    uint64_t address[MAX_PORTS], taken = 0;
    uint32_t asked[MAX_PORTS] = {};  // beats under way
    // Regions lie somewhere in a gigabyte each: what a preset gives must not hang on how they meet in the banks.
    for (uint32_t port = 0; port < ports; ++port) address[port] = (uint64_t{port} << 30) + (random.next() >> 14 << 12);
    for (uint64_t cycle = 0; cycle < cycles; ++cycle) {
        for (uint32_t port = 0; port < ports; ++port) {
            if (timing->offers.read_valid[port]) timing->read_beat(port), --asked[port], ++taken;
            if (asked[port] + beats > OUTSTANDING * beats || !timing->offers.read_ready[port]) continue;
            timing->read_burst(port, address[port], beats);
            asked[port] += beats;
            address[port] += beats * port_bytes;
        }
        timing->step();
    }
    return static_cast<double>(taken * port_bytes) / static_cast<double>(cycles);
}

}  // namespace gristmill

// For ctypes; see stream_limit.
extern "C" double gm_stream_limit(const char* preset, uint32_t ports, uint32_t port_bytes, uint64_t cycles,
                                  uint64_t seed) {
    return gristmill::stream_limit(preset, ports, port_bytes, cycles, seed);
}
