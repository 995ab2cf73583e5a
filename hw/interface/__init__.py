# SPDX-License-Identifier: Apache-2.0
"""The register map and the descriptor for programs in other languages and for other tools; ``hw.docs`` writes them."""
