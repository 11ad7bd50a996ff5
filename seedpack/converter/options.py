"""Everything that `compress` can be asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from seedpack.codecs.base import Codec
from seedpack.codecs.raw import RawCodec
from seedpack.dtypes import PACKABLE, dtype_name, torch_dtype
from seedpack.errors import CodecError, FormatError, OptionError
from seedpack.kernels.dispatch import Backend
from seedpack.keys import add_key, default_seed

TOKENS, OWN_CONTEXT, CONTEXT = 16384, 128, 512
AUTO, SELF, MIXED = "auto", "self", "self+"
ENGINES = ("processes", "ray")
PLANNED = frozenset({"codec", "bits", "settings", "include", "exclude", "dtype", "head_bits", "target_size"})
Text = str | Path | Tensor | Iterable[Any]


class Progress(Protocol):
    """Called as work is done."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        """Take note of `done` units of a stage since the last call, of `total` in all, on an item; without a unit an item is a
        message."""
        ...


def silent(stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
    """Take no note of progress."""


@dataclass(frozen=True)
class Calibration:
    """The text that layers are calibrated on, and how.

    Attributes:
        text: "self": the model writes it; "auto": so for causal language models that fit the memory, and none for others;
            a text or JSON lines file; a data set of the hub; "self+" and one of these: half of each; token ids [n, context]; or,
            for modules that are no language models, batches to run the module on.
        tokens: that a language model reads.
        context: tokens per sequence; 0 takes 512, and 128 of what the model writes: the more beginnings, the more kinds of text.
        seed: of what the model writes.
        sequential: pack the layers of a language model one after the other, each fitted to the inputs that the packed ones before
            it give, and to make up for what they have lost. None does so where one process fits, and the model allows it.
        tune: epochs of tuning the packed language model to the original on the text.
        measure: where bits are a budget, pack a language model once, measure each tensor's share of its divergence from the
            original, and spread the bits by that.
        is_usual: whether it was decided by "auto": then a model that cannot be calibrated is packed without, and what was
            measured is not kept.
    """

    text: Text
    tokens: int = TOKENS
    context: int = 0
    seed: int = 0
    sequential: bool | None = None
    tune: int = 0
    measure: bool = True
    is_usual: bool = False

    def __post_init__(self) -> None:
        if self.context == 0:
            object.__setattr__(self, "context", OWN_CONTEXT if self.writes or self.is_open else CONTEXT)
        if self.is_mixed and self.reads in ("", SELF, AUTO):
            raise OptionError(f"calibration {self.text!r}: name a text behind the +")
        if self.context < 2:
            raise OptionError(f"calibration: sequences of {self.context} tokens; they must have at least 2")
        least, what = (2 * self.context, "two sequences") if self.is_mixed else (self.context, "a sequence")
        if self.tokens < least:
            raise OptionError(
                f"calibration: {self.tokens} tokens do not fill {what} of {self.context}; ask for at least {least}, or for "
                "shorter sequences (--calibration-context, context=…)"
            )
        if type(self.tune) is not int or self.tune < 0:
            raise OptionError(f"tune must be a count of epochs, got {self.tune!r}")

    @property
    def is_open(self) -> bool:
        """True while "auto" is not decided."""
        return isinstance(self.text, str) and self.text == AUTO

    @property
    def writes(self) -> bool:
        """True if the model writes the text, or half of it."""
        return isinstance(self.text, str) and (self.text == SELF or self.is_mixed)

    @property
    def is_mixed(self) -> bool:
        """True if the model writes half of the text, and the other half is given."""
        return isinstance(self.text, str) and self.text.startswith(MIXED)

    @property
    def reads(self) -> Text:
        """The text that is given, all of it or the half; "" where the model writes all."""
        if not self.writes:
            return self.text
        return "" if self.text == SELF else str(self.text).removeprefix(MIXED)

    @property
    def is_text(self) -> bool:
        """True if a language model reads it; else a module runs on batches."""
        return isinstance(self.text, (str, Path, Tensor))


@dataclass(frozen=True)
class CompressOptions:
    """The choices of one run of the converter.

    Attributes:
        codec: a codec, its id, or "svd+seedlm".
        bits: bits per weight; default the codec's, 4. For trellis a whole number is the code bits of every tensor but
            the head; a fraction is a budget for all that is stored of the packed tensors (see `budget.allocate`).
        settings: hyperparameters of the codec by name.
        include: patterns of tensor names; given, only these are packed.
        exclude: patterns of tensor names to leave raw.
        dtype: of raw float tensors and decoded weights; default the source's.
        head_bits: code bits of a language model's output head (and the embedding tied to it); default by `budget`.
        target_size: instead of bits, bytes of the file (of the weights, in a folder) to stay within.
        importance: by tensor name the weight of each input channel's error [in], or the input second moment E[x·xᵀ] of
            its layer (its Hessian) [in, in]; default a guess where the codec has use for one: the power that the norm
            before a layer gives each channel, over the norm of its weights.
        calibration: run the model and take the second moments of its layers' inputs: "self" (a language model writes
            the text itself), a text or JSON lines file, a data set of the hub, "self+" and one of these, token ids [n, context],
            batches for another module, or a `Calibration` that says more; "auto": "self" where that can be done (the command line's
            default); "none" or None: do not. Kept in `seedpack-calibration` beside the output for other runs.
        key: the 16 bytes of a private key, for weights that are regenerated with one (basis, mask).
        state_key: of a file that torch saved, the key that the state dict is under, or keys with dots between them.
        allow_nonfinite: store tensors with NaN or Inf raw instead of refusing them.
        trust_remote_code: run the Python code that lies in the model's folder, where that defines the model.
        force: replace an existing output.
        shard_bytes: in a folder, start a new file before one exceeds this.
        device: where tensors are fitted, one at a time: "cpu", "cuda" or "cuda:1".
        jobs: processes that fit tensors, of a model on disk: each has its share of the cores, or with "cuda" a GPU.
        engine: what several workers are: "processes" on this machine, or "ray", tasks on a cluster; then `jobs` is not used.
        address: of the Ray cluster; default the one that this machine belongs to.
        backend: which kernels to use.
    """

    codec: str | Codec = "trellis"
    bits: float | None = None
    settings: Mapping[str, Any] | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    dtype: str | torch.dtype | None = None
    head_bits: float | None = None
    target_size: int | None = None
    importance: Mapping[str, Tensor] | None = None
    calibration: Calibration | Text | None = None
    key: bytes | None = field(default=None, repr=False)
    state_key: str | None = None
    allow_nonfinite: bool = False
    trust_remote_code: bool = False
    force: bool = False
    shard_bytes: int | None = None
    device: str | torch.device = "cpu"
    jobs: int = 1
    engine: str = "processes"
    address: str | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.bits is not None and (isinstance(self.bits, bool) or not isinstance(self.bits, (int, float))):
            raise OptionError(f"bits: expected a number of bits per weight, got {self.bits!r}")
        if self.bits is not None:
            object.__setattr__(self, "bits", float(self.bits))
        if type(self.jobs) is not int or self.jobs < 1:
            raise OptionError(f"jobs: expected a count of processes, got {self.jobs!r}")
        if self.engine not in ENGINES:
            raise OptionError(f"engine {self.engine!r}: expected one of {', '.join(ENGINES)}")
        if self.address is not None and self.engine != "ray":
            raise OptionError(
                "address is that of a Ray cluster; choose the engine ray too (--engine ray, engine='ray')"
            )
        if self.engine == "ray" and self.key is not None:
            raise OptionError(
                "a private key would be sent to the cluster's machines; leave the engine out (--jobs serves one)"
            )
        if self.target_size is not None and self.bits is not None:
            raise OptionError("give bits or a target size, not both")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(float_dtype(self.dtype)).removeprefix("torch."))
        for name in ("include", "exclude"):
            if isinstance(pattern := getattr(self, name), str):
                object.__setattr__(self, name, (pattern,))
        if self.key is not None and isinstance(self.codec, Codec):
            raise OptionError(
                "a private key is given, and a codec that is made already; give the codec's id, or its key"
            )
        if self.key is not None:  # a random seed is drawn once
            seeded = {"seed": default_seed(None, self.key), **(self.settings or {}), "key": add_key(self.key)}
            object.__setattr__(self, "settings", seeded)
        if isinstance(self.calibration, str) and self.calibration == "none":
            object.__setattr__(self, "calibration", None)
        elif self.calibration is not None and not isinstance(self.calibration, Calibration):
            object.__setattr__(self, "calibration", Calibration(self.calibration))

    @classmethod
    def of(cls, options: CompressOptions | None, changes: Mapping[str, Any]) -> CompressOptions:
        """Return options with some of them changed, as keywords of `compress` say.

        Raises:
            OptionError: there is no option of a name.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        if unknown := sorted(changes.keys() - set(known)):
            raise OptionError(f"no such option: {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**changes) if options is None else dataclasses.replace(options, **changes)

    def require_no_choices(self) -> None:
        """Refuse choices that a plan has made already.

        Raises:
            OptionError: naming one.
        """
        for option in dataclasses.fields(self):
            value = None if option.name == "settings" and self.key is not None else getattr(self, option.name)
            if option.name in PLANNED and value != option.default and (value or option.default):
                raise OptionError(
                    f"{option.name} is given, and a plan that has chosen it already; leave one of them out"
                )

    @property
    def calibrated(self) -> Calibration | None:
        """The calibration, in full; None for none, and while "auto" is not decided."""
        assert self.calibration is None or isinstance(self.calibration, Calibration)
        return None if self.calibration is None or self.calibration.is_open else self.calibration

    @property
    def in_sequence(self) -> bool:
        """True if layers are to be packed one after the other: where that is asked for, else where one process fits them."""
        calibration = self.calibrated
        if calibration is None or calibration.sequential is not None:
            return calibration is not None and bool(calibration.sequential)
        return calibration.is_text and self.jobs == 1 and self.engine == "processes"

    @property
    def is_raw(self) -> bool:
        """True if all tensors are to be stored as they are."""
        return self.codec == RawCodec.id or isinstance(self.codec, RawCodec)


@contextmanager
def checking_options() -> Iterator[None]:
    """Tell a codec's refusal of settings that were asked for from its refusal of those in a file."""
    try:
        yield
    except CodecError as error:
        raise OptionError(str(error)) from None


def fitting_device(device: str | torch.device) -> torch.device:
    """Return the device to fit on: "cpu", "cuda" or "cuda:1".

    Raises:
        OptionError: it is unknown, or not here.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise OptionError(f"device {str(device)!r}: fitting runs on cpu, cuda, or cuda:N")
    count = torch.cuda.device_count() if place.type == "cuda" else 1
    if (place.index or 0) >= count:
        raise OptionError(
            f"device {str(device)!r}: torch sees {count} CUDA devices here; choose another, leave --device out to "
            "fit on the CPU, or install torch with CUDA"
        )
    return place


def float_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the float dtype of a name such as float16 or bf16, or the dtype itself.

    Raises:
        OptionError: it is none.
    """
    try:
        dtype = name if isinstance(name, torch.dtype) else torch_dtype(name)
    except FormatError:
        dtype = torch.uint8
    if dtype_name(dtype) not in PACKABLE:
        raise OptionError(f"dtype {str(name)!r}: choose float32, float16, bfloat16 or float64")
    return dtype
