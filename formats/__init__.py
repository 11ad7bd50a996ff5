"""The container: bytes and JSON, no torch. `docs/format.md` is its specification."""

from seedpack.formats.manifest import CodecSpec as CodecSpec
from seedpack.formats.manifest import Manifest as Manifest
from seedpack.formats.manifest import TensorEntry as TensorEntry
from seedpack.formats.manifest import View as View
from seedpack.formats.reader import Checkpoint as Checkpoint
from seedpack.formats.reader import Part as Part
from seedpack.formats.reader import SafetensorsFile as SafetensorsFile
from seedpack.formats.staging import staged as staged
from seedpack.formats.version import FORMAT_VERSION as FORMAT_VERSION
from seedpack.formats.writer import CheckpointWriter as CheckpointWriter
from seedpack.formats.writer import PartSpec as PartSpec
from seedpack.formats.writer import PlannedTensor as PlannedTensor
