# SPDX-License-Identifier: Apache-2.0
# Step 2: synthesis, placement, routing, bitstream.
source [file join [file dirname [file normalize [info script]]] settings.tcl]

open_project [project_file]
complete_run synth_1
set_property strategy Performance_Explore [get_runs impl_1]
complete_run impl_1 -to_step write_bitstream
close_project
