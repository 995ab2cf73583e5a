# SPDX-License-Identifier: Apache-2.0
# A stand-in for Vivado under tclsh: it knows the commands, options and properties that constraints/kv260 uses, builds a
# model of the block design, refuses everything else, and writes what it saw to RECORDER_OUT, one tab-separated fact a line.
#
# Usage: tclsh recorder.tcl SCRIPT. RECORDER_* in the environment plants faults: see the end of this file.

set here [file dirname [file normalize [info script]]]
set record [open $::env(RECORDER_OUT) a]
proc note {args} { puts $::record [join $args \t] }
proc fault {name default} {
    return [expr {[info exists ::env(RECORDER_$name)] ? $::env(RECORDER_$name) : $default}]
}
# tclsh would look an unknown command up among the programs on PATH.
proc unknown {args} { error "unknown command [lindex $args 0]" }

# Options of a command: flags stand alone, valued ones take the next word; the rest is returned under "".
proc parse {command words flags valued} {
    set found [dict create "" {}]
    for {set i 0} {$i < [llength $words]} {incr i} {
        set word [lindex $words $i]
        if {$word in $flags} {
            dict set found $word 1
        } elseif {$word in $valued} {
            dict set found $word [lindex $words [incr i]]
        } elseif {[string match {-[a-z]*} $word]} {
            error "$command has no option $word"
        } else {
            dict lappend found "" $word
        }
    }
    note call $command {*}$words
    return $found
}
# The one object of a kind, as "kind:name".
proc name_of {object kind} {
    if {![string match $kind:* $object]} { error "a $kind is needed, not '$object'" }
    return [string range $object [string length $kind:] end]
}
proc look_up {command words kind exists} {
    set options [parse $command $words -quiet {}]
    set names [dict get $options ""]
    if {[llength $names] != 1} { error "$command takes one name, not '$names'" }
    if {[uplevel #0 $exists [list [lindex $names 0]]]} { return $kind:[lindex $names 0] }
    if {[dict exists $options -quiet]} { return {} }
    error "$command: there is no [lindex $names 0]"
}

source [file join $here recorder_design.tcl]

# --- project

proc create_project {args} {
    set options [parse create_project $args -force -part]
    lassign [dict get $options ""] name folder
    if {[dict get $options -part] ne "xck26-sfvc784-2LV-c"} { error "no part [dict get $options -part]" }
    file mkdir $folder
    close [open [file join $folder $name.xpr] w]
    set ::project $folder
}
proc open_project {args} {
    set file [lindex [dict get [parse open_project $args {} {}] ""] 0]
    if {![file exists $file]} { error "no project $file" }
    set ::project [file dirname $file]
}
proc close_project {} { unset ::project }
proc current_project {} { return project:$::project }
proc current_fileset {} { return fileset:sources_1 }
proc get_board_parts {args} {
    set pattern [lindex [dict get [parse get_board_parts $args -quiet {}] ""] 0]
    set installed [fault BOARD_PARTS {xilinx.com:kv260_som:part0:1.3 xilinx.com:kv260_som:part0:1.4 xilinx.com:zcu104:part0:1.1}]
    return [lsearch -all -inline -glob $installed $pattern]
}
proc add_files {args} {
    set options [parse add_files $args -norecurse -fileset]
    foreach file [join [dict get $options ""]] {
        if {![file exists $file]} { error "no file $file" }
        if {[file extension $file] eq ".v"} { read_modules $file }
        note file $file
    }
}
proc update_compile_order {args} { parse update_compile_order $args {} -fileset }
proc get_files {name} {
    if {$name ne "system.bd" || ![info exists ::block_design]} { error "no file $name" }
    return file:$name
}
proc generate_target {what object} { name_of $object file }
proc make_wrapper {args} {
    set options [parse make_wrapper $args -top -files]
    name_of [dict get $options -files] file
    set file [file join $::project system_wrapper.v]
    close [open $file w]
    return $file
}

# --- runs and reports

proc get_runs {name} {
    if {$name ni {synth_1 impl_1}} { error "no run $name" }
    return run:$name
}
proc launch_runs {args} {
    set options [parse launch_runs $args {} {-jobs -to_step}]
    set run [dict get $options ""]
    get_runs $run
    if {$run eq "impl_1"} {
        if {![info exists ::done(synth_1)]} { error "impl_1 before synth_1" }
        file mkdir [file join $::project impl_1]
        if {[dict get $options -to_step] eq "write_bitstream"} {
            close [open [file join $::project impl_1 system_wrapper.bit] w]
        }
    }
    set ::launched($run) 1
}
proc wait_on_run {run} {
    if {![info exists ::launched($run)]} { error "$run was not launched" }
    set ::done($run) 1
}
proc open_run {run} {
    if {![file exists [file join $::project impl_1]]} { error "$run has not run" }
    set ::opened 1
}
proc report_utilization {args} { report [parse report_utilization $args -hierarchical -file] }
proc report_timing_summary {args} { report [parse report_timing_summary $args {} {-max_paths -file}] }
proc report {options} {
    if {![info exists ::opened]} { error "no design is open" }
    set file [open [dict get $options -file] w]
    puts $file "| CLB LUTs                   | 21000 |     0 |          0 |    117120 | 17.93 |"
    puts $file "| CLB Registers              | 30000 |     0 |          0 |    234240 | 12.81 |"
    puts $file "| Block RAM Tile    | 30.5 |     0 |          0 |       144 | 21.18 |"
    puts $file "| URAM              |    8 |     0 |          0 |        64 | 12.50 |"
    puts $file "| DSPs      |  300 |     0 |          0 |      1248 | 24.04 |"
    close $file
}
proc get_timing_paths {args} {
    set options [parse get_timing_paths $args {-setup -hold} -max_paths]
    if {![info exists ::opened]} { error "no design is open" }
    if {[fault NO_PATHS 0]} { return {} }
    return path:[expr {[dict exists $options -setup] ? "setup" : "hold"}]
}
proc write_hw_platform {args} {
    set options [parse write_hw_platform $args {-fixed -include_bit -force} -file]
    file copy -force [fault XSA ""] [dict get $options -file]
}

# --- properties: what may be set and read, and no other

set settable(project) {board_part target_language}
set settable(fileset) {top}
set settable(file) {synth_checkpoint_mode}
set settable(run) {strategy}
set settable(core) {name version core_revision display_name description}

proc set_property {args} {
    set options [parse set_property $args {} -dict]
    if {[dict exists $options -dict]} {
        set pairs [dict get $options -dict]
        set object [lindex [dict get $options ""] 0]
    } else {
        lassign [dict get $options ""] name value object
        set pairs [list $name $value]
    }
    set kind [lindex [split $object :] 0]
    foreach {name value} $pairs {
        if {$kind eq "cell"} {
            set_cell_property [name_of $object cell] $name $value
        } elseif {![info exists ::settable($kind)] || $name ni $::settable($kind)} {
            error "a $kind has no property $name"
        }
        note property $object $name $value
    }
}
proc get_property {name object} {
    switch -glob $object/$name {
        run:*/PROGRESS { return [expr {$object eq "run:[fault RUN none]" ? "43%" : "100%"}] }
        run:*/STATUS { return "route_design ERROR" }
        run:*/DIRECTORY { return [file join $::project impl_1] }
        run:*/STATS.TPWS { return [fault PULSE 0.000] }
        run:*/STATS.FAILED_NETS { return [fault NETS 0] }
        path:setup/SLACK { return [fault SETUP 0.121] }
        path:hold/SLACK { return [fault HOLD 0.010] }
        path:*/STARTPOINT_PIN { return system_i/accelerator/inst/from_reg/C }
        path:*/ENDPOINT_PIN { return system_i/accelerator/inst/to_reg/D }
        mapped:*/OFFSET - mapped:*/RANGE { return [mapped_property $object $name] }
        cell:ps/CONFIG.PSU__CRL_APB__PL0_REF_CTRL__ACT_FREQMHZ { return [made_mhz] }
    }
    error "[lindex [split $object :] 0] has no property $name that could be read"
}

# --- packaging

namespace eval ipx {
    proc package_project {args} {
        set options [::parse ipx::package_project $args {-import_files -force} {-root_dir -vendor -library -taxonomy}]
        set ::ip [dict get $options -root_dir]
    }
    proc current_core {} { return core:ip }
    proc get_bus_interfaces {args} {
        set options [::parse ipx::get_bus_interfaces $args -quiet -of_objects]
        ::name_of [dict get $options -of_objects] core
        return [expr {[::known_interface [dict get $options ""]] ? "bus:[dict get $options {}]" : {}}]
    }
    foreach command {create_xgui_files update_checksums check_integrity} {
        proc $command {core} "::name_of \$core core; ::note call ipx::$command"
    }
    proc save_core {core} {
        ::name_of $core core
        close [open [file join $::ip component.xml] w]
    }
}

# --- faults: BOARD_PARTS (installed ones), RUN (the run that fails), SETUP, HOLD, PULSE (slack), NETS (unrouted),
# NO_PATHS, MHZ (what the divider makes). XSA is the archive that write_hw_platform copies.

if {[catch {source [lindex $argv 0]} message]} {
    puts "ERROR: $message"
    flush stdout
    note error $message
    close $record
    exit 1
}
close $record
