# SPDX-License-Identifier: Apache-2.0
# Step 1: the project and its block design: processing system, reset, control interconnect, the accelerator.
source [file join [file dirname [file normalize [info script]]] settings.tcl]

set parts [lsort -dictionary [get_board_parts -quiet [setting BOARD_PARTS]]]
if {[llength $parts] == 0} {
    error "Vivado has no board part [setting BOARD_PARTS]; install the Kria KV260 board files (Tools, Vivado Store, Boards)"
}
create_project gristmill [file join [setting WORK] project] -part [setting PART] -force
set_property board_part [lindex $parts end] [current_project]
set_property target_language Verilog [current_project]
fact board_part [lindex $parts end]

add_files -norecurse [setting_files SOURCES]
add_files -fileset constrs_1 -norecurse [list [setting XDC]]
update_compile_order -fileset sources_1
create_bd_design system

# The processing system. HP0 to HP3 are S_AXI_GP2 to GP5; HPM0 is M_AXI_GP0.
set ports [setting PORTS]
set ps [create_bd_cell -type ip -vlnv xilinx.com:ip:zynq_ultra_ps_e ps]
apply_bd_automation -rule xilinx.com:bd_rule:zynq_ultra_ps_e -config {apply_board_preset "1"} $ps
set properties [list \
    CONFIG.PSU__FPGA_PL0_ENABLE 1 \
    CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ [expr {[setting CLOCK_HZ] / 1.0e6}] \
    CONFIG.PSU__USE__FABRIC__RST 1 \
    CONFIG.PSU__NUM_FABRIC_RESETS 1 \
    CONFIG.PSU__USE__IRQ0 1 \
    CONFIG.PSU__USE__M_AXI_GP0 1 \
    CONFIG.PSU__MAXIGP0__DATA_WIDTH 128 \
    CONFIG.PSU__USE__M_AXI_GP1 0 \
    CONFIG.PSU__USE__M_AXI_GP2 0]
for {set gp 0} {$gp <= 6} {incr gp} {
    set used [expr {$gp >= 2 && $gp < 2 + $ports}]
    lappend properties CONFIG.PSU__USE__S_AXI_GP$gp $used
    if {$used} {
        lappend properties CONFIG.PSU__SAXIGP${gp}__DATA_WIDTH [setting PORT_WIDTH]
    }
}
set_property -dict $properties $ps

set accelerator [create_bd_cell -type module -reference [setting MODULE] accelerator]
foreach interface [setting INTERFACES] {
    if {[llength [get_bd_intf_pins -quiet accelerator/$interface]] == 0} {
        error "Vivado did not infer the AXI interface $interface of [setting MODULE]"
    }
}
create_bd_cell -type ip -vlnv xilinx.com:ip:proc_sys_reset reset
create_bd_cell -type ip -vlnv xilinx.com:ip:smartconnect control
set_property -dict {CONFIG.NUM_SI 1 CONFIG.NUM_MI 1 CONFIG.NUM_CLKS 1} [get_bd_cells control]

# One clock for everything: the accelerator has one clock, and the processor's ports cross to their own clocks inside.
set clocked {accelerator/clk reset/slowest_sync_clk control/aclk ps/maxihpm0_fpd_aclk}
for {set port 0} {$port < $ports} {incr port} {
    lappend clocked ps/saxihp${port}_fpd_aclk
}
foreach pin $clocked {
    connect_bd_net [get_bd_pins ps/pl_clk0] [get_bd_pins $pin]
}
connect_bd_net [get_bd_pins ps/pl_resetn0] [get_bd_pins reset/ext_reset_in]
connect_bd_net [get_bd_pins reset/peripheral_reset] [get_bd_pins accelerator/rst]
connect_bd_net [get_bd_pins reset/interconnect_aresetn] [get_bd_pins control/aresetn]
connect_bd_net [get_bd_pins accelerator/irq] [get_bd_pins ps/pl_ps_irq0]
create_bd_port -dir O fan_en_b
connect_bd_net [get_bd_pins accelerator/fan_en_b] [get_bd_ports fan_en_b]

connect_bd_intf_net [get_bd_intf_pins ps/M_AXI_HPM0_FPD] [get_bd_intf_pins control/S00_AXI]
connect_bd_intf_net [get_bd_intf_pins control/M00_AXI] [get_bd_intf_pins accelerator/s_axi_ctrl]
for {set port 0} {$port < $ports} {incr port} {
    connect_bd_intf_net [get_bd_intf_pins accelerator/m_axi_hp$port] [get_bd_intf_pins ps/S_AXI_HP${port}_FPD]
}

# Addresses: the registers where the driver and the overlay expect them, all of the DRAM for the memory ports.
assign_bd_address -offset [setting CONTROL_ADDRESS] -range [setting CONTROL_BYTES] \
    -target_address_space [get_bd_addr_spaces ps/Data] [get_bd_addr_segs accelerator/s_axi_ctrl/reg0]
for {set port 0} {$port < $ports} {incr port} {
    set space [get_bd_addr_spaces accelerator/m_axi_hp$port]
    set gp [expr {$port + 2}]
    assign_bd_address -target_address_space $space [get_bd_addr_segs ps/SAXIGP$gp/HP${port}_DDR_LOW]
    set high [get_bd_addr_segs -quiet ps/SAXIGP$gp/HP${port}_DDR_HIGH]
    if {[llength $high]} {
        assign_bd_address -target_address_space $space $high
    }
    foreach other {QSPI LPS_OCM} {
        set segment [get_bd_addr_segs -quiet ps/SAXIGP$gp/HP${port}_$other]
        if {[llength $segment]} {
            exclude_bd_addr_seg -target_address_space $space $segment
        }
    }
}

validate_bd_design
save_bd_design
set mapped [get_bd_addr_segs -of_objects [get_bd_addr_spaces ps/Data]]
fact control_address [get_property OFFSET $mapped]
fact control_bytes [get_property RANGE $mapped]
fact clock_mhz [get_property CONFIG.PSU__CRL_APB__PL0_REF_CTRL__ACT_FREQMHZ $ps]

set design [get_files system.bd]
set_property synth_checkpoint_mode None $design
generate_target all $design
set top [make_wrapper -files $design -top]
add_files -norecurse [list $top]
set_property top system_wrapper [current_fileset]
update_compile_order -fileset sources_1
close_project
