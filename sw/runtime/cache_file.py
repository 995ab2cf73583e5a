# SPDX-License-Identifier: Apache-2.0
"""A decoder's cache as a file, so that a later run does not compute the keys and values of a long prompt again.

The file is numpy's npz: the ids of the tokens, the cache's arrays, and a digest. The digest is of the model's file with
its external data, and of everything else that the arrays depend on; a cache with another digest is refused.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile
from sw.runtime.base import BaseDecoder
from sw.runtime.conversation import common

IDS, CONTEXT, REACHED, DIGEST = "ids", "context", "reached", "digest"

_DAMAGES = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile)
"""What numpy raises for a file that is missing, cut, or something else."""


def save_cache(path: Path, decoder: BaseDecoder, ids: Sequence[int]) -> None:
    """Writes the cache, which holds the keys and values of `ids`. The file is complete or not there.

    Raises UserError if it cannot be written.
    """
    assert len(ids) == decoder.length
    values: dict[str, Any] = {
        IDS: np.asarray(ids, np.int64),
        CONTEXT: decoder.context,
        REACHED: decoder.reached,
        DIGEST: _digest(decoder),
        **decoder.cache_arrays(),
    }
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **values)
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise UserError(f"cannot write the cache to {path}: {one_line(error)}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def saved_context(path: Path) -> int:
    """The tokens that a saved cache can hold. Raises UserError if the file is missing or damaged."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return int(file[CONTEXT])
    except _DAMAGES as error:
        raise UserError(f"{path} is not a complete cache ({one_line(error)})") from None


def load_cache(path: Path, decoder: BaseDecoder, ids: Sequence[int]) -> int:
    """Fills the cache with as many of the first ids as the file and the prompt share, all but the last id at most.

    Returns their number. Raises UserError if the file is missing, damaged, or of another model or hardware.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            saved, reached, digest = file[IDS], int(file[REACHED]), str(file[DIGEST])
            if digest != _digest(decoder):
                raise UserError(
                    f"{path} is the cache of another model, other hardware, or another --context or --key-bits"
                )
            same = common(saved.tolist(), ids[:-1])
            if same and decoder.can_shorten(reached, same):
                wanted = decoder.cache_arrays()
                arrays = {name: file[name] for name in wanted}
                for name, array in wanted.items():
                    if (arrays[name].dtype, arrays[name].ndim) != (array.dtype, array.ndim):
                        raise UserError(f"{path} is not a complete cache: {name} has another form")
                decoder.restore(arrays, same, reached)
                return same
    except _DAMAGES as error:
        raise UserError(f"{path} is not a complete cache ({one_line(error)})") from None
    return 0


def _digest(decoder: BaseDecoder) -> str:
    text = f"{OnnxFile(decoder.path).digest()} {decoder.cache_form}"
    return hashlib.sha256(text.encode()).hexdigest()
