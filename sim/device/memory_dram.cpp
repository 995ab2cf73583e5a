// SPDX-License-Identifier: Apache-2.0
// The KV260's DDR4 with four HP ports: banks with open rows, one data bus, refresh, turnarounds, and an arbiter.
//
// Every burst is divided into accesses of 64 bytes (BL8 on 64 bits). The next few accesses of a port are in its window,
// where their rows are opened in advance. The arbiter gives the data bus to the window whose head can start first. The
// data then wait in the port's read buffer, and the port takes one beat per cycle. So the controller can run ahead of
// slow ports, and the buffered data cover refreshes. Time is in picoseconds, because no clock period here is a multiple
// of another.
//
// Sources of the constants: J is JEDEC JESD79-4 (speed bins 2400 16-16-16 and 2133 15-15-15), U is the Zynq UltraScale+
// manual UG1085. C is chosen or calibrated: four contiguous streams of 128 bits reached 15.9 to 16.0 GB/s on KV260
// boards (here: 15.8 at 2400 MT/s) or 13.3 (here: 14.4 at 2133), and a read takes 200 to 280 ns. One effect was not
// calibrated: on the board, readers get 9 % more when results are written in pieces of 1 KiB instead of 64 bytes. Here
// they get 6 to 8 % more, at one byte written in two cycles.

#include <algorithm>

#include "memory_timing.h"

namespace gristmill {
namespace {

using Time = int64_t;  // picoseconds

constexpr Time CYCLE = 4000;  // of the fabric, 250 MHz
constexpr Time NEVER = INT64_MAX;

constexpr uint32_t ACCESS_BYTES = 64;          // J: burst length 8 on 64 bits, four clocks (tCCD_S)
constexpr uint32_t BANKS = 16;                 // J: four groups of four, in chips of 8 bits
constexpr uint32_t ROW_BYTES = 8192;           // J: 1,024 columns of 64 bits
constexpr uint32_t WRITE_LATENCY_CLOCKS = 12;  // J: CWL
constexpr uint32_t READ_TO_WRITE_CLOCKS = 6;   // J: CL + 2 - CWL beyond the transfer
constexpr Time ROW_OPEN = 33000;               // J: tRAS at 2133; 32,000 at 2400
constexpr Time READ_TO_PRECHARGE = 7500;       // J: tRTP
constexpr Time WRITE_RECOVERY = 15000;         // J: tWR
constexpr Time WRITE_TO_READ = 7500;           // J: tWTR_L
constexpr Time BETWEEN_ACTIVATES = 3700;       // J: tRRD_S at 2133; 3,300 at 2400
constexpr Time REFRESH_INTERVAL = 7800000;     // J: tREFI up to 85 degrees
constexpr Time REFRESH = 350000;               // J: tRFC of 8 Gb chips

// U: HP1 and HP2 share one 128-bit port of the controller; HP0 and HP3 have one each. A port of the controller moves
// one beat per controller clock, which is half the DRAM's clock: 9.6 GB/s at 2400, more than two HP ports can take.
constexpr uint32_t LINKS = 3;
constexpr uint32_t LINK[MAX_PORTS] = {0, 1, 1, 2};
constexpr uint32_t LINK_CLOCKS = 2 * ACCESS_BYTES / 16;

constexpr uint32_t BURSTS = 16;  // C: bursts that a port accepts before the controller takes them
constexpr uint32_t WINDOW = 8;   // C: accesses of a port that the controller sees, to open their rows in advance
constexpr uint32_t BUFFER = 32;  // C: accesses in a port's read buffer, and in the write buffer: 2 KiB
constexpr uint32_t RUN = 4;      // C: consecutive accesses of a port while other ports wait
// C: bus time lost between two ports. It equals tCCD_L - tCCD_S, the cost of two accesses in turn to one bank group.
constexpr uint32_t SWITCH_CLOCKS = 2;
constexpr uint32_t REQUEST = 28;       // C: cycles from AR or W to the controller
constexpr uint32_t RETURN = 26;        // C: cycles from the controller to R or B
constexpr Time PATIENCE = 32 * CYCLE;  // C: how long a row in use stays open while its bank needs another row
// C: writes wait until there are enough for two turnarounds, or until one of them has waited for 100 cycles.
constexpr uint32_t WRITE_BATCH = 24;
constexpr Time WRITE_PATIENCE = 100 * CYCLE;

constexpr uint32_t WRITES = MAX_PORTS;  // index of the write queue, after the ports' read queues
constexpr uint32_t QUEUES = MAX_PORTS + 1;
constexpr int64_t NO_ROW = -1;
static_assert(BURSTS + WINDOW + BUFFER <= MAX_BURSTS, "a port must not accept more bursts than the memory can track");

struct Access {
    int64_t row;
    uint32_t bank;
    uint32_t bytes;
    bool last;   // of its burst
    Time since;  // when the access reached the controller
};

struct Bank {
    int64_t row = NO_ROW;
    Time ready = 0;  // when reads and writes of the open row can start
    Time activated = 0;
    Time closable = 0;  // earliest time of a PRECHARGE
    uint32_t hits = 0;  // accesses in the windows to the open row
};

struct PendingBurst {
    uint64_t address;
    uint32_t bytes;
    Time visible;  // when the controller sees it
};

struct Delivery {
    uint64_t cycle;
    uint32_t bytes;
};

class DramTiming final : public Timing {
  public:
    DramTiming(uint32_t ports, uint32_t port_bytes, uint32_t megatransfers)
        : ports_(ports),
          port_bytes_(port_bytes),
          clock_(2000000 / megatransfers),
          access_(4 * 2000000 / megatransfers),
          core_(megatransfers < 2400 ? 14065 : 13320) {
        reset();
    }

    void reset() override;
    void read_burst(uint32_t port, uint64_t address, uint32_t beats) override {
        bursts_[port].push({address, beats * port_bytes_, now_ + REQUEST * CYCLE});
    }
    void read_beat(uint32_t port) override;
    void write_burst(uint64_t address, uint32_t beats) override { incoming_.push({address, beats * port_bytes_, 0}); }
    void write_beat() override;
    void acknowledge() override {
        offers.acknowledge_valid = false;
        acknowledgements_.pop();
    }
    void step() override;

  private:
    static Access access_at(uint64_t address, uint32_t bytes, bool last, Time since);
    void fill_windows();
    void enter(uint32_t queue, const Access& access);
    bool open(const Access& access, bool head);
    void activate(const Access& access);
    void refresh();
    void turn();
    void run_bus();
    Time earliest(uint32_t queue);
    void transfer(uint32_t queue, Time start);
    void deliver(uint32_t port, Time end, uint32_t bytes);
    void offer();

    const uint32_t ports_, port_bytes_;
    const Time clock_, access_;  // J: tCK and 4 tCK
    const Time core_;            // J: tAA = tRCD = tRP: the time to read data, to open a row, and to close a row

    uint64_t cycle_ = 0;
    Time now_ = 0;       // start of the cycle
    Time bus_free_ = 0;  // when the next access may start
    Time last_activate_ = 0;
    Time next_refresh_ = 0;
    Time link_free_[LINKS] = {};
    bool writing_ = false;
    uint32_t written_ = 0;  // accesses since the bus turned to writing
    uint32_t last_ = 0;     // queue that had the bus last
    uint32_t run_ = 0;      // its consecutive accesses
    Bank banks_[BANKS];
    Ring<Access, WINDOW> windows_[QUEUES];
    Ring<PendingBurst, BURSTS> bursts_[MAX_PORTS];
    Ring<Delivery, BUFFER> buffers_[MAX_PORTS];
    Ring<PendingBurst, BURSTS> incoming_;          // write bursts whose data are incomplete
    Ring<Access, BUFFER> written_data_;            // accesses whose data are complete
    Ring<uint64_t, MAX_BURSTS> acknowledgements_;  // cycles
};

void DramTiming::reset() {
    offers = Offers();
    refreshes = row_misses = 0;
    cycle_ = 0;
    now_ = bus_free_ = last_activate_ = 0;
    next_refresh_ = REFRESH_INTERVAL;
    for (auto& link : link_free_) link = 0;
    writing_ = false;
    written_ = last_ = run_ = 0;
    for (auto& bank : banks_) bank = Bank();
    for (auto& window : windows_) window.clear();
    for (auto& bursts : bursts_) bursts.clear();
    for (auto& buffer : buffers_) buffer.clear();
    incoming_.clear();
    written_data_.clear();
    acknowledgements_.clear();
    offer();
}

// The address map is row:bank:column without a hash, as in the controller's default setup. A contiguous stream stays in
// a row for 8 KiB. Streams use the same bank if the distance of their regions is a multiple of 128 KiB.
Access DramTiming::access_at(uint64_t address, uint32_t bytes, bool last, Time since) {
    const uint64_t place = address / ROW_BYTES;
    return {static_cast<int64_t>(place / BANKS), static_cast<uint32_t>(place % BANKS), bytes, last, since};
}

void DramTiming::read_beat(uint32_t port) {
    offers.read_valid[port] = false;
    if (!(buffers_[port].front().bytes -= port_bytes_)) buffers_[port].pop();
}

void DramTiming::write_beat() {
    PendingBurst& burst = incoming_.front();
    burst.address += port_bytes_;
    burst.bytes -= port_bytes_;
    if (burst.address % ACCESS_BYTES && burst.bytes) return;
    written_data_.push(access_at(burst.address - port_bytes_, port_bytes_, !burst.bytes, now_ + REQUEST * CYCLE));
    if (!burst.bytes) incoming_.pop();
}

void DramTiming::step() {
    ++cycle_;
    now_ += CYCLE;
    fill_windows();
    if (now_ >= next_refresh_) refresh();
    run_bus();
    offer();
}

void DramTiming::fill_windows() {
    for (uint32_t port = 0; port < ports_; ++port) {
        auto& bursts = bursts_[port];
        while (!windows_[port].full() && !bursts.empty() && bursts.front().visible <= now_) {
            PendingBurst& burst = bursts.front();
            const uint32_t to_boundary = ACCESS_BYTES - burst.address % ACCESS_BYTES;
            const uint32_t bytes = std::min(to_boundary, burst.bytes);
            enter(port, access_at(burst.address, bytes, bytes == burst.bytes, now_));
            burst.address += bytes;
            burst.bytes -= bytes;
            if (!burst.bytes) bursts.pop();
        }
    }
    while (!windows_[WRITES].full() && !written_data_.empty() && written_data_.front().since <= now_) {
        enter(WRITES, written_data_.front());
        written_data_.pop();
    }
}

void DramTiming::enter(uint32_t queue, const Access& access) {
    if (banks_[access.bank].row == access.row) ++banks_[access.bank].hits;
    windows_[queue].push(access);
    open(access, false);
}

// Opens the row of an access, unless other accesses still need the bank's open row. Returns whether the row is open
// now. The head of a window opens its row in any case after a delay. Without the delay, two heads would close each
// other's row before they could use it.
bool DramTiming::open(const Access& access, bool head) {
    const Bank& bank = banks_[access.bank];
    if (bank.row == access.row) return true;
    if (bank.row != NO_ROW && bank.hits && !(head && now_ - bank.activated > PATIENCE)) return false;
    activate(access);
    return true;
}

void DramTiming::activate(const Access& access) {
    Bank& bank = banks_[access.bank];
    const Time closed = bank.row == NO_ROW
                            ? bank.closable
                            : std::max({now_, bank.closable, bank.activated + ROW_OPEN}) + core_;
    bank.activated = std::max({now_, closed, last_activate_ + BETWEEN_ACTIVATES});
    last_activate_ = bank.activated;
    bank.ready = bank.activated + core_;
    bank.row = access.row;
    bank.hits = 0;
    for (auto& window : windows_) {
        for (uint32_t i = 0; i < window.size(); ++i) {
            bank.hits += window[i].bank == access.bank && window[i].row == access.row;
        }
    }
    ++row_misses;
}

// Refreshes all banks at once. Nothing moves until they are done, then every row must be opened again.
void DramTiming::refresh() {
    next_refresh_ += REFRESH_INTERVAL;
    ++refreshes;
    const Time end = std::max(bus_free_, now_) + core_ + REFRESH;
    bus_free_ = end;
    for (auto& bank : banks_) {
        bank = Bank();
        bank.closable = end;
    }
    for (auto& window : windows_) {
        for (uint32_t i = 0; i < window.size(); ++i) open(window[i], false);
    }
}

// Decides between reading and writing. A turnaround takes longer than a transfer, so writes are collected.
void DramTiming::turn() {
    const auto& writes = windows_[WRITES];
    if (writing_) {
        bool reads = false;
        for (uint32_t port = 0; port < ports_; ++port) reads |= !windows_[port].empty() && !buffers_[port].full();
        if (!reads || (!writes.empty() && written_ < BUFFER)) return;
        bus_free_ = std::max(bus_free_, now_) + WRITE_LATENCY_CLOCKS * clock_ + WRITE_TO_READ;
        writing_ = false;
        return;
    }
    if (writes.empty()) return;
    bool idle = true;
    for (uint32_t port = 0; port < ports_; ++port) idle &= windows_[port].empty() || buffers_[port].full();
    const bool full = writes.size() + written_data_.size() >= WRITE_BATCH;
    if (!idle && !full && now_ - writes.front().since < WRITE_PATIENCE) return;
    bus_free_ += READ_TO_WRITE_CLOCKS * clock_;
    writing_ = true;
    written_ = 0;
}

// The time when the head of a queue can start, or NEVER if it cannot start yet.
Time DramTiming::earliest(uint32_t queue) {
    if (windows_[queue].empty()) return NEVER;
    // Check the space for the data first: no row is closed for a port whose buffer is full.
    if (queue != WRITES && buffers_[queue].full()) return NEVER;
    const Access& access = windows_[queue].front();
    if (!open(access, true)) return NEVER;
    const Time free = bus_free_ + (queue == last_ ? 0 : SWITCH_CLOCKS * clock_);
    return std::max({free, now_, banks_[access.bank].ready});
}

// Assigns the bus until the end of this cycle.
void DramTiming::run_bus() {
    turn();
    while (bus_free_ < now_ + CYCLE) {
        uint32_t chosen = WRITES;
        Time start = NEVER;
        if (writing_) {
            start = earliest(WRITES);
        } else {
            // Round robin: the first port that can start at once gets the bus.
            uint32_t port = run_ < RUN ? last_ : last_ + 1;
            for (uint32_t i = 0; i < ports_; ++i, ++port) {
                if (port >= ports_) port = 0;
                const Time time = earliest(port);
                if (time < start) start = time, chosen = port;
                if (start <= std::max(bus_free_, now_) + SWITCH_CLOCKS * clock_) break;
            }
        }
        if (start >= now_ + CYCLE) return;
        transfer(chosen, start);
    }
}

void DramTiming::transfer(uint32_t queue, Time start) {
    const Access access = windows_[queue].front();
    Bank& bank = banks_[access.bank];
    windows_[queue].pop();
    --bank.hits;
    run_ = queue == last_ ? run_ + 1 : 1;
    last_ = queue;
    bus_free_ = start + access_;
    if (queue != WRITES) {
        bank.closable = std::max(bank.closable, start + READ_TO_PRECHARGE);
        deliver(queue, bus_free_ + core_, access.bytes);
        return;
    }
    ++written_;
    bank.closable = std::max(bank.closable, bus_free_ + WRITE_LATENCY_CLOCKS * clock_ + WRITE_RECOVERY);
    if (access.last) acknowledgements_.push(cycle_ + RETURN);
}

void DramTiming::deliver(uint32_t port, Time end, uint32_t bytes) {
    Time& link = link_free_[LINK[port]];
    link = std::max(link, end) + LINK_CLOCKS * clock_;
    buffers_[port].push({static_cast<uint64_t>((link + CYCLE - 1) / CYCLE) + RETURN, bytes});
}

void DramTiming::offer() {
    for (uint32_t port = 0; port < ports_; ++port) {
        offers.read_ready[port] = !bursts_[port].full();
        offers.read_valid[port] = !buffers_[port].empty() && buffers_[port].front().cycle <= cycle_;
    }
    offers.write_ready = !incoming_.full();
    offers.data_ready = !written_data_.full();
    offers.acknowledge_valid = !acknowledgements_.empty() && acknowledgements_.front() <= cycle_;
}

}  // namespace

std::unique_ptr<Timing> make_dram_timing(uint32_t ports, uint32_t port_bytes, uint32_t megatransfers) {
    return std::make_unique<DramTiming>(ports, port_bytes, megatransfers);
}

}  // namespace gristmill
