"""Private keys: 128 bits that stand in for a seed and are never in a file.

The pseudorandom words of a key are the keystream of ChaCha20 (RFC 8439), a standard stream cipher, under a key derived from
it by HKDF-SHA256 (RFC 5869). A file holds eight bytes of an HMAC-SHA256, by which a wrong key is refused before anything is
rebuilt. docs/training.md says what that protects and what it does not.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seedpack.errors import KeyNeededError

KEY_BYTES = 16
CHECK = re.compile(r"(?:[0-9a-f]{16})?")  # a key's check; "" is no key
_keys: dict[str, bytes] = {}  # by their check; models trained or loaded with a key go on needing it
_in_use: ContextVar[frozenset[str]] = ContextVar("in_use", default=frozenset())  # for the files that are being read


def add_key(key: bytes) -> str:
    """Let this process regenerate weights with a key; return its check, 16 hexadecimal digits, which files hold.

    Raises:
        KeyNeededError: it does not have 16 bytes.
    """
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        size = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise KeyNeededError(f"a private key has {KEY_BYTES} bytes, got {size}; make one with os.urandom({KEY_BYTES})")
    check = hmac.new(key, b"seedpack key check", hashlib.sha256).hexdigest()[:16]
    _keys[check] = key
    return check


def use_key(key: bytes) -> AbstractContextManager[object]:
    """Allow files that need this key to be read: from now on, or, used as a context manager, in its body alone."""
    token = _in_use.set(_in_use.get() | {add_key(key)})
    stack = ExitStack()
    stack.callback(_in_use.reset, token)
    return stack


def require_key(check: str) -> None:
    """Refuse a file that needs a key which is not in use.

    Raises:
        KeyNeededError: the message says whether none or another one is.
    """
    if check and check not in _in_use.get():
        problem = "the key given is another one" if _in_use.get() else "none is given"
        raise KeyNeededError(
            f"these weights are regenerated with a private key (check {check}), and {problem}; pass it by --key-file, or "
            "seedpack.load(…, key=…)"
        )


def require_same_key(check: object) -> None:
    """Refuse a file that needs another key than those in use, if any is.

    Raises:
        KeyNeededError: as `require_key` does.
    """
    if isinstance(check, str) and _in_use.get():
        require_key(check)


def default_seed(seed: int | None, key: bytes | None) -> int:
    """Return the seed, or by default 0, or with a key a random one: no two models use the same words of a key."""
    if seed is not None:
        return seed
    return 0 if key is None else secrets.randbits(62)


def read_key(path: str | Path) -> bytes:
    """Read a key from a file: 16 bytes, or 32 hexadecimal digits."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise KeyNeededError(f"{path}: the key file cannot be read: {error.strerror}") from None
    if len(data) == KEY_BYTES:
        return data
    try:
        key = bytes.fromhex(data.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyNeededError(
            f"{path}: holds {len(data)} bytes, expected a key of {KEY_BYTES} bytes or {2 * KEY_BYTES} hexadecimal digits"
        )
    return key


def keystream_words(check: str, seed: int, count: int, offset: int = 0) -> Tensor:
    """Return `count` words of 32 bits (little-endian) of a key's keystream, int64, from word `offset` on (a multiple of 16).

    The nonce is four zero bytes and the 64-bit seed; word 0 is the first of block 0.

    Args:
        check: of a key that `add_key` was given.
        seed: of the stream.
        count: of words.
        offset: in words.
    """
    if check not in _keys:
        raise KeyNeededError(f"no key with check {check} was added; pass it to seedpack.keys.add_key")
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise KeyNeededError("private keys need cryptography; pip install cryptography") from None
    derived = HKDF(SHA256(), 32, salt=None, info=b"seedpack ChaCha20").derive(_keys[check])
    block = (offset // 16).to_bytes(4, "little")
    nonce = block + bytes(4) + seed.to_bytes(8, "little")
    stream = Cipher(algorithms.ChaCha20(derived, nonce), mode=None).encryptor().update(bytes(4 * count))
    return torch.from_numpy(np.frombuffer(stream, "<u4").astype(np.int64))
