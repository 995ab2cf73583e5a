# SPDX-License-Identifier: Apache-2.0
"""Writes keys and values to a KV cache: the parts of :class:`hw.rtl.attention.cache_writer.CacheWriter`."""
