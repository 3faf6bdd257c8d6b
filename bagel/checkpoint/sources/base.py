"""What every format on disk gives: official keys, the shapes and dtypes that are meant, rows, stored forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorEntry, TensorFiles, open_tensors

REOPEN_BYTES = 512 * 2**20
"""Pages of a memory map count as this process's memory until it is closed, so it is closed this often."""


class Source(Protocol):
    """The weights of one model on disk, whatever their format.

    Attributes:
        format: its name, as users type it (`safetensors`, `nf4`, `gguf` ...).
        label: what to call it in a sentence.
        entries: every tensor by its official key, with the shape and dtype that are meant.
        files: the files it lies in.
    """

    format: str
    label: str
    entries: dict[str, TensorEntry]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it lies in, in order."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Return keys in the order in which they are best read."""
        ...

    def read(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of a tensor on the host, decoded; valid until the next call. Raises CheckpointError."""
        ...

    def keeps(self, key: str) -> bool:
        """Whether a tensor has a stored form by which a linear layer can multiply."""
        ...

    def stored(self, key: str) -> Any:
        """Return that stored form, on the host, one of the types that `bagel.checkpoint.keep` knows."""
        ...

    def close(self) -> None:
        """Let go of open files; reading opens them again."""
        ...


class Packed(Protocol):
    """One tensor of the model that takes several tensors of a safetensors file."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that make it up, the largest first."""
        ...

    @property
    def format(self) -> str:
        """The name of its format."""
        ...

    @property
    def entry(self) -> TensorEntry:
        """Its meant shape and dtype."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether a linear layer can multiply by its stored form."""
        ...

    def rows(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Return rows, decoded."""
        ...

    def stored(self, reader: TensorReader) -> Any:
        """Return the stored form."""
        ...


class TensorReader:
    """Reads tensors of safetensors files; closes and opens them every so often to give mapped pages back.

    Args:
        tensors: the files' headers.
        names: of every tensor here, its name in the files; as there by default.
    """

    def __init__(self, tensors: TensorFiles, names: Mapping[str, str] | None = None) -> None:
        self.tensors = tensors
        self.names = {key: key for key in tensors.entries} if names is None else dict(names)
        self._file: Path | None = None
        self._handle: Any = None
        self._read_bytes = 0
        self._places: dict[Path, dict[str, int]] = {}
        self._last: tuple[str, Any] = ("", None)

    def place(self, key: str) -> tuple[int, int]:
        """Return where a tensor lies: its file, and its position there, so that files are read front to back."""
        name = self.names[key]
        file = self.tensors.entries[name].file
        if file not in self._places:
            self.tensors.check_unchanged(file)
            with open_tensors(file) as handle:
                self._places[file] = {name: place for place, name in enumerate(handle.offset_keys())}
        return self.tensors.files.index(file), self._places[file][name]

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of a tensor, still on the map: valid until the next call."""
        return self._read(key, lambda handle: handle.get_slice(self.names[key])[first:last])

    def tensor(self, key: str) -> Tensor:
        """Return a whole tensor, which stays valid."""
        return self._read(key, lambda handle: handle.get_tensor(self.names[key])).clone()

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` gives, the last one again without calling it: for what is read rows at a time."""
        if self._last[0] != key:
            self._last = ("", None)  # before the next one takes its memory
            self._last = (key, make())
        return self._last[1]

    def close(self) -> None:
        """Let go of the open file and of what was remembered."""
        self._last = ("", None)
        self._release()

    def _release(self) -> None:
        self._file = self._handle = None
        self._read_bytes = 0

    def _read(self, key: str, get: Any) -> Tensor:
        file = self.tensors.entries[self.names[key]].file
        if file != self._file or self._read_bytes > REOPEN_BYTES:
            self._release()
            self.tensors.check_unchanged(file)
            self._handle, self._file = open_tensors(file), file
        try:
            part = get(self._handle)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file} cannot be read at {key} ({error}); fetch it again") from error
        self._read_bytes += part.nbytes
        return part
