# SPDX-License-Identifier: Apache-2.0
# The recorder's block design: cells with their pins, nets, addresses, and what validate_bd_design objects to.
#
# Pins come from what Vivado's catalogue documents (PG201 for the processing system, PG164, PG247) and, for the module
# reference, from the attributes in the Verilog itself, as Vivado does it (UG994).

# --- modules read from Verilog: ::module(NAME) lists {port direction width interface signal parameters}

proc read_modules {path} {
    set file [open $path]
    set text [read $file]
    close $file
    # Only the wrapper has attributes, and the accelerator's own Verilog is long.
    if {![string match *X_INTERFACE_INFO* $text]} { return }
    foreach {all name ports} [regexp -all -inline {\nmodule (\w+) \(\n(.*?)\n\);} \n$text] {
        set ::module($name) {}
        set parameters [set info {}]
        foreach line [split $ports \n] {
            if {[regexp {X_INTERFACE_INFO = "([^"]*)"} $line all info]} {
                set parameters {}
                regexp {X_INTERFACE_PARAMETER = "([^"]*)"} $line all parameters
            } elseif {[regexp {^ *(input|output) (?:\[(\d+):0\] )?(\w+),?$} $line all direction high port]} {
                set width [expr {$high eq "" ? 1 : $high + 1}]
                lappend ::module($name) [list $port $direction $width {*}[lrange [concat $info {{} {} {}}] 0 2] $parameters]
                note port $name $port $direction $width [lindex $info 1] [lindex $info 2]
                set parameters [set info {}]
            } else {
                error "$path: not a port or its attribute: $line"
            }
        }
    }
}

# Signals of an AXI interface as its manager drives them, and those that it gets.
set axi_out {AWID AWADDR AWLEN AWSIZE AWBURST AWCACHE AWPROT AWVALID WDATA WSTRB WLAST WVALID BREADY
    ARID ARADDR ARLEN ARSIZE ARBURST ARCACHE ARPROT ARVALID RREADY}
set axi_in {AWREADY WREADY BID BRESP BVALID ARREADY RID RDATA RRESP RLAST RVALID}
set axi_lite {AWADDR AWPROT AWVALID AWREADY WDATA WSTRB WVALID WREADY BRESP BVALID BREADY
    ARADDR ARPROT ARVALID ARREADY RDATA RRESP RVALID RREADY}

# Pins and interfaces of a module reference: pin NAME -> {direction type parameters}, interface NAME -> {mode widths parameters}.
proc infer {module} {
    set pins [set interfaces [dict create]]
    foreach port $::module($module) {
        lassign $port name direction width type interface signal parameters
        if {$parameters ne "" && ![string match "XIL_INTERFACENAME $interface*" $parameters]} {
            error "port $name: parameters of another interface: $parameters"
        }
        if {![string match xilinx.com:interface:aximm:1.0 $type]} {
            if {$type ne "" && $type ni {xilinx.com:signal:clock:1.0 xilinx.com:signal:reset:1.0 xilinx.com:signal:interrupt:1.0}} {
                error "port $name: no interface type $type"
            }
            dict set pins $name [list $direction [lindex [split $type :] 2] $parameters $interface]
            continue
        }
        if {$signal in $::axi_out} {
            set mode [expr {$direction eq "output" ? "master" : "slave"}]
        } elseif {$signal in $::axi_in} {
            set mode [expr {$direction eq "output" ? "slave" : "master"}]
        } else {
            error "port $name: AXI has no signal $signal"
        }
        dict lappend interfaces $interface $mode
        dict set widths $interface $signal $width
        if {$parameters ne ""} { dict set settings $interface $parameters }
    }
    foreach interface [dict keys $interfaces] {
        set modes [lsort -unique [dict get $interfaces $interface]]
        if {[llength $modes] != 1} { error "interface $interface is neither a master nor a slave" }
        set has [dict get $widths $interface]
        set parameters [dict get $settings $interface]
        set needed [expr {[string match *AXI4LITE* $parameters] ? $::axi_lite : [concat $::axi_out $::axi_in]}]
        if {[lsort $needed] ne [lsort [dict keys $has]]} { error "interface $interface lacks signals or has too many" }
        foreach {parameter signal} {DATA_WIDTH RDATA ADDR_WIDTH ARADDR ID_WIDTH ARID} {
            if {[regexp "\\y$parameter (\\d+)" $parameters all value] && $value != [dict get $has $signal]} {
                error "interface $interface: $parameter $value, but $signal has [dict get $has $signal] bits"
            }
        }
        dict set interfaces $interface [list $modes $has $parameters]
    }
    return [list $pins $interfaces]
}
# Whether a packaged module has a bus interface; the project's top is the one with attributes.
proc known_interface {name} {
    foreach module [array names ::module] {
        lassign [infer $module] pins interfaces
        if {[dict exists $interfaces $name]} { return 1 }
        foreach value [dict values $pins] {
            if {$name ne "" && [lindex $value 3] eq $name} { return 1 }
        }
    }
    return 0
}

# --- cells

array set config {}
proc create_bd_design {name} { set ::block_design $name }
proc create_bd_cell {args} {
    set options [parse create_bd_cell $args {} {-type -vlnv -reference}]
    set name [dict get $options ""]
    if {[dict get $options -type] eq "module"} {
        set module [dict get $options -reference]
        if {![info exists ::module($module)]} { error "no module $module among the files" }
        set ::cell($name) module
        lassign [infer $module] ::reference_pins ::reference_interfaces
    } else {
        set kind [dict get {xilinx.com:ip:zynq_ultra_ps_e ps xilinx.com:ip:proc_sys_reset reset
            xilinx.com:ip:smartconnect smartconnect} [dict get $options -vlnv]]
        set ::cell($name) $kind
    }
    note cell $name $::cell($name)
    return cell:$name
}
proc cell_exists {name} { info exists ::cell($name) }
proc get_bd_cells {args} { look_up get_bd_cells $args cell cell_exists }
proc apply_bd_automation {args} {
    set options [parse apply_bd_automation $args {} {-rule -config}]
    if {[dict get $options -rule] ne "xilinx.com:bd_rule:zynq_ultra_ps_e"} { error "no rule [dict get $options -rule]" }
    set name [name_of [dict get $options ""] cell]
    if {[dict get [dict get $options -config] apply_board_preset] ne "1"} { error "no board preset" }
    # As after the real preset: both M_AXI_HPM ports are on, no slave port is.
    array set ::config [list $name,PSU__USE__M_AXI_GP0 1 $name,PSU__USE__M_AXI_GP1 1 $name,PSU__USE__IRQ0 1]
    note preset $name
}
proc set_cell_property {cell name value} {
    if {![regsub {^CONFIG\.} $name {} name]} { error "a cell has no property $name" }
    set known {
        ps {PSU__USE__[MS]_AXI_GP[0-6] PSU__[MS]AXIGP[0-6]__DATA_WIDTH PSU__FPGA_PL0_ENABLE PSU__USE__IRQ0
            PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ PSU__USE__FABRIC__RST PSU__NUM_FABRIC_RESETS}
        smartconnect {NUM_SI NUM_MI NUM_CLKS}
        reset {} module {}
    }
    foreach pattern [dict get $known $::cell($cell)] {
        if {[string match $pattern $name]} {
            if {[string match *DATA_WIDTH $name] && $value ni {32 64 128}} { error "$name is 32, 64 or 128, not $value" }
            set ::config($cell,$name) $value
            return
        }
    }
    error "cell $cell has no property CONFIG.$name"
}
proc option {cell name} { return [expr {[info exists ::config($cell,$name)] ? $::config($cell,$name) : 0}] }
proc made_mhz {} {
    set asked [option ps PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ]
    return [fault MHZ [expr {999.99 / round(999.99 / $asked)}]]
}

# Pins of a cell: NAME -> {direction type}; interfaces: NAME -> {mode width clock}.
proc pins {cell} {
    switch $::cell($cell) {
        module { return $::reference_pins }
        reset { return {slowest_sync_clk {input clock} ext_reset_in {input reset} peripheral_reset {output reset}
            peripheral_aresetn {output reset} interconnect_aresetn {output reset}} }
        smartconnect { return {aclk {input clock} aresetn {input reset}} }
    }
    set found [dict create]
    if {[option $cell PSU__FPGA_PL0_ENABLE]} { dict set found pl_clk0 {output clock} }
    if {[option $cell PSU__USE__FABRIC__RST]} { dict set found pl_resetn0 {output reset} }
    if {[option $cell PSU__USE__IRQ0]} { dict set found pl_ps_irq0 {input interrupt} }
    foreach port {0 1} {
        if {[option $cell PSU__USE__M_AXI_GP$port]} { dict set found maxihpm${port}_fpd_aclk {input clock} }
    }
    for {set port 0} {$port < 4} {incr port} {
        if {[option $cell PSU__USE__S_AXI_GP[expr {$port + 2}]]} { dict set found saxihp${port}_fpd_aclk {input clock} }
    }
    return $found
}
proc interfaces {cell} {
    set found [dict create]
    switch $::cell($cell) {
        module {
            dict for {name value} $::reference_interfaces {
                dict set found $name [list [lindex $value 0] [dict get [lindex $value 1] RDATA] [associated $name]]
            }
        }
        smartconnect {
            for {set i 0} {$i < [option $cell NUM_SI]} {incr i} { dict set found S0${i}_AXI {slave any aclk} }
            for {set i 0} {$i < [option $cell NUM_MI]} {incr i} { dict set found M0${i}_AXI {master any aclk} }
        }
        ps {
            foreach pin [dict keys [pins $cell]] {
                if {[regexp {^maxihpm(\d)_fpd_aclk$} $pin all port]} {
                    dict set found M_AXI_HPM${port}_FPD [list master [option $cell PSU__MAXIGP${port}__DATA_WIDTH] $pin]
                } elseif {[regexp {^saxihp(\d)_fpd_aclk$} $pin all port]} {
                    set width [option $cell PSU__SAXIGP[expr {$port + 2}]__DATA_WIDTH]
                    dict set found S_AXI_HP${port}_FPD [list slave $width $pin]
                }
            }
        }
    }
    return $found
}
# The clock pin of the module reference whose ASSOCIATED_BUSIF names an interface.
proc associated {interface} {
    dict for {pin value} $::reference_pins {
        if {[regexp {ASSOCIATED_BUSIF ([\w:]+)} [lindex $value 2] all names] && $interface in [split $names :]} { return $pin }
    }
    return {}
}
proc part_of {what path} {
    lassign [split $path /] cell name
    return [expr {[info exists ::cell($cell)] && [dict exists [$what $cell] $name]}]
}
proc get_bd_pins {args} { look_up get_bd_pins $args pin {part_of pins} }
proc get_bd_intf_pins {args} { look_up get_bd_intf_pins $args intf {part_of interfaces} }
proc create_bd_port {args} {
    set options [parse create_bd_port $args {} -dir]
    set ::board_port([dict get $options ""]) [dict get $options -dir]
}
proc port_exists {name} { info exists ::board_port($name) }
proc get_bd_ports {args} { return pin:port/[name_of [look_up get_bd_ports $args port port_exists] port] }

# --- nets

proc connect_bd_net {from to} {
    set from [name_of $from pin]
    set to [name_of $to pin]
    if {[info exists ::driver($to)]} { error "$to is driven by $::driver($to) already" }
    lassign [split $to /] cell pin
    lassign [split $from /] source output
    if {[lindex [dict get [pins $source] $output] 0] ne "output"} { error "$from drives nothing" }
    if {$cell ne "port"} {
        lassign [dict get [pins $cell] $pin] direction type
        if {$direction ne "input"} { error "$to is not an input" }
        if {[lindex [dict get [pins $source] $output] 1] ne $type} { error "$from is no $type, $to is one" }
    }
    set ::driver($to) $from
    note net $from $to
}
proc connect_bd_intf_net {from to} {
    set from [name_of $from intf]
    set to [name_of $to intf]
    foreach end [list $from $to] mode {master slave} {
        lassign [split $end /] cell name
        if {[info exists ::joined($end)]} { error "$end is connected to $::joined($end) already" }
        if {[lindex [dict get [interfaces $cell] $name] 0] ne $mode} { error "$end is not a $mode" }
    }
    set ::joined($from) $to
    set ::joined($to) $from
    note intf_net $from $to
}

# --- addresses

set segments {DDR_LOW {0x0 0x80000000} DDR_HIGH {0x800000000 0x80000000} QSPI {0xC0000000 0x20000000} LPS_OCM {0xFF000000 0x1000000}}
proc segment {path} {
    lassign [split $path /] cell interface name
    if {![info exists ::cell($cell)]} { return 0 }
    if {$::cell($cell) eq "module"} {
        return [expr {$name eq "reg0" && [part_of interfaces $cell/$interface]}]
    }
    if {[regexp {^SAXIGP(\d)$} $interface all gp] && [regexp {^HP(\d)_(\w+)$} $name all port which]} {
        return [expr {$gp == $port + 2 && [option $cell PSU__USE__S_AXI_GP$gp] && [dict exists $::segments $which]}]
    }
    return 0
}
proc space {path} {
    lassign [split $path /] cell name
    return [expr {$path eq "ps/Data" || ([part_of interfaces $path] && [lindex [dict get [interfaces $cell] $name] 0] eq "master")}]
}
proc get_bd_addr_spaces {args} { look_up get_bd_addr_spaces $args space space }
proc get_bd_addr_segs {args} {
    if {[lindex $args 0] eq "-of_objects"} {
        set space [name_of [lindex $args 1] space]
        return [lmap key [array names ::assigned $space,*] { set key mapped:$key }]
    }
    look_up get_bd_addr_segs $args segment segment
}
proc assign_bd_address {args} {
    set options [parse assign_bd_address $args {} {-offset -range -target_address_space}]
    set space [name_of [dict get $options -target_address_space] space]
    set segment [name_of [dict get $options ""] segment]
    lassign [split $segment /] cell interface name
    if {$::cell($cell) eq "module"} {
        set bits [dict get [lindex [dict get $::reference_interfaces $interface] 1] ARADDR]
        set offset [dict get $options -offset]
        set range [dict get $options -range]
        if {$range > (1 << $bits)} { error "$segment has [expr {1 << $bits}] bytes, not $range" }
        if {$offset % $range || $offset < 0xA0000000 || $offset + $range > 0xB0000000} {
            error "M_AXI_HPM0_FPD cannot reach $range bytes at $offset"
        }
    } else {
        lassign [dict get $::segments [string range $name 4 end]] offset range
    }
    set ::assigned($space,$segment) [list $offset $range]
    note address $space $segment [format 0x%llx $offset] [format 0x%llx $range]
}
proc exclude_bd_addr_seg {args} {
    set options [parse exclude_bd_addr_seg $args {} -target_address_space]
    name_of [dict get $options -target_address_space] space
    name_of [dict get $options ""] segment
}
proc mapped_property {object name} {
    lassign $::assigned([name_of $object mapped]) offset range
    # Vivado prints ranges in its own way.
    return [expr {$name eq "OFFSET" ? [format 0x%016llX $offset] : $range % 1024 ? $range : "[expr {$range / 1024}]K"}]
}

# --- validation

proc clock_of {end} {
    lassign [split $end /] cell name
    set pin [lindex [dict get [interfaces $cell] $name] 2]
    if {$pin eq ""} { error "$end belongs to no clock" }
    return $::driver($cell/$pin)
}
proc validate_bd_design {} {
    foreach name [array names ::cell] {
        dict for {pin value} [pins $name] {
            if {[lindex $value 0] eq "input" && ![info exists ::driver($name/$pin)]} { error "$name/$pin is not connected" }
        }
    }
    foreach name [array names ::cell] {
        dict for {interface value} [interfaces $name] {
            set end $name/$interface
            if {![info exists ::joined($end)]} { error "$end is not connected" }
            if {[clock_of $end] ne [clock_of $::joined($end)]} { error "$end and $::joined($end) have different clocks" }
            lassign [split $::joined($end) /] other peer
            set widths [lsort -unique [list [lindex $value 1] [lindex [dict get [interfaces $other] $peer] 1]]]
            if {[llength [lsearch -all -inline -not $widths any]] > 1} { error "$end and $::joined($end) have widths $widths" }
            if {$::cell($name) eq "module" && [lindex $value 0] eq "master" && ![llength [array names ::assigned $end,*]]} {
                error "$end reaches no address"
            }
        }
    }
    if {![llength [array names ::assigned ps/Data,*]]} { error "ps/Data reaches no address" }
    note valid
}
proc save_bd_design {} {}
