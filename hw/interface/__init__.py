# SPDX-License-Identifier: Apache-2.0
"""The register map and the descriptor for other languages and other tools; ``hw.docs`` writes the files."""
