# SPDX-License-Identifier: Apache-2.0
# Pins and bitstream options of the KV260. pl_clk0's period is not here: the processing system's own constraints have it.

# The fan's enable, active low, is wired to the fabric (HDA20 of the SOM's bank 45); the design holds it on.
set_property PACKAGE_PIN A12 [get_ports fan_en_b]
set_property IOSTANDARD LVCMOS33 [get_ports fan_en_b]
set_property SLEW SLOW [get_ports fan_en_b]
set_property DRIVE 4 [get_ports fan_en_b]

set_property BITSTREAM.GENERAL.COMPRESS TRUE [current_design]
set_property BITSTREAM.CONFIG.OVERTEMPSHUTDOWN ENABLE [current_design]
