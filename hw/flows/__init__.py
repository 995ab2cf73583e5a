# SPDX-License-Identifier: Apache-2.0
"""Makes files from components: Verilog, netlists, wrappers, overlays; and reads the reports of other tools."""
