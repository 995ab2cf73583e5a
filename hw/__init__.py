# SPDX-License-Identifier: Apache-2.0
"""Hardware: the contract (``hw.spec``), the generator (``hw.rtl``) and its command line (``hw.build``)."""
