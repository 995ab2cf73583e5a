# SPDX-License-Identifier: Apache-2.0
"""Hardware side of Gristmill: the contract (``hw.spec``), the generator (``hw.rtl``) and its command line (``hw.build``)."""
