# SPDX-License-Identifier: Apache-2.0
"""A component with figures for the manifest."""

from amaranth.lib import wiring


class Block(wiring.Component):
    """A component whose figures are listed in the manifest.

    ``container`` is True if a component only contains other blocks: tables list these instead.
    """

    container = False

    def properties(self) -> dict[str, int]:
        """Latencies in cycles and other figures, by name, for the manifest; the benches assert them."""
        return {}
