# SPDX-License-Identifier: Apache-2.0
# The accelerator as an IP-XACT core, for use in other block designs.
source [file join [file dirname [file normalize [info script]]] settings.tcl]

create_project gristmill_ip [file join [setting WORK] ip_project] -part [setting PART] -force
set_property target_language Verilog [current_project]
add_files -norecurse [setting_files SOURCES]
set_property top [setting MODULE] [current_fileset]
update_compile_order -fileset sources_1

ipx::package_project -root_dir [setting OUT] -vendor gristmill -library user -taxonomy /UserIP -import_files -force
set core [ipx::current_core]
set_property name [setting MODULE] $core
set_property version 1.0 $core
set_property core_revision 1 $core
set_property display_name "Gristmill" $core
set_property description "LLM accelerator, config [setting CONFIG]" $core
foreach interface [concat [setting INTERFACES] {clk rst irq}] {
    if {[llength [ipx::get_bus_interfaces -quiet $interface -of_objects $core]] == 0} {
        error "Vivado did not infer the interface $interface of [setting MODULE]"
    }
}
ipx::create_xgui_files $core
ipx::update_checksums $core
ipx::check_integrity $core
ipx::save_core $core
close_project
