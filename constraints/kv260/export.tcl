# SPDX-License-Identifier: Apache-2.0
# Step 3: reports, the facts about timing, the bitstream and the hardware description.
source [file join [file dirname [file normalize [info script]]] settings.tcl]

open_project [project_file]
open_run impl_1
set reports [setting REPORTS]
report_utilization -file [file join $reports utilisation.rpt]
report_utilization -hierarchical -file [file join $reports utilisation_hierarchy.rpt]
report_timing_summary -max_paths 10 -file [file join $reports timing.rpt]

foreach {kind option} {setup -setup hold -hold} {
    set path [get_timing_paths -max_paths 1 $option]
    if {[llength $path] == 0} {
        error "the design has no $kind path: its clock is not constrained"
    }
    fact ${kind}_slack_ns [get_property SLACK $path]
    fact ${kind}_from [get_property STARTPOINT_PIN $path]
    fact ${kind}_to [get_property ENDPOINT_PIN $path]
}
set run [get_runs impl_1]
fact pulse_width_slack_sum_ns [get_property STATS.TPWS $run]
fact failed_nets [get_property STATS.FAILED_NETS $run]

set out [setting OUT]
file copy -force [file join [get_property DIRECTORY $run] system_wrapper.bit] [file join $out gristmill.bit]
write_hw_platform -fixed -include_bit -force -file [file join $out gristmill.xsa]
close_project
