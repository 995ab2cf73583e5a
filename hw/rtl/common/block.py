# SPDX-License-Identifier: Apache-2.0
"""What a component says about itself beside its ports."""

from amaranth.lib import wiring


class Block(wiring.Component):
    """A component that states figures about itself.

    ``container`` is set where a component only holds other blocks: tables then list those.
    """

    container = False

    def properties(self) -> dict[str, int]:
        """Latencies in cycles and other figures, by name, for the manifest; the benches assert them."""
        return {}
