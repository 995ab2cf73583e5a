# SPDX-License-Identifier: Apache-2.0
"""onnxruntime: sessions, stages of a cut graph, caches and feeds. This package does not depend on any device."""
